"""The settings of a build."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.dataset.images import Encoding
from pipeline.remote.dataset import is_remote
from pipeline.tools.errors import UsageError

Chroma = Literal["4:2:0", "4:4:4"]


@dataclass(frozen=True, kw_only=True)
class Build:
    """Pack pictures into WebDataset tar shards that Duet, DALI and webdataset all read."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the data set; created if need be."""
    train: Annotated[str, tyro.conf.arg(metavar="SRC")]
    """Training pictures: a folder per class, ILSVRC's or any tars of classes, Kaggle's tree, a
    folder (or addresses) of parquet files or of WebDataset shards."""
    val: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """Validation pictures, in any of these forms; also ILSVRC's flat tar or folder."""
    val_labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Labels of flat validation pictures: ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or a
    list of synsets; without it they are looked for beside the pictures."""
    holdout: float = 0.0
    """Without --val: the share of each class's training pictures to keep for validation."""
    seed: int = 0
    """Seed of the shuffle over each split (and of what is held out)."""
    samples_per_shard: int = 1000
    """Samples in each shard but the last; 1000 raw ones are a tar of 199 MB."""
    encoding: Encoding = "jpeg"
    """How the 256x256 pictures are stored: `jpeg`, or `raw` uint8 pixels (KEY.npy), which need no
    decoding and about six times the space (197 kB a picture; ImageNet: 255 GB)."""
    quality: int = 96
    """JPEG quality of the stored pictures, 1..100; only for --encoding jpeg. From 96 on the encoder
    uses its accurate cosine transform: 39.2 dB where 95 has 38.6 and 90 has 36.4."""
    chroma: Chroma = "4:2:0"
    """Colour of stored JPEGs at half resolution, or at full; only for --encoding jpeg."""
    min_side: int = 8
    """Pictures with a side shorter than this many pixels are left out."""
    max_rejects: float = 0.001
    """Share of all pictures that may be left out; with more of them the build fails."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that decode and encode."""
    json: bool = False
    """Print one JSON object about the finished set on stdout."""

    def check(self) -> None:
        """Refuse values that cannot work, each in one line (UsageError)."""
        for name, low, high in (
            ("samples_per_shard", 1, 100_000),
            ("quality", 1, 100),
            ("min_side", 1, 256),
            ("workers", 1, 1024),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{_flag(name)} {value} is out of range; give {low} to {high}")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"--holdout {self.holdout} is out of range; give 0 to below 1")
        if not 0 <= self.max_rejects <= 1:
            raise UsageError(f"--max-rejects {self.max_rejects} is out of range; give 0 to 1")
        for name in ("quality", "chroma"):
            value = getattr(self, name)
            if self.encoding == "raw" and value != getattr(Build, name):
                raise UsageError(
                    f"{_flag(name)} {value} says nothing about --encoding raw; leave it out"
                )
        if self.val is not None and self.holdout:
            raise UsageError("--val and --holdout exclude each other; give one of them")
        if self.val is None and self.val_labels is not None:
            raise UsageError("--val-labels goes with --val; name the validation pictures too")
        self._out_is_no_source()

    def _out_is_no_source(self) -> None:
        if is_remote(self.out):
            return
        out = _local(self.out)
        for source in filter(None, (self.train, self.val)):
            if not is_remote(source) and out.is_relative_to(_local(source)):
                raise UsageError(f"{self.out} lies inside the source {source}; name another OUT")


def _local(path: str) -> Path:
    return Path(path.removeprefix("file://")).resolve()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
