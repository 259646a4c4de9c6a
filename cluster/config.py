"""Every setting of a training run: one flat table, from a TOML file and from flags."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from pipeline.dataset import parse_size
from pipeline.errors import UsageError

Dtype = Literal["auto", "float32", "bfloat16"]
Shuffle = Literal["full", "block"]

DATA_KEY = "data_sha256"
"""The one key of RUN/config.toml that is no setting: SHA-256 of the data set's manifest."""

FREE = (
    "replicas",
    "device",
    "pair",
    "threads",
    "checkpoint_every",
    "keep",
    "validate_every",
    "max_failures",
    "strict",
    "ledger",
    "cache",
    "cache_size",
)
"""Settings that may change when a run is continued. None changes the pictures or their order;
`replicas` changes the dropout masks, and it and `pair` the rounding of sums."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, the recipe, and the machines."""

    width: float = 1.0
    """Factor on all maps and units; 1 is the network of the paper."""
    seed: int = 0
    """Of the initial weights, dropout, the order of pictures and their augmentation."""
    batch_size: int = 128
    """Pictures in a step, over all workers."""
    epochs: float = 90.0
    """Length of the run in passes over the training pictures; used when steps is 0."""
    steps: int = 0
    """Length of the run in steps; 0: as epochs says."""
    lr: float = 0.01
    """First learning rate of the weights."""
    bias_factor: float = 2.0
    """First learning rate of the biases, as a multiple of lr."""
    lr_drop: float = 250.0
    """First learning rate of the weights over their last."""
    lr_drops: int = 4
    """Equal stretches of the run with a constant rate for the weights; 1: constant throughout."""
    bias_drop: float = 10.0
    """As lr_drop, for the biases."""
    bias_drops: int = 2
    """As lr_drops, for the biases."""
    momentum: float = 0.9
    """Share of the velocity kept in a step."""
    weight_decay: float = 5e-4
    """Of the weights; biases have none."""
    shuffle: Shuffle = "full"
    """full: each epoch a permutation of all pictures; block: one of the shards, the pictures mixed
    within windows of them, for remote stores and spinning disks."""
    window: int = 16
    """Shards in a window of the block shuffle."""
    colour: float = 0.1
    """Standard deviation of the colour draws, in those of the training pictures; 0: none."""
    dtype: Dtype = "auto"
    """What layers compute in (weights stay float32); auto: bfloat16 where the hardware has it."""
    replicas: int = 1
    """Copies of the network, each with its share of the batch."""
    pair: bool = True
    """A worker for each column; --no-pair puts both columns into one, for a single GPU."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs if the cluster has any."""
    threads: int = 0
    """Threads that decode, per worker; 0: as many as the worker has cores."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    validate_every: int = 500
    """Steps between passes over the validation pictures; 0: never."""
    max_failures: int = 3
    """Restarts after a lost worker before the run gives up."""
    strict: bool = False
    """Stop at the first damaged picture instead of replacing it by another."""
    ledger: bool = False
    """Write down every picture delivered, for pipeline.verify --ledger; 8 bytes each."""
    cache: str = ""
    """Folder on each node for the shards of a remote data set; "": duet in the user's cache."""
    cache_size: str = "100GB"
    """Most bytes in it."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: names the setting, its value and what would do.
        """
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(
                f"epochs is {self.epochs:g} and steps is 0; one of them must be above 0"
            )
        self._require("epochs", math.isfinite(self.epochs), "must be finite")
        self._require("seed", self.seed < 2**63, "must be below 2**63")
        self._require("threads", self.threads <= 1024, "must be at most 1024")
        for name in ("width", "batch_size", "lr", "bias_factor", "lr_drop", "bias_drop", "lr_drops",
                     "bias_drops", "replicas", "checkpoint_every", "keep", "window"):  # fmt: skip
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("seed", "steps", "weight_decay", "colour", "threads", "validate_every",
                     "max_failures"):  # fmt: skip
            self._require(name, getattr(self, name) >= 0, "must be 0 or above")
        try:
            parse_size(self.cache_size)
        except UsageError as error:
            raise ValueError(f"cache_size: {error}") from error
        self._require("momentum", 0 <= self.momentum < 1, "must be 0 or above and below 1")
        self._require("batch_size", self.batch_size % self.halves == 0, self._batch_hint())

    def _require(self, name: str, holds: bool, hint: str) -> None:
        value = getattr(self, name)
        if not holds or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it {hint if not holds else 'must be finite'}")

    @property
    def cached(self) -> dict[str, Any]:
        """What `pipeline.dataset.open_dataset` and `Stream` want to know of the cache."""
        return {"cache": self.cache or None, "cache_size": parse_size(self.cache_size)}

    @property
    def halves(self) -> int:
        """Parts a batch is cut into: a half for each column of each replica."""
        return 2 * self.replicas

    @property
    def size(self) -> int:
        """Workers per replica: a pair, or one with both columns."""
        return 2 if self.pair else 1

    def _batch_hint(self) -> str:
        below = self.batch_size // self.halves * self.halves
        near = f"{below} or {below + self.halves}" if below else f"{self.halves}"
        return f"must be a multiple of {self.halves} (replicas x 2 columns), for example {near}"

    def total_steps(self, samples: int) -> int:
        """Steps of the whole run over a training set of `samples` pictures; at least 1."""
        return self.steps or max(1, math.ceil(self.epochs * samples / self.batch_size))

    @property
    def constant_rates(self) -> bool:
        """The learning rates do not depend on the length of the run."""
        return self.lr_drops == 1 and self.bias_drops == 1


TYPES = get_type_hints(Config)
LENGTH = ("steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Train both columns from a sealed data set; the same command again continues the run."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file with any of the settings below; flags given here win over it."""
    data: str
    """Data set, made by pipeline.build_shards: a folder, or an address such as s3://bucket/folder."""
    run: Path
    """Folder for checkpoints and numbers; made if need be."""
    settings: Annotated[Config, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class _Unchecked(Config):
    # Read without the checks: a value that cannot work gets our one line, not tyro's box.
    __doc__ = Config.__doc__

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Raw(Command):
    settings: Annotated[_Unchecked, tyro.conf.OmitArgPrefixes]


def parse(argv: Sequence[str]) -> Command:
    """Read the command line and the config file it names.

    Raises:
        UsageError: the file is missing or wrong, or a setting is; one line.
        SystemExit: code 2 for a wrong flag, 0 for --help (tyro has spoken).
    """
    user = list(argv)
    table = load(_read(user).config)
    given = {word.split("=")[0] for word in user}
    if given & {f"--{name}" for name in LENGTH}:  # the file's other way to say it must not win
        table = {key: value for key, value in table.items() if key not in LENGTH}
    raw = _read([*(flag for key, value in table.items() for flag in as_flag(key, value)), *user])
    try:
        settings = Config(**asdict(raw.settings))
    except ValueError as error:
        raise UsageError(f"{error} ({raw.config} and the flags given)") from error
    return Command(config=raw.config, data=raw.data, run=raw.run, settings=settings)


def _read(words: list[str]) -> _Raw:
    return tyro.cli(_Raw, args=words, prog="python -m cluster.train", description=Command.__doc__)


def load(path: Path) -> dict[str, Any]:
    """Read a config file, checking names and types of its keys but not yet their values.

    Raises:
        UsageError: names the file, the key and what it should be.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"config file {path} cannot be read ({reason}); see configs/") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config file {path} is not TOML: {error}") from error
    table.pop(DATA_KEY, None)
    for key, value in table.items():
        if key not in TYPES:
            near = difflib.get_close_matches(key, TYPES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TYPES)}"
            raise UsageError(f"config file {path}: no setting {key!r}; {hint}")
        if not _fits(value, TYPES[key]):
            raise UsageError(
                f"config file {path}: {key} is {value!r}; it takes {_words(TYPES[key])}"
            )
    return table


def _fits(value: object, kind: Any) -> bool:
    if choices := get_args(kind):
        return value in choices
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    if choices := get_args(kind):
        return " or ".join(repr(choice) for choice in choices)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def as_flag(key: str, value: object) -> list[str]:
    """A setting as tyro's flags."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def as_toml(config: Config, data_sha256: str) -> str:
    """The effective config as a file that `parse` reads back to the same config."""
    lines = ["# Written by cluster.train: every setting of this run, as it was used."]
    for field in fields(config):
        value = getattr(config, field.name)
        lines.append(f"{field.name} = {json.dumps(value)}")
    lines.append("# The data set: SHA-256 of its manifest.json.")
    lines.append(f'{DATA_KEY} = "{data_sha256}"')
    return "\n".join(lines) + "\n"


def read_back(path: Path) -> tuple[Config, str]:
    """Read RUN/config.toml: the settings of the run, and the identity of its data set.

    Raises:
        UsageError: it cannot be read.
    """
    table = load(path)
    data = tomllib.loads(path.read_text(encoding="utf-8")).get(DATA_KEY, "")
    try:
        return Config(**table), str(data)
    except ValueError as error:
        raise UsageError(f"config file {path}: {error}") from error


def differences(old: Config, new: Config, samples: int) -> list[str]:
    """What keeps `new` from continuing a run of `old`, as `name: old -> new`; empty if nothing.

    Settings in `FREE` may differ. The length may differ if no learning rate depends on it.
    """
    before, after = asdict(old), asdict(new)
    found = [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and name not in FREE and name not in LENGTH
    ]
    lengths = old.total_steps(samples), new.total_steps(samples)
    if lengths[0] != lengths[1] and not (old.constant_rates and new.constant_rates):
        found.append(f"length in steps: {lengths[0]} -> {lengths[1]} (learning rates drop by it)")
    return found
