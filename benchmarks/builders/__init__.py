"""The ways to pack that `benchmarks/build.py` compares, one small program each.

    python benchmarks/builders/PROGRAM.py LIST OUT WORKERS

LIST has a line an image, its path and its label with a tab between; OUT is an empty folder. Each
program uses WORKERS processes and is timed from outside, with its start and all its imports. They
are written as people write them; what each one does is in its docstring.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Builder:
    """One line of the comparison."""

    title: str
    """Name in the table."""
    program: str
    """Name of the file here; of ours, the module that is run."""
    module: str | None = None
    """The library that must be there, by its import name; None where Duet needs it anyway."""
    library: str | None = None
    """Name of the library on the package index, for its version."""


BUILDERS = {
    "ours": Builder(title="pipeline.build_shards", program="pipeline.build_shards"),
    "limit": Builder(title="bare decode (the limit)", program="bare_decode", library="simplejpeg"),
    "plain": Builder(
        title="Pillow + webdataset.ShardWriter", program="pillow_shards", library="webdataset"
    ),
    "litdata": Builder(
        title="litdata.optimize, Pillow",
        program="litdata_chunks",
        module="litdata",
        library="litdata",
    ),
    "hf": Builder(
        title="datasets.Dataset.from_generator, Pillow",
        program="hf_arrow",
        module="datasets",
        library="datasets",
    ),
    "img2dataset": Builder(
        title="img2dataset.Resizer + ShardWriter",
        program="img2dataset_resizer",
        module="img2dataset",
        library="img2dataset",
    ),
    "opencv": Builder(
        title="simplejpeg + OpenCV INTER_AREA + ShardWriter",
        program="opencv_area",
        module="cv2",
        library="opencv-python-headless",
    ),
}
"""Builders by their names on the command line; the others are compared with the first."""
