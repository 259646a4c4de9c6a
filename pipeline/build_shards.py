"""Pack images into a sealed data set of WebDataset shards.

    python -m pipeline.build_shards OUT --train SRC [--val SRC | --holdout 0.1]

The kind of `SRC` is detected; see `pipeline.sources`. Every image is brought to its size (256x256
unless `--size` and `--fit` say other), shuffled over its whole split by the seed, and packed: as a
JPEG, or with `--encoding raw` as its pixels, which need no decoding and about six times the space.
Other members of its sample are packed with it (`--fields`, `--masks`). Images that cannot be read
are skipped, counted, and listed in OUT/rejects.jsonl; too many of them, and the build fails. A
killed build resumes when the same command is run again; on a finished set the command does nothing.
While packing, OUT takes twice the room of the finished set.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tar import escape
from pipeline.options import BuildConfig
from pipeline.packing.additions import add_version
from pipeline.packing.build import build
from pipeline.packing.duplicates import NAME as DUPLICATES
from pipeline.packing.shards import REJECTS
from pipeline.remote.target import Target, is_finished, open_target
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import run
from pipeline.tools.jsonl import parse_rows
from pipeline.tools.text import human_bytes

LEAKS_SHOWN = 5
"""Number of leaks shown on the terminal; the file lists them all."""


def report_build(
    options: BuildConfig, manifest: Manifest, target: Target, seconds: float | None
) -> None:
    """Report a finished set on stderr (and stdout); `seconds` is None if it existed before."""
    if options.json:
        sys.stdout.write(json.dumps(build_facts(options, manifest, seconds)) + "\n")
    report = [*summary_lines(options, manifest, seconds), *leak_lines(manifest, target)]
    sys.stderr.write("".join(f"{line}\n" for line in report))


def build_facts(options: BuildConfig, manifest: Manifest, seconds: float | None) -> dict[str, Any]:
    """Return the JSON object that `--json` prints."""
    return {
        "data": options.out,
        "samples": {name: split.samples for name, split in manifest.splits.items()},
        "shards": {name: len(split.shards) for name, split in manifest.splits.items()},
        "bytes": sum(split.bytes for split in manifest.splits.values()),
        "encoding": manifest.encoding,
        "classes": len(manifest.classes),
        "rejected": manifest.rejected,
        "duplicates": manifest.duplicates,
        "leaks": manifest.leaks,
        "seconds": round(seconds or 0, 3),
        **({"version": manifest.number, "change": manifest.change} if manifest.parent else {}),
    }


def summary_lines(options: BuildConfig, manifest: Manifest, seconds: float | None) -> Iterator[str]:
    """Yield the lines about samples, size and duplicates for the terminal."""
    out = options.out
    size = human_bytes(sum(split.bytes for split in manifest.splits.values()))
    place = f"{out}/{manifest.tables_in}".rstrip("/")
    out = f"{out}, version {manifest.number}" if manifest.number > 1 else out
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    classes = f"{len(manifest.classes):,}" if manifest.classes else "no"
    skipped = f", {manifest.rejected:,} skipped ({place}/{REJECTS})" if manifest.rejected else ""
    time_taken = "built before" if seconds is None else f"{seconds:.0f} s"
    yield (
        f"data set {out}: {parts} images of {classes} classes{skipped}, "
        f"{size} of {manifest.encoding} shards, {time_taken}"
    )
    if manifest.duplicates:
        groups = _count_groups(manifest.duplicates)
        yield f"{groups} of the same or nearly the same image ({place}/{DUPLICATES})"


def leak_lines(manifest: Manifest, target: Target) -> Iterator[str]:
    """Yield a warning about images in more than one split, and the first of them."""
    if not manifest.leaks:
        return
    yield (
        f"warning: {_count_groups(manifest.leaks)} of them in more than one split: what is "
        "validated was trained on"
    )
    rows = parse_rows(target.read(f"{manifest.tables_in}/{DUPLICATES}".lstrip("/")).splitlines())
    for row in itertools.islice((row for row in rows if row and row["leak"]), LEAKS_SHOWN):
        names: dict[str, str] = {}
        for member in row["members"]:
            names.setdefault(member["split"], member["name"])
        yield "  " + " = ".join(f"{split} {escape(name)}" for split, name in names.items())
    if manifest.leaks > LEAKS_SHOWN:
        yield f"  and {manifest.leaks - LEAKS_SHOWN:,} more"


def _count_groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count:,} groups"


def main(argv: list[str] | None = None) -> int:
    """Build, then report the data set."""
    options = parse_options(BuildConfig, argv, "python -m pipeline.build_shards")
    started = time.monotonic()
    target = open_target(options.out)
    known = is_finished(target) and not options.extends
    manifest = (add_version if options.extends else build)(options, target)
    report_build(options, manifest, target, None if known else time.monotonic() - started)
    return 0


if __name__ == "__main__":
    run(main)
