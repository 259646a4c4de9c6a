"""Time and memory of planning a set of millions: `python benchmarks/plan.py [N]`.

The listing of N images (14 million unless told otherwise) in N / 1000 folders is written by
`ListingWriter` as a scan would; all after that is what `pipeline.build_shards` does before it opens
the first image. Reading real folders comes on top: about a second for a million files.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.options import BuildConfig
from pipeline.packing import plan
from pipeline.sources import Listing, ListingWriter

FOLDER = 1000
"""Images in a folder."""


def most_memory() -> float:
    """Return the most memory this process has had, in MB (what is mapped from files included)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Plan, and print seconds and memory of each step."""
    images = int(float(sys.argv[1])) if len(sys.argv) > 1 else 14_000_000
    begun = time.perf_counter()

    def print_step(what: str) -> None:
        print(f"{what:22}{time.perf_counter() - begun:6.1f} s {most_memory():8,.0f} MB")

    def write_listing(source: str, scratch: Path, **_: Any) -> Listing:
        writer = ListingWriter(scratch, source)
        for folder in range(images // FOLDER):
            name = f"n{folder // 14:08d}"
            container = writer.container("folder", f"{source}/{name}/{folder}")
            writer.add(container, name, [f"{name}_{place}.JPEG" for place in range(FOLDER)])
        print_step(f"{images:,} listed")
        return writer.finish()

    plan.scan = write_listing
    with tempfile.TemporaryDirectory() as scratch:
        options = BuildConfig(out="/nowhere/out", train="/nowhere/pictures", holdout=0.01)
        made = plan.make_plan(options, Path(scratch))
        print_step(f"{sum(1 for _ in made.parts()):,} chunks planned")


if __name__ == "__main__":
    main()
