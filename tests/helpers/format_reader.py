"""A reader of sealed data sets after docs/format.md alone: no code of the packages.

NumPy holds arrays and reads `.npy`; its random generators are spelled out here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

WORD, DOUBLE, QUAD = 2**32 - 1, 2**64 - 1, 2**128 - 1


class Generator:
    """G(k1, k2, ...) of the page: SeedSequence, PCG64, numbers of parts, shuffle."""

    def __init__(self, *keys: int) -> None:
        entropy: list[int] = []
        for key in keys:
            entropy.append(key & WORD)
            while key := key >> 32:
                entropy.append(key & WORD)
        hashed = 0x43B0D7E5

        def mixin(value: int) -> int:
            nonlocal hashed
            value ^= hashed
            hashed = hashed * 0x931E8875 & WORD
            value = value * hashed & WORD
            return value ^ value >> 16

        def mix(x: int, y: int) -> int:
            value = (0xCA01F9DD * x - 0x4973F715 * y) & WORD
            return value ^ value >> 16

        pool = [mixin(entropy[i] if i < len(entropy) else 0) for i in range(4)]
        for source in range(4):
            for place in range(4):
                if place != source:
                    pool[place] = mix(pool[place], mixin(pool[source]))
        for word in entropy[4:]:
            pool = [mix(one, mixin(word)) for one in pool]
        words, hashed = [], 0x8B51F9DD
        for i in range(8):
            value = pool[i % 4] ^ hashed
            hashed = hashed * 0x58F38DED & WORD
            value = value * hashed & WORD
            words.append(value ^ value >> 16)
        w0, w1, w2, w3 = (words[2 * i] | words[2 * i + 1] << 32 for i in range(4))
        self.increment = 2 * (w2 << 64 | w3) + 1 & QUAD
        self.state = self.increment + (w0 << 64 | w1) & QUAD
        self._step()
        self._halves: list[int] = []
        self._quarters: list[int] = []

    def _step(self) -> None:
        factor = 0x2360ED051FC65DA44385DF649FCCF645
        self.state = self.state * factor + self.increment & QUAD

    def word64(self) -> int:
        self._step()
        value, turn = self.state >> 64 ^ self.state & DOUBLE, self.state >> 122
        return (value >> turn | value << (64 - turn)) & DOUBLE

    def word32(self) -> int:
        if not self._halves:
            word = self.word64()
            self._halves = [word & WORD, word >> 32]
        return self._halves.pop(0)

    def word16(self) -> int:
        if not self._quarters:
            word = self.word32()
            self._quarters = [word & 0xFFFF, word >> 16]
        return self._quarters.pop(0)

    def part(self, parts: int) -> int:
        while True:
            product = self.word16() * parts
            if product % 2**16 >= 2**16 % parts:
                return product >> 16

    def shuffle(self, items: list[int]) -> list[int]:
        for i in range(len(items) - 1, 0, -1):
            j = i + 1
            while j > i:
                j = self.word32() % 2 ** i.bit_length()
            items[i], items[j] = items[j], items[i]
        return items


@lru_cache(maxsize=64)
def full_epoch(samples: int, seed: int, epoch: int, part: int = 2**21) -> list[int]:
    """Ids of an epoch of the shuffle `full`."""
    parts = 1 + samples // part
    if parts == 1:
        return Generator(seed, epoch).shuffle(list(range(samples)))
    generator = Generator(seed, epoch)
    drawn = [generator.part(parts) for _ in range(samples)]
    return [
        sample
        for k in range(parts)
        for sample in Generator(seed, epoch, k + 1).shuffle(
            [sample for sample in range(samples) if drawn[sample] == k]
        )
    ]


def block_windows(shards: list[int], seed: int, epoch: int, window: int) -> list[list[int]]:
    """Ids of each window of an epoch of the shuffle `block`."""
    order = Generator(seed, epoch).shuffle(list(range(len(shards))))
    windows = []
    for k, start in enumerate(range(0, len(order), window)):
        ids = [
            sample
            for shard in order[start : start + window]
            for sample in range(sum(shards[:shard]), sum(shards[: shard + 1]))
        ]
        windows.append(Generator(seed, epoch, k + 1).shuffle(ids))
    return windows


def word(seed: int, epoch: int, sample: int, k: int, name: str = "") -> int:
    """Word k of a sample's draws, or of those of a name."""

    def mix(v: int) -> int:
        v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9 & DOUBLE
        v = (v ^ v >> 27) * 0x94D049BB133111EB & DOUBLE
        return v ^ v >> 31

    golden = 0x9E3779B97F4A7C15
    state = mix(mix(mix(seed + golden & DOUBLE) + epoch & DOUBLE) + sample & DOUBLE)
    if name:
        digest = hashlib.sha256(name.encode()).digest()
        state = mix(state + int.from_bytes(digest[:8], "little") & DOUBLE)
    return mix(state + (k + 1) * golden & DOUBLE)


def unit(seed: int, name: str, epoch: int, sample: int) -> float:
    """u(name; epoch, sample) of the page."""
    return (word(seed, epoch, sample, 0, name) >> 11) / 2**53


def part_of(seed: int, sample: int, shares: dict[str, float]) -> str:
    """Part of a split that a sample is in."""
    drawn, total, names = unit(seed, "split_by", 0, sample), 0.0, list(shares)
    for name in names:
        total += shares[name]
        if drawn < total / sum(shares.values()):
            return name
    return names[-1]


def weighted_id(seed: int, position: int, weights: list[float]) -> int:
    """Id that a position of a weighted stream has."""
    shares = [weight / max(weights) for weight in weights]
    sums = list(itertools.accumulate(shares))
    drawn = unit(seed, "weights", position, 0) * sums[-1]
    return next(sample for sample, total in enumerate(sums) if total > drawn)


def mixture_ids(seed: int, sizes: list[int], shares: list[str], position: int) -> list[int]:
    """Ids of a mixture of `full` shuffles before a position; shares are decimals as text."""
    exact = [Fraction(share) for share in shares]
    ends = [total / sum(exact) for total in itertools.accumulate(exact)]

    def before(block: int) -> list[int]:
        counts = [0, *(int(1000 * block * end) for end in ends)]
        return [b - a for a, b in itertools.pairwise(counts)]

    seeds = [seed, *(word(seed, k, 0, 0, "mixture") >> 1 for k in range(1, len(sizes)))]
    firsts = [0, *itertools.accumulate(sizes)]
    had, ids = [0] * len(sizes), []
    for block in range(-(-position // 1000)):
        counts = [b - a for a, b in zip(before(block), before(block + 1), strict=True)]
        listed = [k for k, count in enumerate(counts) for _ in range(count)]
        for k in Generator(seed, block, len(sizes)).shuffle(listed):
            epoch, place = divmod(had[k], sizes[k])
            ids.append(firsts[k] + full_epoch(sizes[k], seeds[k], epoch)[place])
            had[k] += 1
    return ids[:position]


def crop_of(seed: int, epoch: int, sample: int) -> tuple[int, int, bool]:
    """Left and upper edge of a sample's crop, and whether it is mirrored."""
    left, top = ((word(seed, epoch, sample, k) >> 32) * 33 >> 32 for k in (0, 1))
    return left, top, bool(word(seed, epoch, sample, 2) >> 63)


def color_of(seed: int, epoch: int, sample: int) -> list[float]:
    """The three color draws of a sample."""
    numbers = []
    for k in (3, 5):
        u, v = (word(seed, epoch, sample, place) >> 11 for place in (k, k + 1))
        a, b = math.sqrt(-2 * math.log((u + 0.5) / 2**53)), 2 * math.pi * v / 2**53
        numbers += [round(a * f(b) * 2**20) / 2**20 for f in (math.cos, math.sin)]
    return [numbers[0], numbers[2], numbers[3]]


def sealed(path: Path) -> dict[str, Any]:
    """A manifest, without the seal that it is checked against."""
    table: dict[str, Any] = json.loads(path.read_bytes())
    seal = table.pop("manifest_sha256")
    assert seal == hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    assert table["version"] == 1
    return table


class FormatReader:
    """A split of a data set: checked bytes, labels and pixels by id, and the order of ids."""

    def __init__(self, data: Path, split: str, number: int = 0) -> None:
        newest = sealed(data / "manifest.json")
        inside = f"versions/{number:06d}/" if number else ""
        table = sealed(data / inside / "manifest.json")
        assert number in (0, table.get("number", 1))
        self.data, self.table = data, table
        self.beside = f"{table['tables_in']}/" if "tables_in" in table else ""
        self.raw = table["encoding"] == "raw"
        self.shards: list[dict[str, Any]] = table["splits"][split]["shards"]
        for shard in self.shards:
            purged = newest.get("purged", {})
            tar = self._checked(shard["name"], purged.get(shard["name"], shard["sha256"]))
            assert len(tar) == shard["bytes"]
            self._checked(shard["name"].replace(".tar", ".idx"), shard["idx_sha256"])
        place = f"{self.beside}{split}.index.npy"
        self._checked(place, table["splits"][split]["index_sha256"])
        self.tables: dict[str, bytes] = {
            name: self._checked(f"{self.beside}{split}.{name}", digest)
            for name, digest in table["splits"][split].get("tables", {}).items()
        }
        for name in ("stats.npz", "rejects.jsonl", "duplicates.jsonl"):
            self._checked(f"{self.beside}{name}", table[f"{name.split('.')[0]}_sha256"])
        self.rows = np.load(data / place)
        self.sizes = [shard["samples"] for shard in self.shards]
        assert len(self.rows) == sum(self.sizes)
        with np.load(data / self.beside / "stats.npz") as stats:
            self.stats = dict(stats)
        self.withdrawn: set[int] = set()
        if digest := newest.get("withdrawn_sha256"):
            lines = self._checked(f"{newest['tables_in']}/withdrawn.jsonl", digest).splitlines()
            gone = {
                (row["shard"], offset, size, crc)
                for row in map(json.loads, lines)
                for offset, size, crc in row["samples"]
            }
            for sample, (shard, _, *place, crc) in enumerate(self.rows.tolist()):
                if (self.shards[shard]["name"], *place, crc) in gone:
                    self.withdrawn.add(sample)

    def _checked(self, name: str, digest: str) -> bytes:
        content = (self.data / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name
        return content

    def image(self, sample: int) -> bytes:
        """The bytes of a sample's image; raw: of its pixels."""
        row = self.rows[sample]
        with (self.data / self.shards[row["shard"]]["name"]).open("rb") as tar:
            tar.seek(int(row["offset"]))
            content = tar.read(int(row["size"]))
        assert zlib.crc32(content) == row["crc"]
        return content

    def name(self, sample: int) -> str:
        """The original file name of a sample."""
        ends = np.frombuffer(self.tables["names.index.npy"], "<u8")[-len(self.rows) :].tolist()
        start = ends[sample - 1] if sample else 0
        line = self.tables["names.txt"][start : ends[sample]].decode()
        assert line.count("\n") == 1
        assert "\\" not in line
        return line.removesuffix("\n")

    def size(self, sample: int) -> tuple[int, int]:
        """Height and width of a sample's image in pixels."""
        if self.table.get("fit", "square") == "square":
            return self.table["image_size"], self.table["image_size"]
        return int(self.rows["height"][sample]), int(self.rows["width"][sample])

    def label(self, sample: int) -> int:
        return int(self.rows["label"][sample])

    def slots(self, seed: int, window: int | None = None) -> Iterator[tuple[int, int]]:
        """Epoch and id at positions 0, 1, 2 ...; `window` is that of the shuffle `block`."""
        epoch = 0
        while True:
            if window is None:
                ids = full_epoch(len(self.rows), seed, epoch)
            else:
                windows = block_windows(self.sizes, seed, epoch, window)
                ids = [sample for one in windows for sample in one]
            yield from ((epoch, sample) for sample in ids)
            epoch += 1

    def substitutes(self, seed: int, epoch: int, due: int) -> Iterator[int]:
        """Candidates that take the place of a damaged sample of the shuffle `full`."""
        t = 0
        while True:
            yield word(seed, epoch, due, 7 + t) % len(self.rows)
            t += 1

    def pixels(self, sample: int, seed: int, epoch: int, due: int | None = None) -> np.ndarray:
        """Training pixels of a raw image, float32 [3, 224, 224]; `due` is the damaged sample."""
        assert self.raw
        image = np.frombuffer(self.image(sample), np.uint8).reshape(*self.size(sample), 3)
        drawn = sample if due is None else due
        left, top, mirrored = crop_of(seed, epoch, drawn)
        crop = image[top : top + 224, left : left + 224]
        crop = crop[:, ::-1] if mirrored else crop
        scales = 0.1 * np.sqrt(self.stats["eigenvalues"])
        shift = self.stats["eigenvectors"] @ (scales * color_of(seed, epoch, drawn))
        mean = (self.stats["channel_mean"] - shift).astype(np.float32)
        return np.asarray((crop - mean).transpose(2, 0, 1))
