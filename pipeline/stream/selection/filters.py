"""Filters, drawn parts and weights: from the settings of a stream to its `Selection`.

where      labels, classes, keys, names, sizes, columns of a table by key, or a mask
split_by   parts drawn from the stored training split
weights    draws with replacement instead of epochs without
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.index import sample_key
from pipeline.stream.augment import random_uint64, to_unit
from pipeline.stream.config import StreamConfig
from pipeline.stream.mixture import MixedReader
from pipeline.stream.order import (
    Ids,
    Weights,
)
from pipeline.stream.selection.record import Selection
from pipeline.stream.shard_reader import Flags, ShardReader
from pipeline.tools.errors import UsageError
from pipeline.tools.tables import read_table, refuse_masked

SHADOWS = ("label", "class", "height", "width")
"""Names that a column of a table would share with what is known of each image."""
AT_ONCE = 1 << 15
"""Samples whose part is drawn together: their numbers stay in the cache of a CPU."""
JOINS = ("id", "key", "name")
"""Columns of a table by which its rows are those of samples; the first that it has counts."""


def select(
    config: StreamConfig,
    reader: ShardReader | MixedReader,
    identities: Sequence[str],
    shares: Sequence[float],
) -> Selection:
    """Return the samples that a config names, among those of a reader.

    Args:
        config: its `where`, `table`, `split_by` and `weights`.
        reader: of one dataset, or of several.
        identities: of the datasets.
        shares: of the datasets.

    Raises:
        UsageError: a class, key or column that does not exist, a mask or weights of another length,
            nothing that is left, or nothing that has a weight; one line says which.
    """
    samples = _Samples(reader, config)
    kept = None if config.where is None else samples.apply(config.where)
    if kept is not None and not kept.any():
        raise UsageError(
            f"where={_shorten(config.where)} leaves none of the {samples.count:,} samples of split "
            f"{config.stored_split!r}; describe lists classes and their samples"
        )
    if config.split_by is not None:
        part = samples.draw_part(config.split_by, config.split)
        kept = part if kept is None else kept & part
        if not kept.any():
            raise UsageError(
                f"split_by={dict(config.split_by)} leaves no sample to {config.split!r}; "
                "give it a larger share"
            )
    weights = None if config.weights is None else samples.weigh(config.weights, kept)
    shards = tuple(tuple(shard.samples for shard in part.shards) for part in reader.parts)
    segments = config.segments if len(shards) > 1 else ()
    for segment, sizes in zip(segments, shards, strict=bool(segments)):
        if segment.samples != sum(sizes):
            raise UsageError(
                f"version {segment.version[:12]} has {sum(sizes):,} samples in split "
                f"{config.split!r}, and its segment {segment.samples:,}; name those of this split"
            )
    selection = Selection(
        identities=tuple(identities),
        shards=shards,
        shares=tuple(shares),
        kept=kept if kept is not None and not kept.all() else None,
        weights=weights,
        segments=segments,
    )
    settings = {"where": config.where, "split_by": config.split_by}
    _check_parts(selection, " and ".join(one for one in settings if settings[one] is not None))
    return selection


def _check_parts(selection: Selection, kept_by: str) -> None:
    """Refuse a dataset of a mixture of which nothing is left, or nothing has a weight."""
    start = 0
    for number, sizes in enumerate(selection.shards):
        here = slice(start, start + sum(sizes))
        start = here.stop
        for name, flags in ((kept_by, selection.kept), ("weights", selection.weights)):
            if flags is not None and not flags[here].any():
                raise UsageError(
                    f"{name} leaves nothing of dataset {number + 1} of the mixture; leave it out"
                )


class _Samples:
    """The samples of a split, by id, and what is known of them."""

    def __init__(self, reader: ShardReader | MixedReader, config: StreamConfig) -> None:
        self.count = len(reader)
        self._reader = reader
        self._config = config

    @functools.cached_property
    def labels(self) -> Ids:
        """int64 [N]: labels."""
        return self._reader.read_labels(np.arange(self.count))

    @functools.cached_property
    def _names(self) -> list[str]:
        """Original file name of each sample."""
        names = self._reader.read_names(np.arange(self.count))
        if names is None:
            raise UsageError(
                "this set has no names of images: it was packed before there were any, or by "
                "another tool; find samples by 'key' or 'id'"
            )
        return names

    def apply(self, where: Mapping[str, Any] | Flags) -> Flags:
        """Return which samples pass a filter, bool [N]."""
        if not isinstance(where, Mapping):
            refuse_masked("where", where)
            mask = np.array(where)  # a copy: what the caller does to his own does not matter
            if mask.dtype != bool:
                raise UsageError(f"where is an array of {mask.dtype}; a mask is of true and false")
            self._check_length("where", mask)
            return mask
        kept = np.ones(self.count, bool)
        for name, wanted in where.items():
            kept &= self._match(name, wanted)
        return kept

    def draw_part(self, shares: Mapping[str, float], part: str) -> Flags:
        """Return which samples a part of the split gets, bool [N].

        The number that decides follows from `split_seed` and the sample alone, or with `group` from
        its value in that column.
        """
        ids = np.arange(self.count)
        if self._config.group is not None:
            values = self._find_column(self._config.group).astype(str)
            known, ids = np.unique(values, return_inverse=True)
            digests = [hashlib.sha256(str(one).encode()).digest()[:7] for one in known]
            ids = np.array([int.from_bytes(one, "little") for one in digests], np.int64)[ids]
        ends = np.cumsum([0, *shares.values()]) / sum(shares.values())
        number = list(shares).index(part)
        low, high = ends[number], ends[number + 1] if number + 1 < len(shares) else 1.0
        flags = np.empty(self.count, bool)
        for start in range(0, self.count, AT_ONCE):
            here = slice(start, start + AT_ONCE)
            epochs, seed = np.zeros_like(ids[here]), self._config.split_seed
            (words,) = random_uint64(seed, epochs, ids[here], 1, name="split_by")
            drawn = to_unit(words)
            flags[here] = (drawn >= low) & (drawn < high)
        return flags

    def weigh(self, weights: str | npt.ArrayLike, kept: Flags | None) -> Weights:
        """Return the weight of each sample, float64 [N]; 0 for one that is not kept."""
        kept = np.ones(self.count, bool) if kept is None else kept
        if isinstance(weights, str):  # balanced
            found = self._balance(kept)
        else:
            refuse_masked("weights", weights)
            found = _to_numbers(weights)
            self._check_length("weights", found)
        wrong = np.flatnonzero(~((found >= 0) & np.isfinite(found)))
        if len(wrong):
            sample = int(wrong[0])
            raise UsageError(
                f"weights has {found[sample]} for sample {sample}; it takes finite numbers, "
                "0 or more"
            )
        found = np.where(kept, found, 0.0)
        if not found.any():
            raise UsageError("weights sum to 0: no sample could be drawn; give one a weight")
        shares: Weights = found / found.max()
        return shares

    def _balance(self, kept: Flags) -> Weights:
        """Return weights by which the classes of each dataset are equally likely, float64 [N]."""
        found, classes = np.empty(self.count), len(self._reader.manifest.classes)
        if not classes:
            raise UsageError(
                "weights='balanced' needs classes, and this set has none; give numbers"
            )
        there: list[Flags] = []
        for _, here in self._list_parts():
            labels = self.labels[here]
            counts = np.bincount(labels[kept[here]], minlength=classes)
            found[here] = 1 / np.maximum(counts, 1)[labels]
            there.append(counts > 0)
            if (lacking := np.flatnonzero(there[0] != there[-1])).size:
                name = self._reader.manifest.classes[lacking[0]]
                raise UsageError(
                    f"weights='balanced' cannot balance class {name!r}: not every dataset of the "
                    "mixture has images of it; give weights as numbers"
                )
        return found

    def _list_parts(self) -> Iterator[tuple[ShardReader, slice]]:
        """Yield the reader of each dataset, and its part of the ids."""
        start = 0
        for reader in self._reader.parts:
            yield reader, slice(start, start + len(reader))
            start += len(reader)

    def _check_length(self, name: str, array: npt.NDArray[Any]) -> None:
        if array.shape != (self.count,):
            shape = "x".join(map(str, array.shape)) or "one"
            raise UsageError(
                f"{name} has {shape} values, and split {self._config.stored_split!r} "
                f"{self.count:,} samples; it takes one for each, in stored order"
            )

    def _match(self, name: str, wanted: Any) -> Flags:
        """Return which samples have one of the wanted values, bool [N]."""
        if name in SHADOWS and self._config.table is not None and name in self._table:
            raise UsageError(
                f"where[{name!r}] may mean what this set knows of its images, or the column of "
                f"table {self._config.table}; rename the column"
            )
        if name == "class" and not callable(wanted):
            table = np.zeros(len(self._reader.manifest.classes), bool)
            table[[self._find_class(one) for one in _as_list(wanted)]] = True
            return table[self.labels]
        if name == "key" and not callable(wanted):
            flags, patterns = np.empty(self.count, bool), [str(one) for one in _as_list(wanted)]
            unseen = set(patterns)
            for part, here in self._list_parts():
                flags[here], matched = match_keys(part, patterns)
                unseen -= matched
            self._check_found(name, patterns, unseen)
            return flags
        if name == "name" and not callable(wanted):
            patterns = [str(one) for one in _as_list(wanted)]
            flags, matched = _match_texts(self._names, patterns)
            self._check_found(name, patterns, set(patterns) - matched)
            return flags
        column = self._find_column(name)
        if callable(wanted):
            return self._ask(name, wanted, column)
        values = np.array(_as_list(wanted))
        flags = np.isin(column, values)
        unseen = set(values.tolist()).difference(np.unique(column[flags]).tolist())
        self._check_found(name, values.tolist(), unseen)
        return flags

    def _check_found(self, name: str, wanted: Iterable[Any], unseen: set[Any]) -> None:
        """Refuse a condition of which a value stands for no sample: most likely it is misspelt."""
        if unseen:
            first = next(one for one in wanted if one in unseen)
            raise UsageError(
                f"where[{name!r}] has {first!r:.100}, and no sample of split "
                f"{self._config.stored_split!r} has it; leave it out"
            )

    def _ask(self, name: str, wanted: Callable[[Any], Any], column: npt.NDArray[Any]) -> Flags:
        found = np.asarray(wanted(column))
        if found.dtype != bool or found.shape != column.shape:
            raise UsageError(
                f"the function of where[{name!r}] returns {found.dtype} {list(found.shape)}; it "
                f"takes a column of {len(column):,} values and returns true or false for each"
            )
        return found

    def _find_class(self, name: str) -> int:
        """Return the label of a class, by its name or its readable title."""
        manifest = self._reader.manifest
        if not manifest.classes:
            raise UsageError(f"{name!r} is no class: this set has none")
        for names in (manifest.classes, manifest.titles or ()):
            if name in names:
                return names.index(name)
        near = difflib.get_close_matches(str(name), [*manifest.classes, *(manifest.titles or ())])
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "describe lists them"
        raise UsageError(
            f"class {name!r} is none of the {len(manifest.classes)} of this set; {hint}"
        )

    def _find_column(self, name: str) -> npt.NDArray[Any]:
        """Return what is known by a name, or a column of the table, one value a sample: [N]."""
        if name == "label":
            return self.labels
        if name == "id":
            return np.arange(self.count)
        if name == "class":
            return np.array(self._reader.manifest.classes)[self.labels]
        if name == "key":
            return np.array(self._reader.read_keys(np.arange(self.count)))
        if name == "name":
            return np.array(self._names)
        if name in ("height", "width"):
            return self._reader.read_sizes(np.arange(self.count))[name == "width"]
        if self._config.table is None:
            raise UsageError(
                f"{name!r} is no id, label, class, key, name or size: name the table that has "
                "this column (table='FILE.csv')"
            )
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table)
            there = ", ".join(map(repr, near or self._table))
            raise UsageError(f"table {self._config.table} has no column {name!r}; it has {there}")
        return self._table[name][self._rows]

    @functools.cached_property
    def _table(self) -> dict[str, npt.NDArray[Any]]:
        assert self._config.table is not None
        group = self._config.group
        return read_table(Path(self._config.table), texts=(group,) if group else ())

    @functools.cached_property
    def _rows(self) -> Ids:
        """int64 [N]: row of the table for each sample."""
        table, path = self._table, self._config.table
        join = next((name for name in JOINS if name in table), None)
        if join is None:
            raise UsageError(
                f"table {path} has no column 'id', 'key' or 'name' to find a sample by; it has "
                f"{', '.join(map(repr, table))}"
            )
        keys, ids = table[join], np.arange(self.count)
        if join == "id":
            wanted = ids
        else:
            wanted = np.array(self._reader.read_keys(ids) if join == "key" else self._names)
        for whose, texts in ((f"table {path}", keys), ("the mixture", wanted)):
            known, counts = np.unique(texts, return_counts=True)
            if len(known) < len(texts):
                twice = known[counts.argmax()]
                raise UsageError(
                    f"{whose} has {join} {twice} more than once, so that a row is not that of one "
                    "sample; a column 'id' counts samples from 0"
                )
        order = np.argsort(keys, kind="stable")
        at = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
        rows: Ids = order[at]
        missing = np.flatnonzero(keys[rows] != wanted)
        if len(missing):
            raise UsageError(
                f"table {path} has no row for {len(missing):,} of the {self.count:,} samples, the "
                f"first with {join} {wanted[missing[0]]}; add them, or give a mask"
            )
        return rows


def match_keys(reader: ShardReader, patterns: Sequence[str]) -> tuple[Flags, set[str]]:
    """Return which samples of a split have a key that one of the patterns matches, bool [N].

    Also those patterns which match a key.

    Patterns are those of `fnmatch`: `*`, `?`, `[seq]`. The keys of our own shards, `SHARD_PLACE`,
    are never all written out: a pattern is cut at each of its tokens that may be the `_`.
    """
    sizes = np.array([shard.samples for shard in reader.shards])
    found = np.zeros(int(sizes.sum()), bool)
    if reader.manifest.foreign:
        return _match_texts(reader.read_keys(np.arange(len(found))), patterns)
    starts, most = np.cumsum(sizes) - sizes, int(sizes.max())
    numbers = {sample_key(number, 0).partition("_")[0]: number for number in range(len(sizes))}
    places = {sample_key(0, place).partition("_")[2]: place for place in range(most)}
    matched: set[str] = set()
    for one in patterns:
        if not re.search("[*?[]", one):
            name, _, last = one.partition("_")
            shard, place = numbers.get(name, -1), places.get(last, most)
            if shard >= 0 and place < sizes[shard]:
                found[starts[shard] + place] = True
                matched.add(one)
            continue
        for token in re.finditer(r"\[!?\]?[^]]*\]|.", one):
            if not fnmatch.fnmatchcase("_", token.group()):
                continue
            rest = "*" if token.group() == "*" else ""
            left, right = one[: token.start()] + rest, rest + one[token.end() :]
            shards = np.flatnonzero([fnmatch.fnmatchcase(name, left) for name in numbers])
            within = np.array([fnmatch.fnmatchcase(name, right) for name in places])
            for shard in shards.tolist() if within.any() else ():
                here = slice(starts[shard], starts[shard] + sizes[shard])
                if within[: sizes[shard]].any():
                    found[here] |= within[: sizes[shard]]
                    matched.add(one)
    return found, matched


def _match_texts(texts: Sequence[str], patterns: Sequence[str]) -> tuple[Flags, set[str]]:
    """Return which texts one of the patterns of `fnmatch` matches, bool [n], and which do match."""
    found, matched = np.zeros(len(texts), bool), set()
    for one in patterns:
        match = re.compile(fnmatch.translate(one)).match
        flags = np.array([match(text) is not None for text in texts], bool)
        found |= flags
        matched |= {one} if flags.any() else set()
    return found, matched


def _to_numbers(weights: Any) -> Weights:
    """Return weights as an array of their own, float64."""
    given = weights.detach().cpu() if hasattr(weights, "detach") else weights  # a tensor
    try:
        found = np.asarray(given)
    except ValueError as error:  # rows of unequal lengths
        raise UsageError(f"weights is no array of numbers ({error})") from error
    if found.dtype.kind not in "biuf":
        raise UsageError(f"weights is an array of {found.dtype}; it takes numbers, 0 or more")
    return found.astype(np.float64)


def _as_list(wanted: Any) -> list[Any]:
    if getattr(wanted, "ndim", None) == 0:  # one value, as an array or a tensor
        return [wanted.item()]
    return [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)


def _shorten(where: Any) -> str:
    return repr(where) if isinstance(where, Mapping) else "the mask"
