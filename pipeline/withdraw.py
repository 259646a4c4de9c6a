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
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from pipeline.dataset.manifest import Manifest
from pipeline.options import WithdrawOptions
from pipeline.packing.build import disk_errors_in_one_line
from pipeline.packing.revision import Ids, Parent
from pipeline.packing.withdrawal import Withdrawal, find_class, find_samples, withdraw
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
    return run_withdrawal(options, target, pool).manifest


def run_withdrawal(
    options: WithdrawOptions, target: Target | None = None, pool: Pool | None = None
) -> Withdrawal:
    """Make the version as `make_version`, and return what was done."""
    options.check()
    target = target or open_target(options.data)
    with disk_errors_in_one_line(target):
        if not is_finished(target):
            raise UsageError(f"{target.address} holds no data set; name one that duet verify takes")
        with target.reserve(extends=True), target.scratch() as scratch:
            parent = Parent(target, scratch)
            gone, keys = dict[str, Ids](), list[str]()
            if options.keys is not None:
                keys = _read_keys(options.keys)  # once: it may be a pipe
                gone = find_samples(parent, keys)
            elif options.class_name is not None:
                gone = find_class(parent, options.class_name)
            elif not parent.withdrawn:
                raise UsageError(f"nothing was withdrawn from {target.address}; give --keys FILE")
            with nullcontext(pool) if pool else LocalPool(options.workers) as workers:
                done = withdraw(parent, gone, workers, scratch, purge=options.purge)
                return done._replace(names=len(set(keys)))


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
    done = run_withdrawal(options)
    manifest = done.manifest
    if options.json:
        samples = {name: split.samples for name, split in manifest.splits.items()}
        facts = {"data": options.data, "version": manifest.number, "samples": samples}
        facts |= {"change": manifest.change, "new": done.is_new}
        purge = {"purged": done.purged, "shards": done.shards, "rewritten": done.rewritten}
        sys.stdout.write(json.dumps(facts | (purge if options.purge else {})) + "\n")
    sys.stderr.write(
        f"version {manifest.number} of {options.data}: {'; '.join(_describe(options, done))}\n"
    )
    return 0


def _describe(options: WithdrawOptions, done: Withdrawal) -> Iterator[str]:
    """Yield what was withdrawn, and what was purged."""
    counts = done.manifest.change.get("withdrawn_from", {})
    if options.keys is not None or options.class_name is not None:
        what = f"class {options.class_name}"
        if done.names:
            what = f"{done.names:,} name{'s' * (done.names != 1)}"
        found = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        splits = done.manifest.splits.items()
        left = ", ".join(f"{split.samples:,} {name}" for name, split in splits)
        samples = sum(counts.values())
        lost = f"{samples:,} sample{'s' * (samples != 1)} withdrawn ({found})"
        yield f"{what}, {lost}, {left} left"
    if options.purge:
        held = f"{done.purged:,} withdrawn samples in {done.shards:,} shards"
        if done.rewritten:
            yield f"the bytes of {held} are gone, {done.rewritten:,} shards rewritten"
        else:
            yield f"the bytes of {held} were gone already, and nothing was done"


if __name__ == "__main__":
    run(main)
