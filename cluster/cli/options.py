"""The flags of the cluster's commands, one dataclass each, with the texts of their --help.

They lie here, without what the commands import, so that `duet VERB --help` comes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from cluster.config import MEANT, Config
from model.summary import SummaryOptions
from pipeline.tools.arguments import Options
from pipeline.tools.errors import UsageError

Choice = Literal["best", "worst", "random"]
"""Rules by which a report chooses the images that it shows with the network's answers."""
CHOICES: tuple[Choice, ...] = get_args(Choice)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Train both columns from a sealed data set; the same command again resumes the run.

    Starts a Ray on this machine, reachable from this machine only, unless RAY_ADDRESS names one.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "demo --data data/demo --run runs/demo",
        "dexp --data /data/imagenet --run runs/dexp --replicas 4",
        "finetune --data data/mine --run runs/mine --init runs/dexp",
    )

    SECTIONS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "network": (
            "width", "columns", "net", "layers", "image_size", "without", "conv6", "bottleneck",
            "communication", "norm", "norm_layers", "lrn_k", "lrn_size", "lrn_alpha", "lrn_beta",
            "lrn_across", "relu_first", "spatial_norm", "pool", "activation", "dropout",
            "middle_std", "init", "init_layers",
        ),
        "schedule": (
            "epochs", "steps", "batch_size", "microbatch", "exact", "schedule", "rate_scaling",
            "lr", "bias_factor", "lr_drop", "lr_drops", "bias_drop", "bias_drops", "lr_power",
            "warmup", "warmup_lr", "changes",
            "patience", "plateau_drops", "plateau_factor", "plateau_biases", "plateau_threshold",
            "layer_rates", "momentum", "weight_decay", "layer_decays", "lars", "seed",
        ),
        "data": (
            "data_version", "shuffle", "window", "augment", "colour", "colour_divide", "mean",
            "strict", "ledger", "cache", "cache_size",
        ),
        "machines": (
            "replicas", "columns_per_worker", "device", "dtype", "exchange_dtype", "cuda_graph",
            "threads", "prefetch", "hw_decoder_load", "max_failures", "node_wait",
            "spares", "collective_timeout",
        ),
        "checkpoints and measurements": (
            "checkpoint_every", "keep", "keep_best", "store", "milestones", "validate_every",
            "statistics_every",
            "tensorboard", "wandb", "mlflow",
        ),
    }  # fmt: skip
    MEANT: ClassVar[Mapping[str, str]] = MEANT

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file with any of the settings below, or the name of a preset, such as dexp; flags given
    here win over it."""
    data: str = ""
    """Data set, made by duet build-shards: a folder, or an address such as s3://bucket/folder; a
    run that is resumed knows its own, and needs it only if that has moved."""
    run: Path
    """Folder for checkpoints and numbers; created if need be."""
    tuning: Path | None = None
    """A file of duet throughput --tune; its settings win over CONFIG's, flags over both."""
    layers: Path | None = None
    """TOML file with a table of layers, and maybe other settings of the network, such as columns or
    image_size; CONFIG's own network is left out, and flags win over both."""
    measure: bool = False
    """Do not train: measure where a step's time goes, into RUN/measure.json and
    RUN/throughput.html."""
    settings: Annotated[Config, tyro.conf.OmitArgPrefixes]
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """The words that it was parsed from."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """A checkpoint of a run; by default the newest one."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    best: bool = False
    """The checkpoint with the lowest validation error instead of the newest."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="STEP|FOLDER")] = None
    """The checkpoint of this step, or in this folder (RUN/checkpoints/step-00000400), instead."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(CheckpointOptions):
    """Measure a trained network on every image of a split, once each.

    Views as in the paper (section 4.1): the center crop, or the mean over four corners, center and
    their mirror images.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "runs/dexp --best --views 10",
        "runs/a --split test --submission out.txt --class-list kit.tgz",
    )

    data: str = ""
    """Data set (folder or address) with the classes of the training; default: that of the run."""
    data_version: str = ""
    """Version of the data set: number, identity, or latest; default: the run's own."""
    views: Literal[1, 10] = 1
    """1: centre crop; 10: corners, centre and their mirror images, averaged."""
    split: str = "val"
    """Split of the data set."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
    save_probabilities: bool = False
    """Write each image's class probabilities, for duet ensemble and the report's images."""
    submission: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the numbers of the five most probable classes of each image, a line an image in the
    order of the file names, as ILSVRC's server takes them; also for images without labels."""
    class_list: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Numbers of the classes in the submission: ILSVRC's development kit, or a text file with a
    class a line, number 1 first."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""

    def check(self) -> None:
        """Refuse settings that do not go together, each in one line (UsageError)."""
        if self.submission is not None and self.class_list is None:
            raise UsageError(
                f"--submission {self.submission} needs the numbers of the classes; give "
                "--class-list FILE: ILSVRC's development kit, or a class a line, number 1 first"
            )
        if self.class_list is not None and self.submission is None:
            raise UsageError("--class-list goes with --submission FILE; name the file to write")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """Write the merged weights of a run as one safetensors file, for plain PyTorch."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("runs/dexp --best --out alexnet.safetensors",)

    out: Path | None = None
    """File to write; default RUN/weights.safetensors."""
    data: str = ""
    """Data set of the training, if that has moved; only runs with mean = 'image', or older ones,
    need it."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """Make a run of weights that another program trained, for evaluate, neighbors, report, --init.

    The file has the layers of the network of 2012 with both columns merged, as Caffe's bvlc_alexnet
    and the files of duet export have them. The run computes the same logits as the program that the
    weights come from, whose order of colors, normalization and dropout are put into the weights.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "bvlc_alexnet.caffemodel --layout caffe --out runs/caffe",
        "a.npz --layout caffe --out runs/a --data data/imagenet",
        "weights.safetensors --layout torch --out runs/theirs",
    )

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File of the weights: .caffemodel, .npz or .safetensors."""
    layout: Literal["caffe", "torch"]
    """caffe: blue is the first color, LRN reaches across the groups with k = 1, images of 227
    pixels, less Caffe's mean. torch: as duet export writes: red first, LRN by column with k = 2,
    images of 224 pixels; a file of duet export says itself which network it is of."""
    out: Path
    """Folder of the run to make."""
    data: str = ""
    """Data set (folder or address) whose classes, in order, are the outputs of the last layer: the
    sorted synsets for ImageNet. Without it the classes are numbers, and the run is for --init and
    export."""
    lrn: Literal["auto", "column", "across"] = "auto"
    """Reach of LRN: each column's own maps, or across the border of the two groups; auto: as the
    layout says."""
    image_size: Literal["auto", 224, 227] = "auto"
    """Side in pixels of the images that the network reads; auto: as the layout says."""
    lrn_k: float = 0.0
    """Constant k of LRN; 0: as the file says, or else the layout."""
    pixel_mean: tuple[float, float, float] | None = None
    """Mean that was subtracted, red green blue in 0..255, for example 123.675 116.28 103.53 for
    torchvision's; default: Caffe's, or with layout torch the data set's own."""
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divisor after that, for example 58.395 57.12 57.375 for torchvision's."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class StatusOptions(Options):
    """Show the state of a run, from its files, also on another machine."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("runs/dexp --watch", "s3://bucket/dexp --json")

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or its --store."""
    watch: bool = False
    """Refresh every 2 seconds, until the run has ended or Ctrl-C."""
    json: bool = False
    """Print one JSON object to stdout."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Write one page about a run, RUN/report.html, or about several runs side by side."""

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "runs/dexp --evaluate", "runs/dexp --maps conv1 conv3",
        "runs/dexp runs/tanh --out both.html",
    )  # fmt: skip

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folder of the run; several are compared side by side."""
    data: str = ""
    """Data set (folder or address) of a single run, for images and class names, if it has moved."""
    out: Path | None = None
    """Page to write; by default RUN/report.html, or comparison.html here for several runs."""
    answers: tuple[Choice, ...] = CHOICES
    """Choices of images to show with the network's answers."""
    each: int = 6
    """Number of images of each choice."""
    maps: tuple[str, ...] = ()
    """Layers of a single run whose feature maps are drawn, of the first image of each choice."""
    evaluate: bool = False
    """First evaluate each run, as duet evaluate RUN --views 10 --save-probabilities does."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Look for what would keep a training from running, and say what mends it."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("", "dexp --data /data/imagenet --run runs/dexp")

    config: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = None
    """Config of the training, or the name of a preset."""
    data: str = ""
    """Its data set: a folder or an address; default: that of the run in RUN, if there is one."""
    run: Path | None = None
    """Its run folder; made if need be."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Make the runs of a study and compare them; the same command again resumes."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("small/figure1 --data data/demo --out runs/figure1",)

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """Study file, or the name of one in cluster/config/presets/studies, such as small/figure1."""
    data: str = ""
    """Data set (folder or address) with train and val; default: that of the runs in OUT."""
    out: Path
    """Folder of the runs, study.json, study.md and study.png."""
    at_once: int = 0
    """Runs at a time, which share cores and GPUs; 0: one for each GPU, or for each core."""
    ray: bool = False
    """Make each run with cluster.train, one after the other: with columns and replicas as the
    configs say. Otherwise each is one process with both columns."""
    json: bool = False
    """Print study.json to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class EvidenceOptions(Options):
    """Put the paper's claims beside what runs here have found, on one page."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("runs/ --out evidence.html",)

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Runs, folders of runs, folders of studies, results of duet ensemble --out."""
    data: str = ""
    """Data set of the runs (folder or address), for images with their answers; default: their
    own."""
    out: Path | None = None
    """File to write; default: evidence.html in the folder that holds all that was named."""
    json: bool = False
    """Print the rows as one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class NeighborsOptions(CheckpointOptions):
    """Find the images that a trained network finds most similar."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("runs/dexp -k 10",)
    RENAMED: ClassVar[Mapping[str, str]] = {
        "--step": "--checkpoint", "--queries": "--split", "--base": "--base-split",
    }  # fmt: skip

    data: str = ""
    """Data set (folder or address) with the classes of the training; default: that of the run."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 6
    """Neighbors of each image."""
    queries: Annotated[str, tyro.conf.arg(name="split")] = "val"
    """Split of the query images."""
    base: Annotated[str, tyro.conf.arg(name="base-split")] = "train"
    """Split that is searched; if it is the same, an image is not its own neighbor."""
    features: Path | None = None
    """Folder for the features (10 GB for 1.28 million images); default: RUN/neighbours."""
    anew: bool = False
    """Compute the features even if they exist."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the features in their file."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs if there are any."""
    workers: int = 0
    """Processes that compute features; 0: one a GPU, or one for every four cores."""
    memory: str = "2GB"
    """Most memory for the search, beside the queries."""
    show: int = 10
    """Queries on the contact sheet."""
    pairs: int = 50_000
    """Random pairs of either kind, same class and different ones, for the distances."""
    seed: int = 0
    """Seed of the draws of pairs and of the queries on the sheet."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class CodesOptions(Options):
    """Train auto-encoders to short binary codes and measure searches by them."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("runs/dexp --bits 64 256",)
    RENAMED: ClassVar[Mapping[str, str]] = {"--queries": "--split", "--base": "--base-split"}

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, with the features that cluster.experiments.neighbors computed."""
    bits: tuple[int, ...] = (64, 128, 256)
    """Lengths of the codes, multiples of 8."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of exact neighbors that the codes should find."""
    queries: Annotated[str, tyro.conf.arg(name="split")] = "val"
    """Split of the query images."""
    base: Annotated[str, tyro.conf.arg(name="base-split")] = "train"
    """Split that is coded and searched."""
    asked: int = 1000
    """Most queries, drawn at random."""
    features: Path | None = None
    """Folder of the features; default: RUN/neighbours."""
    hidden: int = 512
    """Units of the auto-encoder's hidden layers."""
    steps: int = 600
    """Training steps, 256 images each."""
    memory: str = "2GB"
    """Most memory for the exact search."""
    seed: int = 0
    """Seed of the training and of all draws."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions(Options):
    """Average the saved probabilities of runs, and count the errors of the average.

    Paper, table 2: one network errs in 18.2 % of the images (top-5), the average of five in 16.4 %.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "runs/one runs/two runs/three --search",
        "runs/one runs/two runs/three --sizes 1 2 3",
    )

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of runs with probabilities that duet evaluate --save-probabilities saved."""
    views: Literal[1, 10] = 10
    """Views of the probabilities: the center view, or ten."""
    weights: tuple[float, ...] = ()
    """Weight of each run; default: all equal."""
    search: bool = False
    """Search the weights with the fewest top-5 errors on these images."""
    sizes: tuple[int, ...] = ()
    """Numbers of runs to average; prints a table with a line for each instead."""
    out: Path | None = None
    """File for the object that --json prints; default: none."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(SummaryOptions, Options):
    """Print the layer table of a network: sizes, parameters, multiply-adds, memory, exchange.

    Settings of other things than the network are ignored. Bytes are a step's, in --dtype. Exchanged
    bytes are those of one direction, a to b; as many go the other way.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("paper", "narrow --classes 10 --json")
