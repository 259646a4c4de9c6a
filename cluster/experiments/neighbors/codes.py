"""Command: short binary codes for images, which section 6.1 of the paper proposes and did not do.

    python -m cluster.experiments.neighbors RUN                      # makes the features, once
    python -m cluster.experiments.neighbors.codes RUN [--bits 64 128 256] [-k 10] [--json]

"... could be made efficient by training an auto-encoder to compress these vectors to short binary
codes." Trains one auto-encoder for each length on the features of the base, without labels, and
searches its codes by Hamming distance. The same queries are answered by the exact search, by signs
of principal components, by ITQ, and, if faiss is installed, by product quantisation. Prints the
table, and writes into RUN/neighbours/

    summary.json             the table
    codes-64.safetensors     the codes of the base, and the network that makes them

A length whose file exists is not trained again, so a call that was killed resumes with the next.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cluster.cli.options import CodesOptions
from cluster.config import read_run_config
from cluster.experiments.neighbors.coders import (
    CHUNK,
    SAMPLE,
    AutoEncoder,
    AutoEncoderConfig,
    LinearCoder,
    draw_sample,
    encode,
    fit_itq,
    fit_pca,
    train_autoencoder,
)
from cluster.experiments.neighbors.features import (
    FOLDER,
    MAKE,
    Features,
    Ids,
    Rows,
    hash_checkpoint,
)
from cluster.experiments.neighbors.search import HammingIndex, SearchBase, find_nearest
from cluster.experiments.neighbors.summary import SUMMARY, describe_search, write_summary
from cluster.run.folder import CONFIG
from pipeline.tools.arguments import parse_options, require_range
from pipeline.tools.errors import DataError, DuetError, UsageError, run
from pipeline.tools.files import atomic_write, ensure_writable
from pipeline.tools.jsonl import parse_json
from pipeline.tools.packages import suggest_extra
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count, parse_size

SHORTLIST = 100
"""Images found by code among which the exact neighbors are looked for."""
NO_FAISS = f"not measured: faiss is not installed ({suggest_extra('faiss')})"


def load_faiss() -> Any:
    """Return the faiss library, or None where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


def search_by_quantisation(
    library: Any, x: Tensor, base: Features, queries: Rows, bits: int, k: int
) -> tuple[Ids, float, float]:
    """Search by faiss's IndexPQ: bits / 8 parts of the features, 256 centers each.

    Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search (PAMI 2011); the
    distance is asymmetric, so the query itself is not rounded.

    Args:
        library: `load_faiss()`.
        x: float32 [n, units], the rows that the centers are fitted to.
        base: features that are searched.
        queries: floats [Q, units].
        bits: length of a code; units must be a multiple of bits / 8.
        k: number of neighbors.

    Returns:
        int64 [Q, k] rows of the base; seconds of training; seconds of searching.
    """
    index = library.IndexPQ(x.shape[1], bits // 8, 8)
    index.pq.cp.min_points_per_centroid = 1  # no warning for each part of a small base
    started = time.perf_counter()
    index.train(x.numpy())
    train_seconds = time.perf_counter() - started
    rows = np.flatnonzero(base.sound)
    for start in range(0, len(rows), CHUNK):
        index.add(base.values[rows[start : start + CHUNK]].astype(np.float32))
    asked: npt.NDArray[np.float32] = queries.astype(np.float32)
    started = time.perf_counter()
    _, found = index.search(asked, k)
    return rows[found], train_seconds, time.perf_counter() - started


class CodeComparison:
    """Comparison of all methods on the same queries."""

    def __init__(self, options: CodesOptions, queries: Features, base: Features) -> None:
        """Draw the queries and find their exact neighbors."""
        self._options, self._base = options, base
        rng = np.random.default_rng([options.seed, 1])
        self.ids: Ids = np.sort(rng.permutation(np.flatnonzero(queries.sound))[: options.asked])
        self._queries: Rows = np.asarray(queries.values[self.ids])
        self._labels = queries.labels[self.ids]
        self._rows = np.flatnonzero(base.sound)
        self.shortlist = min(SHORTLIST, len(self._rows))
        self._is_own = options.queries == options.base
        started = time.perf_counter()
        self._exact = find_nearest(
            queries.values,
            SearchBase(base.values, base.sound),
            options.k,
            memory=parse_size(options.memory),
            picked=self.ids,
            itself=self._is_own,
        ).ids
        self._exact_seconds = time.perf_counter() - started

    def measure(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table; the auto-encoders go into `folder`."""
        options, base = self._options, self._base
        bits = 8 * base.about.units * base.values.dtype.itemsize
        yield self._make_row("exact", bits, self._exact, 0.0, self._exact_seconds)
        x = draw_sample(base.values, base.sound, options.seed)
        library = load_faiss()
        for bits in options.bits:
            started = time.perf_counter()
            plain = fit_pca(x, bits, options.seed)
            seconds = time.perf_counter() - started
            yield self._measure_codes("signs of PCA", plain, bits, seconds)
            rotated = fit_itq(x, plain, options.seed)
            yield self._measure_codes("ITQ", rotated, bits, time.perf_counter() - started)
            learned, seconds = self._make_autoencoder(folder, rotated, bits)
            yield self._measure_codes("auto-encoder", learned, bits, seconds)
            yield self._measure_quantisation(library, x, bits)

    def _make_autoencoder(
        self, folder: Path, start: LinearCoder, bits: int
    ) -> tuple[AutoEncoder, float]:
        """Load or train the auto-encoder of a length; also the seconds that its training took."""
        options, base = self._options, self._base
        config = AutoEncoderConfig(
            bits=bits, hidden=options.hidden, steps=options.steps, seed=options.seed
        )
        about = {"features": base.about.to_table(), "recipe": asdict(config)}
        path = folder / f"codes-{bits}.safetensors"
        net = AutoEncoder(base.about.units, config, start, 1.0)
        if (seconds := _load_autoencoder(path, net, about)) is not None:
            return net.eval(), seconds
        started = time.perf_counter()
        with Progress(f"auto-encoder to {bits} bits", total=config.steps, unit="steps") as progress:
            net = train_autoencoder(base.values, base.sound, start, config, progress.advance)
        seconds = round(time.perf_counter() - started, 2)
        state = {f"net/{name}": tensor.contiguous() for name, tensor in net.state_dict().items()}
        state["codes"] = torch.from_numpy(encode(net, base.values))
        with atomic_write(path) as file:
            file.write(save(state, {"about": json.dumps(about), "seconds": str(seconds)}))
        return net, seconds

    def _measure_codes(
        self, method: str, coder: LinearCoder | AutoEncoder, bits: int, train_seconds: float
    ) -> dict[str, Any]:
        codes = encode(coder, self._base.values)[self._rows]
        queries = encode(coder, self._queries)
        index = HammingIndex(codes)
        started = time.perf_counter()
        found = index.find_nearest(queries, min(self.shortlist + 1, len(codes)))[0]
        seconds = time.perf_counter() - started
        return self._make_row(
            method, bits, self._drop_own(self._rows[found]), train_seconds, seconds
        )

    def _measure_quantisation(self, library: Any, x: Tensor, bits: int) -> dict[str, Any]:
        method = "product quantisation"
        why = NO_FAISS
        if library is not None:
            why = f"not measured: {x.shape[1]} features in {bits // 8} parts, {len(x)} images"
        if library is None or x.shape[1] % (bits // 8) or len(x) < 256:
            return {"method": method, "bits": bits, "bytes": bits // 8, "missing": why}
        most = min(self.shortlist + 1, len(self._rows))
        found, *seconds = search_by_quantisation(library, x, self._base, self._queries, bits, most)
        return self._make_row(method, bits, self._drop_own(found), *seconds)

    def _drop_own(self, found: Ids) -> Ids:
        """Remove the query itself from its shortlist, which has one image too many for it."""
        if self._is_own:
            own = found == self.ids[:, None]
            own[~own.any(1), -1] = True
            found = found[~own].reshape(len(found), -1)
        return found[:, : self.shortlist]

    def _make_row(
        self, method: str, bits: int, found: Ids, train_seconds: float, seconds: float
    ) -> dict[str, Any]:
        """Measure a row of the table; `found` is int64 [Q, n], the nearest first."""
        first = found[:, : self._options.k]
        return {
            "method": method,
            "bits": bits,
            "bytes": bits // 8,
            "recall_at_k": compute_recall(self._exact, first),
            "recall_in_shortlist": compute_recall(self._exact, found),
            "precision_at_k": float((self._base.labels[first] == self._labels[:, None]).mean()),
            "queries_s": round(len(self.ids) / seconds, 1),
            "train_s": round(train_seconds, 2),
        }


def compute_recall(exact: Ids, found: Ids) -> float:
    """Return the fraction of the exact neighbors [Q, k] that are among those found [Q, n]."""
    return float((exact[:, :, None] == found[:, None, :]).any(2).mean())


def _load_autoencoder(path: Path, net: AutoEncoder, about: dict[str, Any]) -> float | None:
    """Load a network and its training seconds; None if the file is missing or of another one."""
    with suppress(OSError, SafetensorError, ValueError, KeyError, RuntimeError):
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            if parse_json(facts["about"]) != about:
                return None
            names = [name for name in file.keys() if name.startswith("net/")]  # noqa: SIM118
            net.load_state_dict({name[4:]: file.get_tensor(name) for name in names})
        return float(facts["seconds"])
    return None


def compare_codes(options: CodesOptions, kept: Path, folder: Path) -> dict[str, Any]:
    """Measure all methods and return the content of summary.json.

    Args:
        options: the flags.
        kept: folder of the features.
        folder: folder of the results.

    Raises:
        UsageError: no features, more neighbors than images, or impossible lengths.
        DataError: features of another run, or damaged.
    """
    queries, base = (Features(kept, split) for split in (options.queries, options.base))
    _check(options, queries, base)
    comparison = CodeComparison(options, queries, base)
    rows = list(comparison.measure(folder))
    facts = {
        "k": options.k,
        "shortlist": comparison.shortlist,
        "queries": {"split": options.queries, "pictures": len(comparison.ids)},
        "base": {"split": options.base, "pictures": int(base.sound.sum())},
        "units": base.about.units,
        "threads": cpu_count(),
        "seed": options.seed,
        "rows": rows,
    }
    return write_summary(folder, options.run, base.about, "codes", facts)


def _check(options: CodesOptions, queries: Features, base: Features) -> None:
    """Refuse features that do not belong together, and numbers out of range."""
    one, two = queries.about, base.about
    if (one.checkpoint_sha256, one.data_sha256) != (two.checkpoint_sha256, two.data_sha256):
        raise DataError(f"features {queries.path} and {base.path} are not of one run and data set")
    _check_run(options, base)
    images = int(base.sound.sum()) - (options.queries == options.base)
    require_range("k", options.k, 1, SHORTLIST)
    require_range("asked", options.asked, 1, 10**9)
    require_range("steps", options.steps, 1, 10**9)
    require_range("hidden", options.hidden, 1, 2**16)
    if options.k > min(images, SHORTLIST):
        raise UsageError(
            f"{options.k} neighbours asked for; there are {images:,} images to find, and "
            f"{SHORTLIST} are looked at; ask for fewer with -k"
        )
    most = min(two.units, images, SAMPLE)
    for bits in options.bits:
        if bits % 8 or not 8 <= bits <= most:
            raise UsageError(
                f"--bits {bits}: give multiples of 8 up to {most // 8 * 8} (there are {two.units} "
                f"features and {images:,} images)"
            )
    queries.verify()
    base.verify()


def _check_run(options: CodesOptions, base: Features) -> None:
    """Refuse features of another run, if the run still has their checkpoint to compare with."""
    config = read_run_config(options.run / CONFIG)[0]
    mine = base.about.checkpoint_sha256
    with suppress(OSError, ValueError, KeyError, TypeError, DuetError):
        mine = hash_checkpoint(options.run, config, base.about.checkpoint)
    if mine != base.about.checkpoint_sha256:
        raise DataError(
            f"features {base.path} are of another run than {options.run}, whose checkpoint "
            f"{base.about.checkpoint} differs; {MAKE}"
        )


def _format_table(facts: dict[str, Any]) -> list[str]:
    k = facts["k"]
    lines = [
        f"{describe_search(facts)}; recall: share of the {k} exact neighbours found among the "
        f"first {k}, and among the first {facts['shortlist']}",
        "method                 bits   bytes  recall  in list  precision  queries/s  training",
    ]
    for row in facts["rows"]:
        start = f"{row['method']:<21}{row['bits']:>6,}{row['bytes']:>8,}"
        if "missing" in row:
            lines.append(f"{start}  {row['missing']}")
            continue
        lines.append(
            f"{start}{row['recall_at_k']:8.1%}{row['recall_in_shortlist']:9.1%}"
            f"{row['precision_at_k']:11.1%}{row['queries_s']:11,.0f}{row['train_s']:9,.1f} s"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    prog = "python -m cluster.experiments.neighbors.codes"
    options = parse_options(CodesOptions, argv, prog)
    read_run_config(options.run / CONFIG)
    kept = options.features or options.run / FOLDER
    if not kept.is_dir():
        raise UsageError(f"there are no features in {kept}; {MAKE}")
    folder = ensure_writable(options.run / FOLDER, "the run's folder")
    torch.set_num_threads(cpu_count())
    result = compare_codes(options, kept, folder)
    out = sys.stderr if options.json else sys.stdout
    out.write("\n".join([*_format_table(result["codes"]), f"-> {folder / SUMMARY}"]) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
