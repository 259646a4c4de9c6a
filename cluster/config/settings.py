"""Settings of a training run: their fields and checks.

`Config` nests the network (`model.architecture.Design`). Files and flags are flat: `width = 0.25`
or `--width 0.25` sets `config.design.width`. `from_settings` and `to_settings` translate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from cluster.config.milestones import parse_milestones
from model.architecture import Design
from model.schedule import list_color_steps, parse_changes, parse_layer_rates, scale_rate
from pipeline.dataset.segments import Segments, as_segments, find_position, parse_versions
from pipeline.stream.config import Mean, Shuffle, StreamConfig
from pipeline.tools.errors import UsageError
from pipeline.tools.units import CACHE_SIZE_FLAG, parse_size

Dtype = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["dexp", "plateau", "manual", "poly"]
Scaling = Literal["none", "linear", "sqrt"]

LENGTH = ("steps", "epochs")
REPLICAS = re.compile(r"[0-9]{1,6}(:[0-9]{1,6})?")
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that a TOML file or a path cannot hold; the latter stand for bytes beyond UTF-8."""
REPLICAS_HINT = "must be a number from 1 up, or two as in 1:4, the fewest and the most"
POSITIVE = (
    "batch_size", "lr", "bias_factor", "lr_drop", "bias_drop", "lr_drops", "bias_drops",
    "checkpoint_every", "keep", "collective_timeout", "lr_power",
)  # fmt: skip
NOT_NEGATIVE = (
    "steps", "weight_decay", "colour", "validate_every", "max_failures", "patience", "node_wait",
    "lars", "warmup", "warmup_lr", "plateau_drops", "plateau_threshold", "statistics_every",
    "microbatch", "keep_best", "spares",
)  # fmt: skip
LARGEST = 10**9
"""Largest whole number of a setting that is not in `LARGEST_OF`."""
LARGEST_OF = {"seed": 2**63 - 1, "lr_drops": 1000, "bias_drops": 1000, "epochs": 10**6}
CHANGEABLE = (
    "replicas", "device", "cuda_graph", "columns_per_worker", "microbatch", "threads", "prefetch",
    "checkpoint_every", "keep", "keep_best", "store", "validate_every", "statistics_every",
    "max_failures", "node_wait", "spares", "collective_timeout", "strict", "ledger", "tensorboard",
    "wandb", "mlflow", "cache", "cache_size", "milestones", "data_version",
)  # fmt: skip
"""Settings that may change when a run is resumed. None changes the images, their order or the
dropout masks; `replicas`, `columns_per_worker` and `microbatch` change the rounding of sums, unless
the run is exact: then the former two change no bit, and the size of a micro-batch stays."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, the training recipe, and the machines.

    Raises:
        ValueError: a setting cannot work; names it, its value and what would do.
    """

    design: Annotated[Design, tyro.conf.OmitArgPrefixes] = field(default_factory=Design)
    """The network."""
    init: str = ""
    """Another run (its folder), or one of its checkpoints (folder or address), whose weights to
    start from; the last layer starts with new weights, and conv6 may."""
    init_layers: Literal["all", "conv"] = "all"
    """conv: only the convolutions start from init, and all other layers with new weights."""
    seed: int = 0
    """Seed of the initial weights, dropout, the order of images and their augmentation."""
    batch_size: int = 128
    """Images in a step, over all workers."""
    epochs: float = 90.0
    """Length of the run in passes over the training images; used when steps is 0."""
    steps: int = 0
    """Length of the run in steps; 0: epochs decides."""
    schedule: Schedule = "dexp"
    """dexp: equal stretches with constant rates, set by lr_drop, lr_drops and those of the biases;
    plateau: rates are divided when the validation error stalls; manual: changes sets them; poly:
    they fall to 0 as (1 - share of the run) ** lr_power."""
    rate_scaling: Scaling = "none"
    """Multiply lr by batch_size / 128 (linear), by its square root (sqrt), or not (none)."""
    lr: float = 0.01
    """First learning rate of the weights."""
    bias_factor: float = 2.0
    """First learning rate of the biases, as a multiple of lr."""
    lr_drop: float = 250.0
    """First learning rate of the weights over their last."""
    lr_drops: int = 4
    """Equal stretches of the run with a constant rate for the weights; 1: constant throughout."""
    bias_drop: float = 10.0
    """First learning rate of the biases over their last."""
    bias_drops: int = 2
    """Equal stretches of the run with a constant rate for the biases; 1: constant throughout."""
    lr_power: float = 2.0
    """Exponent of the schedule poly; 1: linear."""
    warmup: float = 0.0
    """Epochs in which all rates rise linearly to those of the schedule; 0: no warm-up."""
    warmup_lr: float = 0.0
    """Rate of the weights from which the warm-up begins; rate_scaling leaves it as it is."""
    changes: tuple[str, ...] = ()
    """Changes during the run, "EPOCH NAME VALUE" each; NAME is colour, lr.LAYER, lr_bias.LAYER or,
    for manual only, lr or lr_bias."""
    patience: int = 3
    """Validations without a better error that are tolerated, one more divides; only for plateau."""
    plateau_drops: int = 3
    """Largest number of divisions; only for plateau."""
    plateau_factor: float = 10.0
    """Divisor of the rates; only for plateau."""
    plateau_biases: bool = True
    """Divide the rate of the biases, too (the source's network 145 did not); only for plateau."""
    plateau_threshold: float = 0.002
    """Fraction by which an error must be below the best to count as better; only for plateau."""
    layer_rates: tuple[str, ...] = ()
    """Factors on the rates of single layers, "conv1=0.1" each; 0 freezes."""
    momentum: float = 0.9
    """Fraction of the velocity kept in a step."""
    weight_decay: float = 5e-4
    """Weight decay of the weights; biases have none."""
    layer_decays: tuple[str, ...] = ()
    """Weight decay of single layers in place of weight_decay, "fc5=0.01" each."""
    lars: float = 0.0
    """Trust coefficient of LARS (You, Gitman, Ginsburg 2017), for batches of thousands: the rate of
    a layer's weights is multiplied by lars * |w| / (|gradient| + decay * |w|), in each column; 0:
    rates as they are."""
    shuffle: Shuffle = "full"
    """full: each epoch is a permutation of all images; block: a permutation of the shards, with the
    images mixed within windows of them, for remote stores and spinning disks."""
    window: int = StreamConfig.window
    """Shards in a window of the block shuffle."""
    augment: bool = True
    """Random crops, mirroring and colour; --no-augment: the centre of each image, as it is."""
    colour: float = 0.1
    """Standard deviation of the colour draws, in those of the training images; 0: none."""
    colour_divide: bool = False
    """Divide training images by 1 + colour, as the released source does."""
    mean: Mean = "channel"
    """Mean to subtract: channel: of each channel; image: the mean image (its centre, from every
    crop) as in 2012."""
    dtype: Dtype = "auto"
    """Data type that layers compute in (weights stay float32); auto: bfloat16 where the hardware
    multiplies it; float32: a GPU does not round to TF32 either."""
    exchange_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """Data type of what crosses between columns where layers compute in float32; auto: the one that
    layers compute in."""
    replicas: int | str = 1
    """Copies of the network, each with its share of the batch; "1:4": as many of these as there is
    room for, fewer when a node goes, more when one comes."""
    columns_per_worker: Literal["auto", 1, 2] = "auto"
    """1: a worker for each column; 2: both columns in one; auto: 2 on GPUs where no node has two of
    them and with lrn_across, else 1."""
    microbatch: int = 0
    """Most images that a replica computes on at once, the gradients added up; 0: its share of the
    batch when there are the most replicas."""
    exact: bool = False
    """Give losses and weights the same bits for any number of replicas (a power of two) and any
    columns_per_worker: sums take the order of a fixed tree over the micro-batches, and a CPU
    computes a column in one thread."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs if the cluster has any."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """auto: record the passes of a step on a GPU and launch each as one, where one worker computes
    the whole batch at once; off: launch every operation."""
    threads: int = 0
    """Decoding threads of each worker; 0: as many as the worker has cores."""
    prefetch: int = StreamConfig.prefetch
    """Batches that each worker reads, and decodes, in advance."""
    hw_decoder_load: float = StreamConfig.hw_decoder_load
    """Fraction of a batch that the JPEG engines of a GPU decode, where it has some; between 0 and
    1, pixels depend a little on their batch."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_best: int = 1
    """Number of checkpoints to keep besides them: those with the lowest validation error."""
    store: str = ""
    """Address (s3://bucket/folder) for the checkpoints and a copy of the rows, or another folder
    for the checkpoints; "": in the run's folder, which all nodes must then see."""
    milestones: tuple[str, ...] = ()
    """Published results, "EPOCH NAME VALUE" each; NAME is loss, top1 or top5 (errors in percent,
    center view). A run on 1,000 classes that passes one and is far worse says so."""
    validate_every: int = 500
    """Steps between passes over the validation images; 0: never."""
    statistics_every: int = 50
    """Steps between rows of each layer's mean |weight|, |update| and |gradient|; 0: never, and no
    snapshots of conv1's kernels."""
    max_failures: int = 3
    """Restarts with no new checkpoint between them before the run fails."""
    node_wait: int = 600
    """Seconds to wait for a node when, during the run, there is no room for its replicas."""
    spares: int = 1
    """Processes on each node that wait, with all imports done, to take a dead worker's place."""
    collective_timeout: int = 300
    """Seconds that a worker may keep the others waiting before they take it for frozen."""
    strict: bool = False
    """Stop at the first damaged image instead of replacing it by another."""
    data_version: str = ""
    """Version of the data set, by its number, or its identity or eight digits of that; "": the
    newest when the run begins, and then that one; latest: go on with a newer one at the border of
    the first epoch after a start."""
    ledger: bool = False
    """Record every image delivered, for duet verify --ledger; 8 bytes each."""
    tensorboard: bool = False
    """Also write the numbers for TensorBoard, into RUN/tensorboard."""
    wandb: bool = False
    """Also send the numbers to Weights & Biases, where WANDB_... says."""
    mlflow: bool = False
    """Also send the numbers to MLflow, where MLFLOW_TRACKING_URI says; else into RUN/mlruns."""
    cache: str = ""
    """Folder on each node for the shards of a remote data set; "": duet in the user's cache."""
    cache_size: str = CACHE_SIZE_FLAG
    """Size limit of the cache folder."""

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"epochs is {self.epochs:g}, steps is 0; one must be above 0")
        self._require("epochs", math.isfinite(self.epochs), "must be finite")
        for name, value in self.to_settings().items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and NO_TEXT.search(text):
                    raise ValueError(f"{name} is {text!r}; it must be UTF-8 text without NUL")
        for name in POSITIVE:
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in NOT_NEGATIVE:
            self._require(name, getattr(self, name) >= 0, "must be 0 or above")
        try:
            parse_size(self.cache_size)
        except UsageError as error:
            raise ValueError(f"cache_size: {error}") from error
        self._check_schedule()
        _ = self.stream
        _ = self.version
        self._require("momentum", 0 <= self.momentum < 1, "must be 0 or above and below 1")
        self._require("plateau_threshold", self.plateau_threshold < 1, "must be below 1")
        self._require("plateau_factor", self.plateau_factor > 1, "must be above 1")
        self._require("replicas", bool(REPLICAS.fullmatch(str(self.replicas))), REPLICAS_HINT)
        if str(self.replicas).isdecimal():  # "2" in a file is 2
            object.__setattr__(self, "replicas", int(self.replicas))
        least, most = self.replica_range
        self._require("replicas", 0 < least <= most, REPLICAS_HINT)
        is_cut = self.design.is_cut_by_columns or self.columns_per_worker != 1
        hint = "must be 2 with lrn_across, whose windows read both columns"
        self._require("columns_per_worker", is_cut, hint)
        if self.exact:
            self._check_exact()
        self._require("batch_size", bool(self.replica_sizes), self._format_batch_hint())

    def _check_exact(self) -> None:
        """Refuse settings that leave no tree of equal micro-batches for the replicas."""
        if self.design.has_batch_norm:
            raise ValueError(
                "norm is 'batch' and exact is true; statistics over micro-batches are not summed "
                "in a tree: use another norm, or exact = false"
            )
        if not self.design.is_cut_by_columns:
            raise ValueError(
                "lrn_across is True and exact is true, which computes each column by itself; use "
                "lrn_across = false, or exact = false"
            )
        counts = [2**power for power in range(self.batch_size.bit_length())]
        fits = [str(self.batch_size // n) for n in counts if self.batch_size % n == 0]
        leaf = str(self.microbatch or fits[0])
        self._require("microbatch", leaf in fits, f"must be, with exact, one of {', '.join(fits)}")
        sizes = ", ".join(map(str, self._list_replica_sizes(1, self.batch_size)))
        text = "must be, with exact" + (f" and microbatch {leaf}" if self.microbatch else "")
        self._require("replicas", bool(self.replica_sizes or not sizes), f"{text}, one of {sizes}")

    def _check_sizes(self) -> None:
        """Refuse numbers with which a run would fail or be busy for ever."""
        for one in fields(self):
            value = getattr(self, one.name)
            largest = LARGEST_OF.get(one.name, LARGEST if isinstance(value, int) else math.inf)
            if isinstance(value, int | float) and math.inf > abs(value) > largest:
                raise ValueError(f"{one.name} is {value!r:.40}; it must be at most {largest}")

    def _check_schedule(self) -> None:
        """Check the learning-rate settings against each other and against the network's layers."""
        layers = [layer.name for layer in self.design.rows()]
        parse_layer_rates(self.layer_rates, layers)
        parse_layer_rates(self.layer_decays, layers, "layer_decays")
        parse_milestones(self.milestones)
        is_short = self.steps > 0 or self.warmup == 0 or self.warmup < self.epochs
        self._require("warmup", is_short, f"must be below epochs ({self.epochs:g})")
        top = self.scaled_lr
        self._require("warmup_lr", self.warmup_lr <= top, f"must be lr ({top:g}) at most")
        is_used = self.warmup > 0 or self.warmup_lr == 0
        self._require("warmup_lr", is_used, "goes with warmup, which is 0")
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

    def _format_batch_hint(self) -> str:
        columns = self.design.columns
        unit = columns * self.replica_range[0]
        below = self.batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        return f"must be a multiple of {unit} (replicas x {columns} columns), for example {near}"

    @classmethod
    def from_settings(cls, table: Mapping[str, Any]) -> Config:
        """Return the config of a flat table of settings, as files and flags have it.

        Raises:
            ValueError: a setting cannot work; names it, its value and what would do.
            TypeError: there is no setting of that name.
        """
        table = translate_values(table)
        own = {key: value for key, value in table.items() if key not in DESIGN_TYPES}
        return cls(design=Design.from_settings(table), **own)

    def to_settings(self) -> dict[str, Any]:
        """Return all settings as one flat table, the network's first."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return own.pop("design").to_settings() | own

    @property
    def cached(self) -> dict[str, Any]:
        """Cache arguments of `pipeline.remote.dataset.open_dataset` and `Stream`."""
        return {"cache": self.cache or None, "cache_size": parse_size(self.cache_size)}

    @property
    def version(self) -> int | str | None:
        """Version of the data set that a new run begins with; None: the newest.

        Raises:
            ValueError: `data_version` names none.
        """
        version = parse_versions(self.data_version or None)
        assert not isinstance(version, tuple)
        return version

    @property
    def scaled_lr(self) -> float:
        """Learning rate of the weights for this batch size: lr, by `rate_scaling`."""
        return scale_rate(self.lr, self.batch_size, self.rate_scaling)

    @property
    def stream(self) -> StreamConfig:
        """Settings of the stream of training images; a process adds its rank, device and files.

        Raises:
            ValueError: a setting is out of range; the message names it.
        """
        return StreamConfig(
            batch_size=self.batch_size,
            seed=self.seed,
            crop="random" if self.augment else "center",
            size=self.design.image_size,
            shuffle=self.shuffle,
            window=self.window,
            colour=self.colours,
            colour_divide=self.colour_divide,
            mean=self.mean,
            threads=self.threads or None,
            prefetch=self.prefetch,
            hw_decoder_load=self.hw_decoder_load,
            strict=self.strict,
            **self.cached,
        )

    @property
    def colours(self) -> tuple[tuple[int, float], ...]:
        """Colour by epoch: (first epoch, value) pairs, as `Stream` takes them."""
        changes = parse_changes(self.changes, [layer.name for layer in self.design.rows()])
        return list_color_steps(changes, self.colour)

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        least, _, most = str(self.replicas).partition(":")
        return int(least), int(most or least)

    @property
    def replica_sizes(self) -> tuple[int, ...]:
        """Numbers of replicas that divide the batch evenly, ascending."""
        return self._list_replica_sizes(*self.replica_range)

    def _list_replica_sizes(self, least: int, most: int) -> tuple[int, ...]:
        columns = self.design.columns
        counts = range(least, min(most, self.batch_size // columns) + 1)
        found = [count for count in counts if self.batch_size % (count * columns) == 0]
        if self.exact:  # a replica computes a whole subtree: a power of two of the micro-batches
            leaves = self.batch_size // (self.microbatch or 1)
            found = [count for count in found if not count & count - 1 and leaves % count == 0]
        return tuple(found)

    @property
    def has_constant_rates(self) -> bool:
        """True if the learning rates do not depend on the length of the run."""
        falls = self.schedule == "dexp" and not (self.lr_drops == 1 and self.bias_drops == 1)
        return self.schedule != "poly" and not falls

    def microbatch_size(self, replicas: int) -> int:
        """Return the largest number of images that a replica computes on at once.

        Batch normalisation takes its statistics over them, and exact sums are over them: then it is
        the same number for any number of replicas.
        """
        least = self.batch_size // self.replica_sizes[-1]
        is_fixed = self.exact or self.design.has_batch_norm
        share = least if is_fixed else self.batch_size // replicas
        return min(share, self.microbatch or least)

    def total_steps(self, samples: int | Segments) -> int:
        """Return the steps of the whole run over training images, or over segments; at least 1."""
        end = find_position(as_segments(samples), self.epochs)
        return self.steps or max(1, math.ceil(end / self.batch_size))


DESIGN_TYPES = get_type_hints(Design)
"""Type of each setting of the network."""


def translate_values(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table in which values of earlier versions are those of today."""
    return {key: "image" if (key, value) == ("mean", "picture") else value
            for key, value in table.items()}  # fmt: skip
