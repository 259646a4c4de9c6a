"""Withdraw samples from a data set: a new version lacks them, and no version delivers them.

    python -m pipeline.withdraw DATA --keys FILE
    python -m pipeline.withdraw DATA --class NAME --purge

The version before stays readable, but whoever reads it gets another sample in place of each that
was withdrawn. Their bytes stay in the shards until --purge overwrites them there. A command that
was killed is repeated; where only its purge was left, `--purge` alone resumes it.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from pipeline.dataset.manifest import Manifest
from pipeline.options import WithdrawOptions
from pipeline.packing.build import disk_errors_in_one_line
from pipeline.packing.revision import Parent
from pipeline.packing.withdrawal import find_class, find_samples, withdraw
from pipeline.remote.target import Target, is_finished, open_target
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, run
from pipeline.tools.processes import LocalPool, Pool


def make_version(
    options: WithdrawOptions, target: Target | None = None, pool: Pool | None = None
) -> Manifest:
    """Make the version without the samples that the options name.

    Args:
        options: the settings.
        target: the data set; by default that of `options.data`.
        pool: decodes images; by default processes of this machine.

    Returns:
        The manifest of the newest version.

    Raises:
        UsageError: no such data set, key or class, or another command changes the set.
        DataError: the set is damaged.
    """
    options.check()
    target = target or open_target(options.data)
    with disk_errors_in_one_line(target):
        if not is_finished(target):
            raise UsageError(f"{target.address} holds no data set; name one that duet verify takes")
        with target.reserve(extends=True), target.scratch() as scratch:
            parent = Parent(target, scratch)
            gone = {}
            if options.keys is not None:
                gone = find_samples(parent, _read_keys(options.keys))
            elif options.class_name is not None:
                gone = find_class(parent, options.class_name)
            elif not parent.withdrawn:
                raise UsageError(f"nothing was withdrawn from {target.address}; give --keys FILE")
            with nullcontext(pool) if pool else LocalPool(options.workers) as workers:
                return withdraw(parent, gone, workers, scratch, purge=options.purge)


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(
            f"--keys {path} cannot be read ({error.strerror}); name a file of one name a line"
        ) from error
    if not (keys := [line for line in lines if line]):
        raise UsageError(f"--keys {path} names no sample; put one name a line into it")
    return keys


def main(argv: list[str] | None = None) -> int:
    """Withdraw, then report the new version."""
    options = parse_options(WithdrawOptions, argv, "python -m pipeline.withdraw")
    manifest = make_version(options)
    samples = {name: split.samples for name, split in manifest.splits.items()}
    if options.json:
        facts = {"data": options.data, "version": manifest.number, "samples": samples}
        sys.stdout.write(json.dumps(facts | {"change": manifest.change}) + "\n")
    left = ", ".join(f"{count:,} {name}" for name, count in samples.items())
    count = manifest.change.get("withdrawn", 0)
    sys.stderr.write(
        f"version {manifest.number} of {options.data}: {count:,} samples withdrawn, {left} left\n"
    )
    return 0


if __name__ == "__main__":
    run(main)
