"""Pack images into a sealed data set of WebDataset shards, on all nodes of a Ray cluster.

    python -m cluster.build_shards OUT --train SRC [--val SRC | --holdout 0.1]
    ray job submit --working-dir . -- python -m cluster.build_shards /shared/OUT --train SRC ...

The flags and the bytes are those of `pipeline.build_shards`, and either goes on with what the other
began. OUT and the sources must be where every node sees them: shared folders, or addresses
(s3://bucket/set). Starts a Ray on this machine, reachable from this machine only, unless
RAY_ADDRESS names one (`ray job submit` sets it). Nodes may die, leave and join meanwhile.
"""

from __future__ import annotations

import io
import os
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, fields

from cluster.launch.session import refuse_relative
from cluster.launch.task_pool import RayPool
from pipeline.build_shards import report_build
from pipeline.options import BuildConfig
from pipeline.packing.additions import add_version
from pipeline.packing.build import build
from pipeline.remote.filesystem import is_remote
from pipeline.remote.target import is_finished, open_target
from pipeline.tools.arguments import parse_options, require_range
from pipeline.tools.errors import run


@dataclass(frozen=True, kw_only=True)
class ClusterBuild(BuildConfig):
    """Pack images into WebDataset shards on a cluster."""

    workers: int = 0
    """Tasks under way at a time, one CPU each; 0: as many as the cluster has CPUs for."""


def main(argv: list[str] | None = None) -> int:
    """Build, then say what was built.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    asked = parse_options(ClusterBuild, argv, "python -m cluster.build_shards")
    workers = asked.workers
    require_range("workers", workers, 0, 100_000, "0 (all) to 100000")
    given = {field.name: getattr(asked, field.name) for field in fields(BuildConfig)}
    options = BuildConfig(
        **given | {"workers": 1}
    )  # of this class for all nodes; theirs is in the pool
    refuse_relative("OUT", options.out)
    sources = {
        "--train": options.train,
        "--val": options.val,
        "--test": options.test,
        "--add": options.add,
    }
    for name, source in sources.items():
        refuse_relative(name, source or "/", missing=True)
    target = open_target(_resolve_out(options.out))
    started = time.monotonic()
    known = is_finished(target) and not options.extends
    aside = io.StringIO()  # what Ray has to say on stdout
    with redirect_stdout(aside), RayPool(workers) as pool:
        manifest = (add_version if options.extends else build)(options, target, pool)
    report_build(options, manifest, target, None if known else time.monotonic() - started)
    return 0


def _resolve_out(out: str) -> str:
    """Return OUT as workers find it, which run elsewhere."""
    return out if is_remote(out) or out.lower().startswith("file://") else os.path.abspath(out)


if __name__ == "__main__":
    run(main)
