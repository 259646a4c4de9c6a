"""The flags of the pipeline's commands, one dataclass each, with the texts of their --help.

They lie here, without what the commands import, so that `duet VERB --help` comes at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from pipeline.stream.config import Device, Shuffle, StreamConfig
from pipeline.tools.arguments import MOST_PROCESSES, MOST_SEED, Options, require_range
from pipeline.tools.errors import UsageError
from pipeline.tools.units import CACHE_SIZE_FLAG, cpu_count

Chroma = Literal["4:2:0", "4:4:4"]
"""Color resolution of a stored JPEG: half the width and height, or full."""
StoreKind = Literal["disk", "nfs", "s3", "gs", "http"]
"""Kinds of stores that a job may read a data set from."""
MOST_IMAGES, MOST_GPUS = 10**12, 10**6
"""Most images of an epoch, and GPUs of a job, that a plan is made for."""
MOST_FIELD = 87
"""Letters of a field: with a key of 12 and a dot, 100 bytes, the most of a name in a tar."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig(Options):
    """Pack images into a sealed data set of WebDataset shards.

    The kind of SRC is detected. Every image is cut and resized as --fit and --size say, shuffled
    over its whole split by the seed, and packed: as a JPEG, or with --encoding raw as its pixels,
    which need no decoding and about six times the space. Images that cannot be read are skipped,
    counted, and listed in OUT/rejects.jsonl; too many of them, and the build fails. A killed build
    resumes when the same command is run again; on a finished set the command does nothing. While
    packing, OUT takes twice the room of the finished set.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "data/flowers --train images/flowers --holdout 0.1",
        "/data/imagenet --train train.tar --val val.tar",
    )

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the data set; created if need be."""
    train: Annotated[str, tyro.conf.arg(metavar="SRC")] = ""
    """Training images: a folder per class, ILSVRC's or any tars of classes, Kaggle's tree, a
    folder of parquet files or of WebDataset shards. Folders, parquet files and shards also at an
    address (s3://, gs://, hf://, https://)."""
    val: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """Validation images, in any of these forms; also ILSVRC's flat tar or folder."""
    val_labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Labels of flat validation images: ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or a
    list of synsets; without it they are looked for beside the images."""
    test: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """Test images, in any of these forms: a third split, test, for duet evaluate --split test."""
    test_labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Labels of flat test images: ILSVRC2010_test_ground_truth.txt beside the kit of 2010, or a
    list; without it they are looked for beside the images."""
    holdout: float = 0.0
    """Share of each class's training images to keep for validation; only without --val."""
    seed: int = 0
    """Seed of the shuffle over each split (and of what is held out)."""
    samples_per_shard: int = 1000
    """Samples in each shard but the last; 1000 raw ones are a tar of 199 MB."""
    size: int = 256
    """Side of the stored squares in pixels, 32 to 4096; with --fit shorter, of the shorter side."""
    fit: Literal["square", "shorter", "none"] = "square"
    """square: the shorter side resampled to --size, and the central square kept; shorter: resampled
    so, and nothing cut; none: nothing resampled, and JPEGs stay byte for byte as they are, so far
    as every decoder reads them alike."""
    encoding: Literal["jpeg", "raw"] = "jpeg"
    """Storage of the images: `jpeg`, or `raw` uint8 pixels (KEY.npy), which need no
    decoding and about six times the space (197 kB an image; ImageNet: 255 GB); only for --fit
    square."""
    quality: int = 96
    """JPEG quality of the stored images, 1..100; only for --encoding jpeg. From 96 on the encoder
    uses its accurate cosine transform: 39.2 dB where 95 has 38.6 and 90 has 36.4."""
    chroma: Chroma = "4:2:0"
    """Colour of stored JPEGs at half resolution, or at full; only for --encoding jpeg."""
    fields: tuple[str, ...] = ()
    """Endings of other members of each sample to carry along byte for byte (json, txt, depth.png):
    members of the sample in shards, files of the image's name beside it in folders, columns of
    parquet files. A sample that lacks one is skipped as an image that cannot be read."""
    masks: tuple[str, ...] = ()
    """Endings of masks, PNGs of one channel and 8 bits as large as their image (seg.png): carried
    along, cut with it, and resampled to the nearest pixel."""
    labels: bool = True
    """Classes of the images. With --no-labels SRC is a folder, tars or parquet files of images, and
    the set has no classes: a stream gives each image the label -1."""
    min_side: int = 8
    """Images with a side shorter than this many pixels are skipped."""
    max_rejects: float = 0.001
    """Share of all images that may be skipped; with more of them the build fails. What lies behind
    damage of a tar, of a row group or file of parquet, or of a folder counts, too: as many images
    as its rows say, else by an estimate."""
    strict: bool = False
    """Refuse damage of a source at once, by name; without it, a source is skipped from there on."""
    workers: int = cpu_count()
    """Processes that decode and encode."""
    json: bool = False
    """Print one JSON object about the finished set on stdout."""
    add: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """Images to add to the finished set OUT, as a new version of it: any source that --train takes.
    Those that it has already are skipped."""
    split: str = "train"
    """Split to which --add adds: train, val or test."""
    replace: bool = False
    """Let an image of --add take the place of the one of the same name in the set."""
    new_classes: bool = False
    """Let --add bring classes that the set does not have; they are numbered behind the others."""
    retry_rejects: bool = False
    """Pack those images of OUT's sources that were rejected and can be read by now, as a new
    version."""

    def check(self) -> None:
        """Refuse values that cannot work, each in one line (UsageError)."""
        from pipeline.dataset.images import LEAST_SIZE, MOST_SIZE

        self._check_additions()
        require_range("samples_per_shard", self.samples_per_shard, 1, 100_000)
        require_range("quality", self.quality, 1, 100)
        require_range("size", self.size, LEAST_SIZE, MOST_SIZE)
        require_range("min_side", self.min_side, 1, 256)
        require_range("workers", self.workers, 1, MOST_PROCESSES)
        require_range("seed", self.seed, 0, MOST_SEED)
        require_range("holdout", self.holdout, 0, 1 - 2**-53, "0 to below 1")
        require_range("max_rejects", self.max_rejects, 0, 1)
        for name in ("quality", "chroma"):
            value = getattr(self, name)
            if self.encoding == "raw" and value != getattr(BuildConfig, name):
                raise UsageError(
                    f"--{name} {value} says nothing about --encoding raw; leave it out"
                )
        if self.fit == "none" and self.size != BuildConfig.size:
            raise UsageError(f"--size {self.size} says nothing about --fit none; leave it out")
        if self.fit != "square" and self.encoding == "raw":
            raise UsageError(f"--encoding raw stores squares, not --fit {self.fit}; use jpeg")
        if self.val is not None and self.holdout:
            raise UsageError("--val and --holdout exclude each other; give one of them")
        for split, kind in (("val", "validation"), ("test", "test")):
            if self.find_labels(split) is None:
                continue
            flag = f"--{split}-labels"
            if getattr(self, split) is None:
                raise UsageError(f"{flag} goes with --{split}; name the {kind} images too")
            if not self.labels:
                raise UsageError(f"{flag} names labels, and --no-labels has none; leave one out")
        self._check_members()
        self._refuse_out_in_source()

    @property
    def extends(self) -> bool:
        """True if a new version of a finished set is made."""
        return self.add is not None or self.retry_rejects

    def _check_additions(self) -> None:
        if not self.extends:
            if not self.train:
                raise UsageError("--train SRC is missing; name the training images (or --add SRC)")
            for name in ("replace", "new_classes"):
                if getattr(self, name):
                    flag = name.replace("_", "-")
                    raise UsageError(f"--{flag} goes with --add SRC; name the images to add")
            return
        if self.split not in ("train", "val", "test"):
            text = f"--split {self.split:.60} is none of a build's; give train, val or test"
            raise UsageError(text)
        if self.add is not None and self.retry_rejects:
            raise UsageError("--add and --retry-rejects make a version each; give one of them")
        begun = [name for name in ("train", "val", "test", "holdout") if getattr(self, name)]
        if begun:
            flag = f"--{begun[0]}"
            raise UsageError(f"{flag} begins a data set, and --add goes on with one; leave it out")
        if self.retry_rejects and (self.replace or self.new_classes):
            raise UsageError("--retry-rejects takes neither --replace nor --new-classes")

    def find_labels(self, split: str) -> str | None:
        """Return the file with the labels of a split's flat images, if one was given."""
        return {"val": self.val_labels, "test": self.test_labels}.get(split)

    @property
    def members(self) -> tuple[str, ...]:
        """Endings of the members that are stored with each image."""
        return (*self.fields, *self.masks)

    def _check_members(self) -> None:
        from pipeline.dataset.samples import JPEG_ENDINGS, is_field

        taken = {*JPEG_ENDINGS, "npy"} if self.encoding == "raw" else {*JPEG_ENDINGS}
        for flag, names in (("--fields", self.fields), ("--masks", self.masks)):
            for name in names:
                # webdataset writes no member `_x`, and tar needs a second header beyond 100 bytes.
                if not is_field(name) or name[0] == "_" or len(name) > MOST_FIELD:
                    raise UsageError(
                        f"{flag} {name:.100} is no ending of up to {MOST_FIELD} small letters that "
                        "can be stored, as seg.png"
                    )
                if name in taken:
                    raise UsageError(
                        f"{flag} {name} is the ending of the image itself; leave it out"
                    )
                if name == "cls" and self.labels:
                    raise UsageError(
                        f"{flag} cls is the label, which each sample has; leave it out, or give "
                        "--no-labels to carry it as a field"
                    )
        if twice := [name for name in self.members if self.members.count(name) > 1]:
            raise UsageError(f"--fields and --masks have {twice[0]} twice; name it once")
        if wrong := [name for name in self.masks if not f".{name}".endswith(".png")]:
            raise UsageError(f"--masks {wrong[0]}: a mask is a PNG, as seg.png")

    def _refuse_out_in_source(self) -> None:
        from pipeline.remote.filesystem import is_remote, local_path

        if is_remote(self.out):
            return
        out = local_path(self.out).resolve()
        for source in filter(None, (self.train, self.val, self.test, self.add)):
            if not is_remote(source) and out.is_relative_to(local_path(source).resolve()):
                raise UsageError(f"{self.out} lies inside the source {source}; name another OUT")


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Options):
    """Give a folder of WebDataset shards an index and a manifest, so that they train as they are.

    For shards that another tool made of JPEGs (.jpg or .jpeg, with the label in .cls or .json),
    squares of one size or images of many sizes. Every image is decoded once, and samples that
    cannot be trained from are named by shard and key; then nothing is written, unless --skip-bad
    skips them. Images of other kinds need `duet build-shards OUT --train DIR`. No file of DIR is
    changed. Added are an .idx for each tar that has none, SPLIT.index.npy, stats.npz, rejects.jsonl
    and, last, manifest.json.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("/data/shards --train 'train-*.tar' --val 'val-*.tar'",)
    RENAMED: ClassVar[Mapping[str, str]] = {"--classes": "--class-names"}

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder or address (hf://, s3://, https://, ...) of the shards (.tar, not compressed); files
    are added to it, none is changed."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Folder for what is added, where DIR is an address: the shards are read from there, also in
    training. By default DIR itself, which must be writable."""
    train: str | None = None
    """Names of the training shards, with *, ? and {000..146}; else those with `train` in their
    name."""
    val: str | None = None
    """Names of the validation shards; else those with `val` or `validation`."""
    classes: Annotated[Path | None, tyro.conf.arg(name="class-names", metavar="FILE")] = None
    """Class names in the order of their labels: a line each, or a JSON list."""
    fields: tuple[str, ...] = ()
    """Endings of the other members of each sample that `Stream(fields=..., masks=...)` is to give:
    json, txt, seg.png."""
    skip_bad: bool = False
    """Leave out samples that cannot be used, and list them in DIR/rejects.jsonl."""
    decode_every: int = 1
    """Decode one of so many images of a shard: statistics are of those, and of the others only
    header and CRC-32 are read. Other damage shows in training, or by `duet verify --decode`."""
    workers: int = cpu_count()
    """Processes that read and decode."""
    json: bool = False
    """Print one JSON object on stdout."""

    @property
    def data(self) -> str:
        """Folder or address of the data set that is made."""
        return self.folder if self.out is None else self.out

    def check(self) -> None:
        """Refuse values that cannot work, each in one line (UsageError)."""
        require_range("workers", self.workers, 1, MOST_PROCESSES)
        require_range("decode-every", self.decode_every, 1, 2**31)
        from pipeline.dataset.samples import is_field

        if wrong := [name for name in self.fields if not is_field(name)]:
            raise UsageError(f"--fields {wrong[0]} is no ending in small letters, such as seg.png")
        for flag, glob in (("--train", self.train), ("--val", self.val)):
            if glob is not None and "/" in glob:
                raise UsageError(f"{flag} {glob} has a /; give names of files in {self.folder}")


@dataclass(frozen=True, kw_only=True)
class WithdrawOptions(Options):
    """Withdraw samples from a data set: a new version lacks them, and no version delivers them.

    Shards stay as they are, and so do the versions before: but whoever reads one of these gets
    another sample in place of each that was withdrawn. --purge overwrites the bytes, too.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("data/flowers --keys names.txt --purge",)

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder or address (s3://, gs://, az://) of the data set."""
    keys: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Names of the samples, one a line, as SPLIT.names.txt has them (SPLIT.keys.txt in shards of
    another tool)."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class whose samples are withdrawn; its label stays."""
    purge: bool = False
    """Overwrite the bytes of all withdrawn samples in their shards by zeros; with neither --keys
    nor --class of those that were withdrawn before."""
    workers: int = cpu_count()
    """Processes that decode, to bring the statistics up to date."""
    json: bool = False
    """Print one JSON object on stdout."""

    def check(self) -> None:
        """Refuse values that cannot work, each in one line (UsageError)."""
        require_range("workers", self.workers, 1, MOST_PROCESSES)
        if self.keys is not None and self.class_name is not None:
            raise UsageError("--keys and --class exclude each other; give one of them")
        if self.keys is None and self.class_name is None and not self.purge:
            raise UsageError("name what to withdraw: --keys FILE, or --class NAME")


@dataclass(frozen=True, kw_only=True)
class Verify(Options):
    """Check a sealed data set against its manifest, byte for byte, or what was delivered of it.

    Every shard is read once: its SHA-256, every member of the tar, every row of the index, every
    label and every image's CRC-32 are checked, and damage is named by shard, sample and key. With
    --ledger, the ledgers of a run are read instead: was each epoch delivered exactly once? Exit
    code 0: sound. 4: damaged, or not exactly once.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "data/flowers --decode",
        "--ledger runs/first",
    )

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = ""
    """Folder of the dataset; with --ledger by default that of the first RUN."""
    decode: bool = False
    """Decode every image, too; an image that DALI might refuse is named."""
    data_version: Annotated[str, tyro.conf.arg(metavar="N")] = ""
    """Version of the dataset: its number, or its identity; by default the newest."""
    json: bool = False
    """Print one JSON object on stdout."""
    ledger: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Runs trained with --ledger, or folders with ledgers: prove from them that each epoch was
    delivered exactly once. No byte of the data is hashed then; for that, run without."""


@dataclass(frozen=True, kw_only=True)
class DescribeOptions(Options):
    """Show what a data set holds, as a table and on one page.

    The page needs no network, no script and no other file. It shows the images as they are stored,
    each checked against its CRC-32, and the effect of the random color shifts of training.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("data/flowers --out flowers.html",)

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder or address of the data set."""
    data_version: str = ""
    """Version of the data set: number, identity, or latest; default: the newest."""
    out: Path | None = None
    """Page to write; default: NAME-describe.html in the current folder."""
    card: bool = False
    """Write README.md (figures, and metadata for the Hugging Face hub) and croissant.json (for
    programs) into DATA, too; also into a store."""
    seed: int = 0
    """Seed of the random sample of images."""
    cache: str | None = None
    """Folder for shards of a remote data set, as for training."""
    cache_size: str = CACHE_SIZE_FLAG
    """Most bytes in the cache."""
    json: bool = False
    """Print one JSON object on stdout instead of the table."""


@dataclass(frozen=True)
class DemoOptions(Options):
    """Draw a small data set of ten shapes and textures, so that nothing has to be downloaded.

    The images are the same for any number of workers. OUT appears whole or not at all.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = ("images/shapes",)
    RENAMED: ClassVar[Mapping[str, str]] = {"--train": "--train-images", "--val": "--val-images"}

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to create."""
    seed: int = 0
    """Other seeds give other images (0 or more)."""
    train: Annotated[int, tyro.conf.arg(name="train-images")] = 2000
    """Number of training images; classes differ by one at most."""
    val: Annotated[int, tyro.conf.arg(name="val-images")] = 400
    """Number of validation images."""
    workers: int = 0
    """Number of processes; 0: one per usable core."""


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(Options):
    """Find the bottleneck of the stream, each stage's distance from its limit, and what would help.

    Measures every stage alone against the limits of this machine, then the stream, names its
    bottleneck and the gain of each change, and writes throughput.json and throughput.html. With
    --rate only the stream is measured, or DALI's own reader as the yardstick; with --loader a
    loader of yours; with --tune settings are tried; with --plan a job is computed.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "/data/imagenet --device gpu",
        "/data/imagenet --compare throughput.json",
        "--loader train:make_loader --img-s 2000",
        "--plan --gpus 64 --img-s 500000 --store-kind s3",
    )
    SECTIONS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "with --rate": ("reader", "ledger", "windows", "batches"),
        "with --plan": ("measured", "gpus", "gpus_per_node", "store", "images"),
    }
    RENAMED: ClassVar[Mapping[str, str]] = {"--store": "--store-kind", "--pictures": "--images"}

    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """Data set: a folder, or an address such as s3://bucket/folder."""
    data_version: str = ""
    """Version of the data set: number, identity, or latest; default: the newest."""
    device: Device = "cpu"
    """Device that decodes and holds the images."""
    split: str = "train"
    """Split to read."""
    shuffle: Shuffle | None = None
    """Order of the stream; default: full, or block for a data set in a store."""
    window: int = StreamConfig.window
    """Shards in a window of the block shuffle."""
    cache: str | None = None
    """Folder for the shards of a remote data set; default: duet in the user's cache folder."""
    cache_size: str = CACHE_SIZE_FLAG
    """Most bytes in the cache."""
    batch_size: int = StreamConfig.batch_size
    """Images in a batch."""
    threads: int = cpu_count()
    """Host threads that decode."""
    prefetch: int = StreamConfig.prefetch
    """Batches in flight."""
    hw_decoder_load: float = StreamConfig.hw_decoder_load
    """Share of a batch that the JPEG engines of a GPU decode."""
    img_s: float | None = None
    """Images per second that the trainer takes; with --plan: that the whole job takes."""
    seconds: float = 1.5
    """Least measuring time of each stage, in seconds."""
    out: Path = Path()
    """Folder for throughput.json, throughput.html and tuning.toml."""
    compare: Path | None = None
    """An earlier throughput.json; exit code 1 if the stream is slower now, beyond noise."""
    tune: bool = False
    """Search threads, prefetch depth (and decoder load) by measuring; writes tuning.toml."""
    rate: bool = False
    """Measure the stream's rate only."""
    reader: Literal["stream", "native"] = "stream"
    """Reader: `native` is DALI's own for WebDataset shards; only with --rate."""
    loader: Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None
    """Function without arguments that returns an iterable of batches, which is measured; beside the
    stream in turn if DATA is given."""
    ledger: Path | None = None
    """Folder for a ledger, to measure the cost of writing one; only with --rate."""
    windows: int = 5
    """Windows of time, of whose rates the median is the result; only with --rate."""
    batches: int = 40
    """Batches in each window; only with --rate."""
    plan: bool = False
    """Compute what a job needs, from a measured report."""
    measured: Path | None = None
    """Measured report; default: throughput.json here, if there is one that is of this machine and
    of DATA; only with --plan."""
    gpus: int = 2
    """GPUs of the job; only with --plan."""
    gpus_per_node: int = 8
    """GPUs of a node; only with --plan."""
    store: Annotated[StoreKind, tyro.conf.arg(name="store-kind")] = "disk"
    """Store of the data set; only with --plan."""
    images: int = 0
    """Images in an epoch; default: as measured, or ImageNet's; only with --plan."""
    json: bool = False
    """Print one JSON object on stdout."""

    def check(self) -> None:
        """Raise UsageError for arguments that cannot work."""
        counts = ("batch_size", "threads", "prefetch", "windows", "batches", "window",
                  "gpus_per_node")  # fmt: skip
        for name in counts:
            require_range(name, getattr(self, name), 1, float("inf"), "1 or more")
        require_range("images", self.images, 0, MOST_IMAGES)
        require_range("gpus", self.gpus, 1, MOST_GPUS)
        if self.img_s is not None and not 0 < self.img_s < float("inf"):
            raise UsageError(f"--img-s is {self.img_s}; it must be above 0")
        if not 0 < self.seconds < 3600:
            raise UsageError(f"--seconds is {self.seconds}; it must be above 0")
        self._check_form()
        if self.plan and self.img_s is None:
            raise UsageError("--plan needs --img-s: the images a second that the job takes")
        if self.data is None and not self.plan and self.loader is None:
            raise UsageError("name a data set: duet throughput DATA")
        if self.reader == "native" and not self.rate:
            raise UsageError("--reader native goes with --rate: it has no stages to measure")
        if not self.out.is_dir():
            raise UsageError(f"--out {self.out} is no folder; make it, or name another")
        if not os.access(self.out, os.W_OK):
            raise UsageError(f"--out {self.out} cannot be written to; name another folder")

    def _check_form(self) -> None:
        """Refuse flags of two forms of the command, of which one would have no effect."""
        forms = [f"--{name}" for name in ("plan", "rate", "tune", "loader") if getattr(self, name)]
        if len(forms) > 1:
            raise UsageError(f"{' and '.join(forms)} exclude each other; give one of them")
        if self.compare is not None and forms:
            raise UsageError(f"--compare goes with a whole report, not with {forms[0]}")
        for name, form in (("measured", "--plan"), ("ledger", "--rate")):
            if getattr(self, name) is not None and form not in forms:
                raise UsageError(f"--{name} goes with {form} only; give both, or neither")
