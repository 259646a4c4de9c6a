"""Time and memory of planning a set of millions: `python benchmarks/plan.py [--images N]`.

The listing of N images (14 million unless told otherwise) in N / 1000 folders is written by
`ListingWriter` as a scan would; all after that is what `pipeline.build_shards` does before it opens
the first image. Reading real folders comes on top: about a second for a million files.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.memory import read_memory
from harness.report import Figure, Options, Report, Table, start

from pipeline.options import BuildConfig
from pipeline.packing import plan
from pipeline.sources import Listing, ListingWriter

FOLDER = 1000
"""Images in a folder."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """Plan a made-up set."""

    images: float = 14e6
    """Number of images."""


def report(options: PlanOptions) -> Report:
    """Plan, with seconds and memory (what is mapped from files included) after each step."""
    images = int(options.images)
    begun = time.perf_counter()
    rows: list[tuple[str, float, int]] = []

    def note(what: str) -> None:
        rows.append((what, time.perf_counter() - begun, read_memory("VmHWM")))

    def write_listing(source: str, scratch: Path, **_: Any) -> Listing:
        writer = ListingWriter(scratch, source)
        for folder in range(images // FOLDER):
            name = f"n{folder // 14:08d}"
            container = writer.container("folder", f"{source}/{name}/{folder}")
            writer.add(container, name, [f"{name}_{place}.JPEG" for place in range(FOLDER)])
        note(f"{images:,} listed")
        return writer.finish()

    plan.scan = write_listing
    with tempfile.TemporaryDirectory() as scratch:
        config = BuildConfig(out="/nowhere/out", train="/nowhere/pictures", holdout=0.01)
        made = plan.make_plan(config, Path(scratch))
        note(f"{sum(1 for _ in made.parts()):,} chunks planned")
    cells = [(what, f"{seconds:.1f}", f"{memory / 1e6:,.0f}") for what, seconds, memory in rows]
    return Report(
        tables={"plan": Table(("step", "seconds until then", "most memory, MB"), cells)},
        figures={"planning": Figure([rows[-1][1]], "s", "lower"),
                 "memory": Figure([rows[-1][2] / 1e6], "MB", "lower")},
    )  # fmt: skip


if __name__ == "__main__":
    start(PlanOptions, report, __doc__)
