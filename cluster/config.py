"""Every setting of a training run: one flat table. `config_file` reads and writes it.

What may differ when a run is continued, and what may not.

Settings from a TOML file and from flags, and back into a file.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from model.architecture import Activation, Design, Net, Norm, Pool, Without
from model.schedule import list_color_steps, parse_changes, parse_layer_rates
from pipeline.remote.dataset import parse_size
from pipeline.tools.errors import UsageError

Dtype = Literal["auto", "float32", "bfloat16"]
Shuffle = Literal["full", "block"]
Schedule = Literal["dexp", "plateau", "manual"]
Scaling = Literal["none", "linear", "sqrt"]

LENGTH = ("steps", "epochs")
REPLICAS = re.compile(r"[0-9]{1,6}(:[0-9]{1,6})?")
REPLICAS_HINT = "must be a number from 1 up, or two as in 1:4, the fewest and the most"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, the recipe, and the machines."""

    width: float = 1.0
    """Factor on all maps and units; 1 is the network of the paper."""
    columns: int = 2
    """2, or 1 for the paper's single-column network to compare with."""
    net: Net = "paper"
    """paper: the eight layers; four: the four-layer network of figure 1, for images of 32x32."""
    norm: Norm = "lrn"
    """What normalises in layers 1 and 2. lrn: local response; spatial: the source's second one
    alone, over 5x5 pixels of a map; lcn: local contrast; batch: over the images that are computed
    on at once; none: nothing."""
    relu_first: bool = True
    """ReLU before normalisation, as the paper says; --no-relu-first: after pooling in conv1 and
    conv5, as the released source has it."""
    spatial_norm: bool = False
    """The source's second normalisation in layer 2, over 5x5 pixels of a map."""
    pool: Pool = "3/2"
    """Side and stride of the max-pooling windows."""
    activation: Activation = "relu"
    """relu or tanh."""
    without: Without = "none"
    """A layer to leave out."""
    conv6: bool = False
    """A sixth convolution over the last pooling, as in the paper's pre-trained networks."""
    dropout: bool = True
    """Dropout in fc6 and fc7; --no-dropout: neither in training nor in a test."""
    init: str = ""
    """Another run (its folder), or one of its checkpoints (folder or address), whose weights to
    start from; the last layer is new, and conv6 may be."""
    seed: int = 0
    """Of the initial weights, dropout, the order of images and their augmentation."""
    batch_size: int = 128
    """Images in a step, over all workers."""
    epochs: float = 90.0
    """Length of the run in passes over the training images; used when steps is 0."""
    steps: int = 0
    """Length of the run in steps; 0: as epochs says."""
    schedule: Schedule = "dexp"
    """dexp: equal stretches, by lr_drop and the like; plateau: divided when the validation error
    stalls; manual: as changes says."""
    rate_scaling: Scaling = "none"
    """lr times batch_size / 128 (linear), or the root of it (sqrt), or neither."""
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
    changes: tuple[str, ...] = ()
    """"EPOCH NAME VALUE" each; NAME is colour, lr.LAYER, lr_bias.LAYER or, for manual only, lr or
    lr_bias."""
    patience: int = 3
    """For plateau: validations without a better error that are put up with; one more divides."""
    plateau_drops: int = 3
    """For plateau: most divisions."""
    plateau_factor: float = 10.0
    """For plateau: what the rates are divided by."""
    plateau_biases: bool = True
    """For plateau: divide the rate of the biases, too (the source's network 145 did not)."""
    plateau_threshold: float = 0.002
    """For plateau: share by which an error must be below the best one to count as better."""
    layer_rates: tuple[str, ...] = ()
    """Factors on the rates of single layers, "conv1=0.1" each; 0 freezes."""
    momentum: float = 0.9
    """Share of the velocity kept in a step."""
    weight_decay: float = 5e-4
    """Of the weights; biases have none."""
    shuffle: Shuffle = "full"
    """full: each epoch a permutation of all images; block: one of the shards, the images mixed
    within windows of them, for remote stores and spinning disks."""
    window: int = 16
    """Shards in a window of the block shuffle."""
    augment: bool = True
    """Random crops, mirroring and colour; --no-augment: the centre of each image, as it is."""
    colour: float = 0.1
    """Standard deviation of the colour draws, in those of the training images; 0: none."""
    colour_divide: bool = False
    """Divide training images by 1 + colour, as the released source does."""
    mean: Literal["channel", "picture"] = "channel"
    """What is subtracted: the mean of each channel, or the mean image (its centre, from every
    crop) as in 2012."""
    dtype: Dtype = "auto"
    """What layers compute in (weights stay float32); auto: bfloat16 where the hardware has it."""
    exchange_dtype: Literal["auto", "bfloat16"] = "auto"
    """What crosses between columns; auto: as it is computed."""
    replicas: int | str = 1
    """Copies of the network, each with its share of the batch; "1:4": as many of these as there is
    room for, fewer when a node goes, more when one comes."""
    columns_per_worker: Literal[1, 2] = 1
    """1: a worker for each column; 2: both columns in one, for a single GPU."""
    microbatch: int = 0
    """Most images that a replica computes on at once, the gradients added up; 0: its share of the
    batch when there are the most replicas."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs if the cluster has any."""
    threads: int = 0
    """Threads that decode, per worker; 0: as many as the worker has cores."""
    prefetch: int = 2
    """Batches that each worker reads, and decodes, ahead."""
    hw_decoder_load: float = 1.0
    """Share of a batch that the JPEG engines of a GPU decode, where it has some; between 0 and 1,
    pixels depend a little on their batch."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    keep_best: int = 1
    """Kept besides them: those with the lowest validation error."""
    store: str = ""
    """Address (s3://bucket/folder) for the checkpoints and a copy of the rows, or another folder
    for the checkpoints; "": in the run's folder, which all nodes must then see."""
    validate_every: int = 500
    """Steps between passes over the validation images; 0: never."""
    statistics_every: int = 50
    """Steps between rows of each layer's mean |weight|, |update| and |gradient|; 0: never, nor are
    conv1's kernels kept over time."""
    max_failures: int = 3
    """Restarts with no new checkpoint between them before the run gives up."""
    node_wait: int = 600
    """Seconds to wait for a node when, during the run, there is no room for its replicas."""
    collective_timeout: int = 300
    """Seconds that a worker may keep the others waiting before they take it for frozen."""
    strict: bool = False
    """Stop at the first damaged image instead of replacing it by another."""
    ledger: bool = False
    """Write down every image delivered, for pipeline.verify --ledger; 8 bytes each."""
    tensorboard: bool = False
    """Write the numbers for TensorBoard, too, into RUN/tensorboard."""
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
                     "bias_drops", "checkpoint_every", "keep", "window", "prefetch",
                     "collective_timeout"):  # fmt: skip
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("seed", "steps", "weight_decay", "colour", "threads", "validate_every",
                     "max_failures", "patience", "plateau_drops", "plateau_threshold",
                     "statistics_every", "microbatch", "keep_best", "node_wait"):  # fmt: skip
            self._require(name, getattr(self, name) >= 0, "must be 0 or above")
        try:
            parse_size(self.cache_size)
        except UsageError as error:
            raise ValueError(f"cache_size: {error}") from error
        self._check_schedule()
        self._require("hw_decoder_load", 0 <= self.hw_decoder_load <= 1, "must be from 0 to 1")
        self._require("momentum", 0 <= self.momentum < 1, "must be 0 or above and below 1")
        self._require("plateau_threshold", self.plateau_threshold < 1, "must be below 1")
        self._require("plateau_factor", self.plateau_factor > 1, "must be above 1")
        self._require("replicas", bool(REPLICAS.fullmatch(str(self.replicas))), REPLICAS_HINT)
        if str(self.replicas).isdecimal():  # "2" in a file is 2
            object.__setattr__(self, "replicas", int(self.replicas))
        least, most = self.replica_range
        self._require("replicas", 0 < least <= most, REPLICAS_HINT)
        self._require("batch_size", bool(self.replica_sizes), self._batch_hint())

    def _check_schedule(self) -> None:
        """Refuse a network or rates that cannot be.

        Raises:
            ValueError: names the setting, its value and what would do.
        """
        layers = [layer.name for layer in self.design.layers()]
        parse_layer_rates(self.layer_rates, layers)
        for change in parse_changes(self.changes, layers):
            if change.name in ("lr", "lr_bias") and self.schedule != "manual":
                raise ValueError(
                    f"changes: {change.name} goes with schedule = 'manual'; with "
                    f"{self.schedule!r} only colour and single layers' rates can change"
                )
        if self.schedule == "plateau" and not self.validate_every:
            raise ValueError(
                "schedule is 'plateau', which looks at the validation error, "
                "and validate_every is 0; it must be above 0"
            )

    def _require(self, name: str, holds: bool, hint: str) -> None:
        value = getattr(self, name)
        if not holds or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it {hint if not holds else 'must be finite'}")

    @property
    def cached(self) -> dict[str, Any]:
        """What `pipeline.remote.dataset.open_dataset` and `Stream` want to know of the cache."""
        return {"cache": self.cache or None, "cache_size": parse_size(self.cache_size)}

    @property
    def design(self) -> Design:
        """The network."""
        return Design.from_settings(asdict(self))

    @property
    def colours(self) -> tuple[tuple[int, float], ...]:
        """Colour by epoch: (first epoch, value) pairs, as `Stream` takes them."""
        changes = parse_changes(self.changes, [layer.name for layer in self.design.layers()])
        return list_color_steps(changes, self.colour)

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        least, _, most = str(self.replicas).partition(":")
        return int(least), int(most or least)

    @property
    def replica_sizes(self) -> tuple[int, ...]:
        """Numbers of replicas that the batch can be shared out to evenly, ascending."""
        least, most = self.replica_range
        most = min(most, self.batch_size // self.columns)
        return tuple(
            count
            for count in range(least, most + 1)
            if self.batch_size % (count * self.columns) == 0
        )

    def micro(self, replicas: int) -> int:
        """Images of a replica's share that it computes on at once, when there are so many.

        With batch normalisation, whose statistics are theirs, as many with any number of replicas.
        """
        least = self.batch_size // self.replica_sizes[-1]
        share = least if self.norm == "batch" else self.batch_size // replicas
        return min(share, self.microbatch or least)

    @property
    def size(self) -> int:
        """Workers per replica: a pair, or one with all columns."""
        return 2 if self.columns_per_worker == 1 and self.columns == 2 else 1

    def _batch_hint(self) -> str:
        halves = self.columns * self.replica_range[0]
        below = self.batch_size // halves * halves
        near = f"{below} or {below + halves}" if below else f"{halves}"
        parts = f"replicas x {self.columns} columns"
        return f"must be a multiple of {halves} ({parts}), for example {near}"

    def total_steps(self, samples: int) -> int:
        """Steps of the whole run over a training set of `samples` images; at least 1."""
        return self.steps or max(1, math.ceil(self.epochs * samples / self.batch_size))

    @property
    def constant_rates(self) -> bool:
        """The learning rates do not depend on the length of the run."""
        return self.schedule != "dexp" or (self.lr_drops == 1 and self.bias_drops == 1)


FREE = (
    "replicas",
    "device",
    "columns_per_worker",
    "microbatch",
    "threads",
    "prefetch",
    "checkpoint_every",
    "keep",
    "keep_best",
    "store",
    "validate_every",
    "statistics_every",
    "max_failures",
    "node_wait",
    "collective_timeout",
    "strict",
    "ledger",
    "tensorboard",
    "cache",
    "cache_size",
)
"""Settings that may change when a run is continued. None changes the images, their order or the
dropout masks; `replicas`, `columns_per_worker` and `microbatch` change the rounding of sums."""


def differences(old: Config, new: Config, samples: int) -> list[str]:
    """What keeps `new` from continuing a run of `old`, as `name: old -> new`; empty if nothing.

    Settings in `FREE` may differ, but for `validate_every` where `plateau` counts validations, and
    those that say how many images batch normalisation sees at once. The length may differ if no
    learning rate depends on it.
    """
    before, after = asdict(old), asdict(new)
    free = set(FREE) - ({"validate_every"} if old.schedule == "plateau" else set())
    found = [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and name not in free and name not in LENGTH
    ]
    if old.norm == new.norm == "batch" and old.micro(1) != new.micro(1):
        found.append(
            f"images that are normalised together: {old.micro(1)} -> {new.micro(1)} "
            "(--microbatch, --replicas)"
        )
    lengths = old.total_steps(samples), new.total_steps(samples)
    if lengths[0] != lengths[1] and not (old.constant_rates and new.constant_rates):
        found.append(f"length in steps: {lengths[0]} -> {lengths[1]} (learning rates drop by it)")
    return found


DATA_KEY = "data_sha256"
"""The one key of RUN/config.toml that is no setting: SHA-256 of the data set's manifest."""
TEXTS = tuple[str, ...]
EITHER = int | str

TYPES = get_type_hints(Config)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Train both columns from a sealed data set; the same command again continues the run."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file with any of the settings below; flags given here win over it."""
    data: str
    """Data set, made by pipeline.build_shards: a folder, or an address such as s3://bucket/folder."""
    run: Path
    """Folder for checkpoints and numbers; made if need be."""
    tuning: Path | None = None
    """A file of pipeline.throughput --tune; its settings win over CONFIG's, flags over both."""
    measure: bool = False
    """Do not train: say where a step's time goes, into RUN/measure.json and RUN/throughput.html."""
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
    first = _read(user)
    table = load(first.config)
    if first.tuning is not None:
        table |= load(first.tuning)
    given = {word.split("=")[0] for word in user}
    if given & {f"--{name}" for name in LENGTH}:  # the file's other way to say it must not win
        table = {key: value for key, value in table.items() if key not in LENGTH}
    raw = _read([*_as_flags(table), *user])
    try:
        settings = Config(**asdict(raw.settings))
    except ValueError as error:
        raise UsageError(f"{error} ({raw.config} and the flags given)") from error
    return Command(
        config=raw.config, data=raw.data, run=raw.run, tuning=raw.tuning, measure=raw.measure,
        settings=settings,
    )  # fmt: skip


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
        raise UsageError(
            f"config file {path} cannot be read ({reason}); see cluster/configs/"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config file {path} is not TOML: {error}") from error
    table.pop(DATA_KEY, None)
    for key, value in table.items():
        if key not in TYPES:
            near = difflib.get_close_matches(key, TYPES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TYPES)}"
            raise UsageError(f"config file {path}: no setting {key!r}; {hint}")
        if not fits(value, TYPES[key]):
            raise UsageError(
                f"config file {path}: {key} is {value!r}; it takes {_words(TYPES[key])}"
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def fits(value: object, kind: Any) -> bool:
    """Whether a value of a TOML file is of the kind that a setting takes (one of `TYPES`)."""
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == EITHER:
        return type(value) in (int, str)
    if choices := get_args(kind):
        return value in choices
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    if kind == TEXTS:
        return "a list of texts"
    if kind == EITHER:
        return "a whole number or text"
    if choices := get_args(kind):
        return " or ".join(repr(choice) for choice in choices)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _as_flags(table: dict[str, Any]) -> list[str]:
    """Settings as flags, such that any word may follow: a list takes all words up to a flag."""
    lists = {key: value for key, value in table.items() if isinstance(value, tuple)}
    last = {"width": Config.width} | {key: table[key] for key in table if key not in lists}
    return [word for key, value in (lists | last).items() for word in as_flag(key, value)]


def as_flag(key: str, value: object) -> list[str]:
    """A setting as tyro's flags."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *value]
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
