"""Pack pictures into a sealed data set of WebDataset shards.

    python -m pipeline.build_shards OUT --train SRC [--val SRC | --holdout 0.1]

What `SRC` is, is found out by looking; see `pipeline.sources`. Every picture is cut to 256x256,
shuffled over its whole split by the seed, and packed: as a JPEG, or with `--encoding raw` as its
pixels, which need no decoding and about six times the space. Pictures that cannot be read are left
out, counted, and listed in OUT/rejects.jsonl; too many of them, and the build fails. A build that
was killed goes on when the same command is run again; on a finished set the command does nothing.
While packing, OUT takes twice the room of the finished set.
"""

from __future__ import annotations

import time

import tyro

from pipeline.packing.build import build
from pipeline.packing.options import Build
from pipeline.packing.store_target import target_for
from pipeline.packing.summary import tell
from pipeline.remote.target import finished
from pipeline.tools.errors import run


def main() -> int:
    """Build, then say what was built."""
    options = tyro.cli(Build, prog="python -m pipeline.build_shards", description=__doc__)
    started = time.monotonic()
    target = target_for(options.out)
    known = finished(target)
    manifest = build(options, target)
    tell(options, manifest, target, None if known else time.monotonic() - started)
    return 0


if __name__ == "__main__":
    run(main)
