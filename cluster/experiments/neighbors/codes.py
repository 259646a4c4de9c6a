"""Short binary codes for pictures: what section 6.1 of the paper proposes and did not do.

    python -m cluster.experiments.neighbors RUN --data DATA          # makes the features, once
    python -m cluster.experiments.neighbors.codes RUN [--bits 64 128 256] [-k 10] [--json]

"... could be made efficient by training an auto-encoder to compress these vectors to short binary
codes." Trains one for each length on the features of the base alone, and searches by Hamming
distance. Beside it: the exact search, signs of principal components, ITQ, and with faiss installed
product quantisation. Prints and writes, into RUN/neighbours/

    summary.json             the table
    codes-64.safetensors     the codes of the base, and the network that makes them

A length that is there already is not trained again; a call that was killed goes on with the next.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import tyro

from cluster.experiments.neighbors.features import MAKE, Features, stem
from cluster.neighbours import rivals
from cluster.neighbours.summary import NAME, write
from cluster.neighbours.trained import FOLDER, fingerprint, settings
from cluster.neighbours.trial import SHORTLIST, Options, Trial
from pipeline.tools.errors import DataError, DuetError, UsageError, run
from pipeline.tools.files import writable_folder


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = tyro.cli(Options, args=argv, prog="python -m cluster.experiments.neighbors.codes")
    settings(options.run)
    kept = options.features or options.run / FOLDER
    if not kept.is_dir():
        raise UsageError(f"there are no features in {kept}; {MAKE}")
    folder = writable_folder(options.run / FOLDER, "the run's folder")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = codes(options, kept, folder)
    out = sys.stderr if options.json else sys.stdout
    out.write("\n".join([*_lines(result["codes"]), f"-> {folder / NAME}"]) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def codes(options: Options, kept: Path, folder: Path) -> dict[str, Any]:
    """Do it all and return what is in summary.json.

    Args:
        options: the flags.
        kept: folder of the features.
        folder: for the results.

    Raises:
        UsageError: no features, more neighbours than pictures, or lengths that cannot be.
        DataError: features of another run, or damaged.
    """
    asked, base = (Features(stem(kept, split)) for split in (options.queries, options.base))
    _check(options, asked, base)
    trial = Trial(options, asked, base)
    rows = list(trial.rows(folder))
    facts = {
        "k": options.k,
        "shortlist": trial.shortlist,
        "queries": {"split": options.queries, "pictures": len(trial.ids)},
        "base": {"split": options.base, "pictures": int(base.sound.sum())},
        "units": base.about.units,
        "threads": len(os.sched_getaffinity(0)),
        "seed": options.seed,
        "rows": rows,
    }
    return write(folder, options.run, base.about, "codes", facts)


def _check(options: Options, asked: Features, base: Features) -> None:
    """Refuse features that do not go together, and numbers out of range.

    Raises:
        UsageError, DataError: see `codes`.
    """
    one, two = asked.about, base.about
    if one.checkpoint_sha256 != two.checkpoint_sha256 or one.data_sha256 != two.data_sha256:
        raise DataError(f"features {asked.path} and {base.path} are not of one run and data set")
    _of_this_run(options, base)
    there = int(base.sound.sum()) - (options.queries == options.base)
    for name, value in (("-k", options.k), ("--asked", options.asked), ("--steps", options.steps),
                        ("--hidden", options.hidden)):  # fmt: skip
        if value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    if options.k > min(there, SHORTLIST):
        raise UsageError(
            f"{options.k} neighbours asked for; there are {there:,} pictures to find, and "
            f"{SHORTLIST} are looked at; ask for fewer with -k"
        )
    most = min(two.units, there, rivals.SAMPLE)
    for bits in options.bits:
        if bits % 8 or not 8 <= bits <= most:
            raise UsageError(
                f"--bits {bits}: give multiples of 8 up to {most // 8 * 8} (there are {two.units} "
                f"features and {there:,} pictures)"
            )
    asked.verify()
    base.verify()


def _of_this_run(options: Options, base: Features) -> None:
    """Refuse features of another run, as far as the run still has the checkpoint to tell."""
    config = settings(options.run)[0]
    mine = base.about.checkpoint_sha256
    with suppress(OSError, ValueError, KeyError, TypeError, DuetError):
        mine = fingerprint(options.run, config, base.about.checkpoint)
    if mine != base.about.checkpoint_sha256:
        raise DataError(
            f"features {base.path} are of another run than {options.run}, whose checkpoint "
            f"{base.about.checkpoint} differs; {MAKE}"
        )


def _lines(facts: dict[str, Any]) -> list[str]:
    k, queries, base = facts["k"], facts["queries"], facts["base"]
    lines = [
        f"{queries['pictures']:,} pictures of {queries['split']} among {base['pictures']:,} of "
        f"{base['split']}; recall: share of the {k} exact neighbours found among the first {k}, "
        f"and among the first {facts['shortlist']}",
        "method                 bits   bytes  recall  in list  precision  queries/s  training",
    ]
    for row in facts["rows"]:
        start = f"{row['method']:<21}{row['bits']:>6,}{row['bytes']:>8,}"
        if "missing" in row:
            lines.append(f"{start}  {row['missing']}")
            continue
        lines.append(
            f"{start}{row['recall_at_k']:8.1%}{row['recall_in_shortlist']:9.1%}"
            f"{row['precision_at_k']:11.1%}{row['queries_s']:11,.0f}{row['train_s']:9,.1f} s"
        )
    return lines


if __name__ == "__main__":
    run(main)
