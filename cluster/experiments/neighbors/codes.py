"""Short binary codes for images: what section 6.1 of the paper proposes and did not do.

    python -m cluster.experiments.neighbors RUN --data DATA          # makes the features, once
    python -m cluster.experiments.neighbors.codes RUN [--bits 64 128 256] [-k 10] [--json]

"... could be made efficient by training an auto-encoder to compress these vectors to short binary
codes." Trains one for each length on the features of the base alone, and searches by Hamming
distance. Beside it: the exact search, signs of principal components, ITQ, and with faiss installed
product quantisation. Prints and writes, into RUN/neighbours/

    summary.json             the table
    codes-64.safetensors     the codes of the base, and the network that makes them

A length that is there already is not trained again; a call that was killed goes on with the next.

What short codes are measured against: two that are not learned by descent, and faiss's PQ.

Features to bits and back: the auto-encoder that section 6.1 of the paper proposes.

Krizhevsky and Hinton, Using Very Deep Autoencoders for Content-Based Image Retrieval (ESANN 2011),
coded images so; here it codes features. In the forward pass a bit is +1 or -1; backward it counts
as the tanh it was rounded from. No label is used.

Search among binary codes: packed bits, exclusive or, population count.

The same queries by every method: what it finds again, how fast, and in how many bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cluster.experiments.neighbors.__main__ import NAME, write
from cluster.experiments.neighbors.features import (
    FOLDER,
    MAKE,
    Features,
    Flags,
    Ids,
    Rows,
    fingerprint,
    settings,
    stem,
)
from cluster.experiments.neighbors.search import Base, nearest
from pipeline.remote.dataset import parse_size
from pipeline.tools.errors import DataError, DuetError, UsageError, run
from pipeline.tools.files import atomic_write, ensure_writable
from pipeline.tools.progress import Progress

SAMPLE = 20_000
"""Rows that these are fitted to, at most."""
TURNS = 50
"""Of the alternation in `itq` (Gong and Lazebnik 2011 take 50)."""
CHUNK = 8192
"""Rows that are coded at a time."""


@dataclass(frozen=True)
class Linear:
    """A code whose bits are signs of projections."""

    mean: Tensor
    """float32 [units]."""
    axes: Tensor
    """float32 [units, bits]."""

    def bits(self, rows: Rows) -> Flags:
        """The code of rows [n, units], bool [n, bits]."""
        x = torch.from_numpy(rows.astype(np.float32)) - self.mean
        return (x @ self.axes > 0).numpy()


def sample(rows: Rows, sound: Flags, seed: int) -> Tensor:
    """Some sound rows, float32 [n, units]."""
    there = np.flatnonzero(sound)
    rng = np.random.default_rng([seed, 2])
    picked = np.sort(rng.permutation(there)[:SAMPLE])
    return torch.from_numpy(rows[picked].astype(np.float32))


def pca(x: Tensor, bits: int, seed: int) -> Linear:
    """Signs of the first principal components.

    Args:
        x: float32 [n, units].
        bits: how many components, at most min(n, units).
        seed: of the randomised decomposition (Halko, Martinsson and Tropp 2011).
    """
    mean = x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        more = min(bits + 32, *x.shape)
        axes = torch.pca_lowrank(x - mean, q=more, center=False, niter=6)[2]
    return Linear(mean, axes[:, :bits].contiguous())


def itq(x: Tensor, start: Linear, seed: int) -> Linear:
    """Iterative quantisation: the same components, turned until signs lose least.

    Gong and Lazebnik, Iterative Quantization: A Procrustean Approach to Learning Binary Codes
    (CVPR 2011).
    """
    v = (x - start.mean) @ start.axes
    generator = torch.Generator().manual_seed(seed)
    bits = v.shape[1]
    turn = torch.linalg.qr(torch.randn(bits, bits, generator=generator))[0]
    for _ in range(TURNS):
        signs = (v @ turn).sign()
        left, _, right = torch.linalg.svd(signs.T @ v)
        turn = (left @ right).T
    return Linear(start.mean, start.axes @ turn)


def faiss() -> Any:
    """The library, or None where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


@dataclass(frozen=True)
class Quantised:
    """What product quantisation finds."""

    ids: Ids
    """int64 [Q, k]: places among the rows it was given."""
    train_seconds: float
    search_seconds: float


def product_quantisation(
    library: Any, x: Tensor, rows: Rows, sound: Flags, queries: Rows, bits: int, k: int
) -> Quantised:
    """Search by faiss's IndexPQ: bits / 8 parts of the features, 256 centres each.

    Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search (PAMI 2011); the
    distance is asymmetric, so the query itself is not rounded.

    Args:
        library: `faiss()`.
        x: float32 [n, units], what the centres are fitted to.
        rows: the base, floats [N, units].
        sound: [N], rows that are searched.
        queries: floats [Q, units].
        bits: of a code; units must be a multiple of bits / 8.
        k: neighbours.
    """
    index = library.IndexPQ(x.shape[1], bits // 8, 8)
    index.pq.cp.min_points_per_centroid = 1  # a small base is no reason for a warning a part
    started = time.perf_counter()
    index.train(x.numpy())
    trained = time.perf_counter() - started
    there = np.flatnonzero(sound)
    for start in range(0, len(there), CHUNK):
        index.add(rows[there[start : start + CHUNK]].astype(np.float32))
    asked: npt.NDArray[np.float32] = queries.astype(np.float32)
    started = time.perf_counter()
    _, found = index.search(asked, k)
    return Quantised(there[found], trained, time.perf_counter() - started)


Tell = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an auto-encoder is trained."""

    bits: int
    hidden: int = 512
    """Units between features and bits, and between bits and features."""
    steps: int = 600
    batch: int = 256
    lr: float = 3e-4
    """First rate of Adam; it falls to 0 along half a cosine. Faster or longer, codes of 5,000
    images come to fit these alone and find fewer neighbours of others than ITQ does."""
    seed: int = 0

    def table(self) -> dict[str, float]:
        """Return it as JSON has it."""
        return asdict(self)


class AutoEncoder(nn.Module):
    """features -> hidden -> bits -> hidden -> features.

    Args:
        units: features.
        recipe: sizes.
        start: a linear code of as many bits; the network begins as that one, plus what it learns.
        scale: what features are divided by.
    """

    def __init__(self, units: int, recipe: Recipe, start: Linear, scale: float) -> None:
        super().__init__()
        self.mean = nn.Buffer(start.mean.clone())
        self.scale = nn.Buffer(torch.tensor(scale))
        bits, hidden = recipe.bits, recipe.hidden
        self.straight = nn.Linear(units, bits, bias=False)
        self.into = nn.Linear(units, hidden)
        self.code = nn.Linear(hidden, bits)
        self.level = nn.BatchNorm1d(bits, affine=False)
        self.out = nn.Linear(bits, hidden)
        self.back = nn.Linear(hidden, units)
        with torch.no_grad():
            self.straight.weight.copy_(start.axes.T)
            self.code.weight.zero_()
            self.code.bias.zero_()

    def logits(self, rows: Tensor) -> Tensor:
        """What the bits are the signs of, float [n, bits], of features [n, units]."""
        x = (rows - self.mean) / self.scale
        return self.level(self.straight(x) + self.code(F.relu(self.into(x))))

    def forward(self, rows: Tensor) -> Tensor:
        """Mean squared error of the features made from the bits, in those of their deviation."""
        soft = torch.tanh(self.logits(rows))
        bits = soft + (torch.where(soft > 0, 1.0, -1.0) - soft).detach()
        made = self.back(F.relu(self.out(bits)))
        return F.mse_loss(made, (rows - self.mean) / self.scale)

    @torch.no_grad()
    def bits(self, rows: Rows) -> Flags:
        """The code of rows [n, units], bool [n, bits]; the network must be in evaluation mode."""
        found = [
            self.logits(torch.from_numpy(rows[start : start + CHUNK].astype(np.float32))) > 0
            for start in range(0, len(rows), CHUNK)
        ]
        return torch.cat(found).numpy()


def trained(rows: Rows, sound: Flags, start: Linear, recipe: Recipe, tell: Tell) -> AutoEncoder:
    """Train an auto-encoder on features; two calls give the same one.

    Args:
        rows: floats [N, units].
        sound: [N], rows that count.
        start: a linear code to begin with.
        recipe: of the training.
        tell: called with 1 after each step.
    """
    there = np.flatnonzero(sound)
    rng = np.random.default_rng([recipe.seed, 3])
    some = torch.from_numpy(rows[np.sort(rng.permutation(there)[:4096])].astype(np.float32))
    scale = max(float((some - start.mean).square().mean().sqrt()), 1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = AutoEncoder(rows.shape[1], recipe, start, scale)
    optimiser = torch.optim.Adam(net.parameters(), recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    size = min(recipe.batch, len(there))
    order = there[:0]
    for _ in range(recipe.steps):
        if len(order) < size:
            order = np.concatenate((order, rng.permutation(there)))
        picked, order = np.sort(order[:size]), order[size:]
        loss = net(torch.from_numpy(rows[picked].astype(np.float32)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        tell(1)
    return net.eval()


Codes = npt.NDArray[np.uint8]
WORD = 8
"""Bytes that are compared at a time."""


def pack(bits: Flags) -> Codes:
    """Bits [n, b] as bytes, uint8 [n, b / 8], the first bit highest."""
    return np.packbits(bits, axis=1)


class Hamming:
    """The codes of a base, ready to be searched; each keeps its bytes, up to a multiple of 8."""

    def __init__(self, codes: Codes) -> None:
        """Take codes, uint8 [N, bytes]."""
        self._words = _words(codes).T.copy()  # [words, N]: a word of all codes lies together

    def nearest(self, queries: Codes, k: int) -> tuple[Ids, Ids]:
        """Find the k nearest codes for every query, the nearest first; ties go to the earlier one.

        Args:
            queries: uint8 [Q, bytes].
            k: 1..N.

        Returns:
            int64 [Q, k] places in the base, and int64 [Q, k] distances in bits.
        """
        words = _words(queries)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = list(threads.map(lambda query: self._one(query, k), words))
        return np.stack([ids for ids, _ in found]), np.stack([far for _, far in found])

    def _one(self, query: npt.NDArray[np.uint64], k: int) -> tuple[Ids, Ids]:
        far = np.bitwise_count(self._words[0] ^ query[0]).astype(np.uint16)
        for word, own in zip(self._words[1:], query[1:], strict=True):
            far += np.bitwise_count(word ^ own)
        limit = np.searchsorted(np.cumsum(np.bincount(far)), k)
        near = np.flatnonzero(far <= limit)
        ids = near[np.argsort(far[near], kind="stable")][:k]
        return ids, far[ids].astype(np.int64)


def _words(codes: Codes) -> npt.NDArray[np.uint64]:
    """Codes as words of 64 bits, filled up with zeros: uint64 [n, words]."""
    count, size = codes.shape
    filled = np.zeros((count, -(-size // WORD) * WORD), np.uint8)
    filled[:, :size] = codes
    return filled.view(np.uint64)


SHORTLIST = 100
"""Images by code among which the exact neighbours are looked for, too."""
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
    """Split whose images are looked for."""
    base: str = "train"
    """Split that is coded and searched."""
    asked: int = 1000
    """Most queries, drawn at random."""
    features: Path | None = None
    """Folder of the features; default: RUN/neighbours."""
    hidden: int = Recipe.hidden
    """Units of the auto-encoder's hidden layers."""
    steps: int = Recipe.steps
    """Of training, 256 images each."""
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
        x = sample(base.values, base.sound, options.seed)
        library = faiss()
        for bits in options.bits:
            started = time.perf_counter()
            plain = pca(x, bits, options.seed)
            seconds = time.perf_counter() - started
            yield self._by_bits("signs of PCA", plain, bits, seconds)
            turned = itq(x, plain, options.seed)
            yield self._by_bits("ITQ", turned, bits, time.perf_counter() - started)
            found, seconds = self._learned(folder, turned, bits)
            yield self._by_bits("auto-encoder", found, bits, seconds)
            yield self._product(library, x, bits)

    def _learned(self, folder: Path, start: Linear, bits: int) -> tuple[AutoEncoder, float]:
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
        with atomic_write(path) as file:
            file.write(save(state, {"about": json.dumps(about), "seconds": str(seconds)}))
        return made, seconds

    def _by_bits(
        self, method: str, coder: Linear | AutoEncoder, bits: int, seconds: float
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
            why = f"not measured: {x.shape[1]} features in {bits // 8} parts, {len(x)} images"
            return row | {"missing": why}
        most = min(self.shortlist + 1, len(self._there))
        base = self._base
        found = product_quantisation(library, x, base.values, base.sound, self._queries, bits, most)
        return self._row(
            "product quantisation", bits, found.ids, found.train_seconds, found.search_seconds
        )

    def _row(
        self, method: str, bits: int, found: Ids, seconds: float, took: float
    ) -> dict[str, Any]:
        """A row of the table; `found` has one image too many, for the query may be among them."""
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


def _bits(coder: Linear | AutoEncoder, rows: Rows) -> Flags:
    """The bits of many rows, mapped or not, bool [n, bits]."""
    parts = [coder.bits(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
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


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = tyro.cli(Options, args=argv, prog="python -m cluster.experiments.neighbors.codes")
    settings(options.run)
    kept = options.features or options.run / FOLDER
    if not kept.is_dir():
        raise UsageError(f"there are no features in {kept}; {MAKE}")
    folder = ensure_writable(options.run / FOLDER, "the run's folder")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = codes(options, kept, folder)
    out = sys.stderr if options.json else sys.stdout
    out.write("\n".join([*_lines(result["codes"]), f"-> {folder / NAME}"]) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def codes(options: Options, kept: Path, folder: Path) -> dict[str, Any]:
    """Do it all and return what is in summary.json.

    Args:
        options: the flags.
        kept: folder of the features.
        folder: for the results.

    Raises:
        UsageError: no features, more neighbours than images, or lengths that cannot be.
        DataError: features of another run, or damaged.
    """
    asked, base = (Features(stem(kept, split)) for split in (options.queries, options.base))
    _check(options, asked, base)
    trial = Trial(options, asked, base)
    rows = list(trial.rows(folder))
    facts = {
        "k": options.k,
        "shortlist": trial.shortlist,
        "queries": {"split": options.queries, "pictures": len(trial.ids)},
        "base": {"split": options.base, "pictures": int(base.sound.sum())},
        "units": base.about.units,
        "threads": len(os.sched_getaffinity(0)),
        "seed": options.seed,
        "rows": rows,
    }
    return write(folder, options.run, base.about, "codes", facts)


def _check(options: Options, asked: Features, base: Features) -> None:
    """Refuse features that do not go together, and numbers out of range.

    Raises:
        UsageError, DataError: see `codes`.
    """
    one, two = asked.about, base.about
    if one.checkpoint_sha256 != two.checkpoint_sha256 or one.data_sha256 != two.data_sha256:
        raise DataError(f"features {asked.path} and {base.path} are not of one run and data set")
    _of_this_run(options, base)
    there = int(base.sound.sum()) - (options.queries == options.base)
    for name, value in (("-k", options.k), ("--asked", options.asked), ("--steps", options.steps),
                        ("--hidden", options.hidden)):  # fmt: skip
        if value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    if options.k > min(there, SHORTLIST):
        raise UsageError(
            f"{options.k} neighbours asked for; there are {there:,} images to find, and "
            f"{SHORTLIST} are looked at; ask for fewer with -k"
        )
    most = min(two.units, there, SAMPLE)
    for bits in options.bits:
        if bits % 8 or not 8 <= bits <= most:
            raise UsageError(
                f"--bits {bits}: give multiples of 8 up to {most // 8 * 8} (there are {two.units} "
                f"features and {there:,} images)"
            )
    asked.verify()
    base.verify()


def _of_this_run(options: Options, base: Features) -> None:
    """Refuse features of another run, as far as the run still has the checkpoint to tell."""
    config = settings(options.run)[0]
    mine = base.about.checkpoint_sha256
    with suppress(OSError, ValueError, KeyError, TypeError, DuetError):
        mine = fingerprint(options.run, config, base.about.checkpoint)
    if mine != base.about.checkpoint_sha256:
        raise DataError(
            f"features {base.path} are of another run than {options.run}, whose checkpoint "
            f"{base.about.checkpoint} differs; {MAKE}"
        )


def _lines(facts: dict[str, Any]) -> list[str]:
    k, queries, base = facts["k"], facts["queries"], facts["base"]
    lines = [
        f"{queries['pictures']:,} images of {queries['split']} among {base['pictures']:,} of "
        f"{base['split']}; recall: share of the {k} exact neighbours found among the first {k}, "
        f"and among the first {facts['shortlist']}",
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


if __name__ == "__main__":
    run(main)
