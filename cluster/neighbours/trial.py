"""The same queries by every method: what it finds again, how fast, and in how many bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cluster.experiments.neighbors.features import Features, Flags, Ids, Rows
from cluster.experiments.neighbors.search import Base, nearest
from cluster.neighbours import rivals
from cluster.neighbours.autoencoder import AutoEncoder, Recipe, trained
from cluster.neighbours.hamming import Codes, Hamming, pack
from pipeline.remote.dataset import parse_size
from pipeline.tools.files import sealed
from pipeline.tools.progress import Progress

SHORTLIST = 100
"""Pictures by code among which the exact neighbours are looked for, too."""
NO_FAISS = "not measured: faiss is not installed (pip install -e '.[faiss]')"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train auto-encoders to short binary codes and measure searches by them."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run; cluster.experiments.neighbors has been there."""
    bits: tuple[int, ...] = (64, 128, 256)
    """Lengths of the codes, multiples of 8."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Exact neighbours that are to be found again."""
    queries: str = "val"
    """Split whose pictures are looked for."""
    base: str = "train"
    """Split that is coded and searched."""
    asked: int = 1000
    """Most queries, drawn at random."""
    features: Path | None = None
    """Folder of the features; default: RUN/neighbours."""
    hidden: int = Recipe.hidden
    """Units of the auto-encoder's hidden layers."""
    steps: int = Recipe.steps
    """Of training, 256 pictures each."""
    memory: str = "2GB"
    """Most memory for the exact search."""
    seed: int = 0
    """Of the training and of all draws."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


class Trial:
    """The same queries by every method."""

    def __init__(self, options: Options, asked: Features, base: Features) -> None:
        """Draw the queries and find their exact neighbours."""
        self._options, self._base = options, base
        rng = np.random.default_rng([options.seed, 1])
        self.ids: Ids = np.sort(rng.permutation(np.flatnonzero(asked.sound))[: options.asked])
        self._queries: Rows = np.asarray(asked.values[self.ids])
        self._labels = asked.labels[self.ids]
        self._there = np.flatnonzero(base.sound)
        self.shortlist = min(SHORTLIST, len(self._there))
        own = options.queries == options.base
        self._own = self.ids if own else None
        started = time.perf_counter()
        self._exact = nearest(
            asked.values,
            Base(base.values, base.sound),
            options.k,
            memory=parse_size(options.memory),
            picked=self.ids,
            itself=own,
        ).ids
        self._exact_seconds = time.perf_counter() - started

    def rows(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table."""
        options, base = self._options, self._base
        size = base.about.units * base.values.dtype.itemsize
        yield {
            "method": "exact",
            "bits": 8 * size,
            "bytes": size,
            "recall_at_k": 1.0,
            "recall_in_shortlist": 1.0,
            "precision_at_k": self._precision(self._exact),
            "queries_s": round(len(self.ids) / self._exact_seconds, 1),
            "train_s": 0.0,
        }
        x = rivals.sample(base.values, base.sound, options.seed)
        library = rivals.faiss()
        for bits in options.bits:
            started = time.perf_counter()
            plain = rivals.pca(x, bits, options.seed)
            seconds = time.perf_counter() - started
            yield self._by_bits("signs of PCA", plain, bits, seconds)
            turned = rivals.itq(x, plain, options.seed)
            yield self._by_bits("ITQ", turned, bits, time.perf_counter() - started)
            found, seconds = self._learned(folder, turned, bits)
            yield self._by_bits("auto-encoder", found, bits, seconds)
            yield self._product(library, x, bits)

    def _learned(self, folder: Path, start: rivals.Linear, bits: int) -> tuple[AutoEncoder, float]:
        """An auto-encoder of so many bits, and the seconds that its training took."""
        options, base = self._options, self._base
        recipe = Recipe(bits=bits, hidden=options.hidden, steps=options.steps, seed=options.seed)
        about = {"features": base.about.table(), "recipe": recipe.table()}
        path = folder / f"codes-{bits}.safetensors"
        made = AutoEncoder(base.about.units, recipe, start, 1.0)
        if (seconds := _loaded(path, made, about)) is not None:
            return made.eval(), seconds
        started = time.perf_counter()
        with Progress(f"auto-encoder to {bits} bits", total=recipe.steps, unit="steps") as progress:
            made = trained(base.values, base.sound, start, recipe, progress.advance)
        seconds = round(time.perf_counter() - started, 2)
        state = {f"net/{name}": tensor.contiguous() for name, tensor in made.state_dict().items()}
        state["codes"] = torch.from_numpy(pack(_bits(made, base.values)))
        with sealed(path) as file:
            file.write(save(state, {"about": json.dumps(about), "seconds": str(seconds)}))
        return made, seconds

    def _by_bits(
        self, method: str, coder: rivals.Linear | AutoEncoder, bits: int, seconds: float
    ) -> dict[str, Any]:
        coded: Codes = pack(_bits(coder, self._base.values))[self._there]
        asked = pack(_bits(coder, self._queries))
        searcher = Hamming(coded)
        started = time.perf_counter()
        found = searcher.nearest(asked, min(self.shortlist + 1, len(coded)))[0]
        took = time.perf_counter() - started
        return self._row(method, bits, self._there[found], seconds, took)

    def _product(self, library: Any, x: torch.Tensor, bits: int) -> dict[str, Any]:
        row = {"method": "product quantisation", "bits": bits, "bytes": bits // 8}
        if library is None:
            return row | {"missing": NO_FAISS}
        if x.shape[1] % (bits // 8) or len(x) < 256:
            why = f"not measured: {x.shape[1]} features in {bits // 8} parts, {len(x)} pictures"
            return row | {"missing": why}
        most = min(self.shortlist + 1, len(self._there))
        base = self._base
        found = rivals.product_quantisation(
            library, x, base.values, base.sound, self._queries, bits, most
        )
        return self._row(
            "product quantisation", bits, found.ids, found.train_seconds, found.search_seconds
        )

    def _row(
        self, method: str, bits: int, found: Ids, seconds: float, took: float
    ) -> dict[str, Any]:
        """A row of the table; `found` has one picture too many, for the query may be among them."""
        if self._own is not None:
            own = found == self._own[:, None]
            own[~own.any(1), -1] = True
            found = found[~own].reshape(len(found), -1)
        found = found[:, : self.shortlist]
        k = self._options.k
        return {
            "method": method,
            "bits": bits,
            "bytes": bits // 8,
            "recall_at_k": recall(self._exact, found[:, :k]),
            "recall_in_shortlist": recall(self._exact, found),
            "precision_at_k": self._precision(found[:, :k]),
            "queries_s": round(len(self.ids) / took, 1),
            "train_s": round(seconds, 2),
        }

    def _precision(self, found: Ids) -> float:
        return float((self._base.labels[found] == self._labels[:, None]).mean())


def recall(exact: Ids, found: Ids) -> float:
    """Share of the exact neighbours [Q, k] that are among those found [Q, n]."""
    hits = (exact[:, :, None] == found[:, None, :]).any(2)
    return float(hits.mean())


def _bits(coder: rivals.Linear | AutoEncoder, rows: Rows) -> Flags:
    """The bits of many rows, mapped or not, bool [n, bits]."""
    parts = [
        coder.bits(rows[start : start + rivals.CHUNK])
        for start in range(0, len(rows), rivals.CHUNK)
    ]
    return np.concatenate(parts)


def _loaded(path: Path, net: AutoEncoder, about: dict[str, Any]) -> float | None:
    """Fill a network from an earlier call's file; None if it is not there or another's."""
    with suppress(OSError, SafetensorError, ValueError, KeyError, RuntimeError):
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            if json.loads(facts["about"]) != about:
                return None
            names = [name for name in file.keys() if name.startswith("net/")]  # noqa: SIM118
            net.load_state_dict({name[4:]: file.get_tensor(name) for name in names})
        return float(facts["seconds"])
    return None
