"""Give a folder of WebDataset shards an index and a manifest, so that they train as they are.

    python -m pipeline.index_shards DIR [--train GLOB] [--val GLOB] [--classes FILE]

For shards that another tool made of 256x256 JPEGs (`.jpg` or `.jpeg`, with the label in `.cls` or
`.json`). Every picture is decoded once, and what cannot be trained from is named by shard and key;
then nothing is written, unless --skip-bad leaves it out. Pictures of other sizes or kinds need
`python -m pipeline.build_shards OUT --train DIR`. Nothing in DIR is changed, files are added.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.indexing.foreign import WORKERS, Outcome, Request, index_folder
from pipeline.tools.errors import DataError, UsageError, run

LISTED = 20
"""Lines about bad samples on the terminal; --json has them all."""


@dataclass(frozen=True, kw_only=True)
class IndexShards:
    """Index shards that another tool made, where they lie."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the shards (.tar, not compressed); files are added to it, none is changed."""
    train: str | None = None
    """Names of the training shards, with * and ?; else those with `train` in their name."""
    val: str | None = None
    """Names of the validation shards; else those with `val` or `validation`."""
    classes: Path | None = None
    """Class names in the order of their labels: a line each, or a JSON list."""
    skip_bad: bool = False
    """Leave out samples that cannot be used, and list them in DIR/rejects.jsonl."""
    workers: int = WORKERS
    """Processes that read and decode."""
    json: bool = False
    """Print one JSON object on stdout."""


def main() -> int:
    """Index, or say what stands against it."""
    options = tyro.cli(IndexShards, prog="python -m pipeline.index_shards", description=__doc__)
    if not 1 <= options.workers <= 1024:
        raise UsageError(f"--workers {options.workers} is out of range; give 1 to 1024")
    for flag, glob in (("--train", options.train), ("--val", options.val)):
        if glob is not None and "/" in glob:
            raise UsageError(f"{flag} {glob} has a /; give names of files in {options.folder}")
    started = time.monotonic()
    request = Request(
        folder=Path(options.folder),
        train=options.train,
        val=options.val,
        classes=options.classes,
        skip_bad=options.skip_bad,
        workers=options.workers,
    )
    outcome = index_folder(request)
    seconds = time.monotonic() - started
    if options.json:
        sys.stdout.write(json.dumps(_facts(options.folder, outcome, seconds)) + "\n")
    for bad in outcome.bad[:LISTED]:
        sys.stderr.write(f"{bad}\n")
    if (more := len(outcome.bad) - LISTED) > 0:
        sys.stderr.write(f"... and {more:,} more\n")
    if outcome.manifest is None:
        raise DataError(_way_out(options.folder, outcome))
    _tell(options.folder, outcome, seconds)
    return 0


def _facts(folder: str, outcome: Outcome, seconds: float) -> dict[str, object]:
    facts: dict[str, object] = {
        "data": folder,
        "indexed": outcome.manifest is not None,
        "bad": [one._asdict() for one in outcome.bad],
        "unused": outcome.unused,
        "seconds": round(seconds, 3),
    }
    if outcome.manifest is not None:
        splits = outcome.manifest.splits
        facts["samples"] = {name: split.samples for name, split in splits.items()}
        facts["shards"] = {name: len(split.shards) for name, split in splits.items()}
        facts["classes"] = len(outcome.manifest.classes)
    return facts


def _way_out(folder: str, outcome: Outcome) -> str:
    if any(not bad.key for bad in outcome.bad):
        return (
            f"{folder} cannot be indexed, and nothing was written; mend or move away what is named "
            "above"
        )
    count = len(outcome.bad)
    return (
        f"{count:,} {'sample' if count == 1 else 'samples'} of {folder} cannot be trained from as "
        "they are, and nothing was written; leave them out with --skip-bad, or repack with "
        f"`python -m pipeline.build_shards OUT --train {folder}`"
    )


def _tell(folder: str, outcome: Outcome, seconds: float) -> None:
    manifest = outcome.manifest
    assert manifest is not None
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    left_out = f", {manifest.rejected:,} left out (rejects.jsonl)" if manifest.rejected else ""
    unused = f"; {len(outcome.unused)} tars are in no split" if outcome.unused else ""
    count = sum(split.samples for split in manifest.splits.values())
    sys.stderr.write(
        f"data set {folder}: {parts} pictures of {len(manifest.classes)} classes"
        f"{left_out}{unused}, indexed in {seconds:.1f} s "
        f"({count / max(seconds, 1e-9):,.0f} pictures/s)\n"
    )


if __name__ == "__main__":
    run(main)
