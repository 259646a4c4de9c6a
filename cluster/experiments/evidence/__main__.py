"""Command: one page with every claim of the paper that runs here can test.

    python -m cluster.experiments.evidence RUN... [--data DATA] [--out FILE] [--json]

RUN is a run, a folder of runs, the folder of a study, or a result of
`cluster.experiments.ensemble --out`. The page needs no network, no script and no other file. Runs
that differ only in their seed are grouped, with the spread over seeds; a missing result is listed
with the command that makes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.cli.options import EvidenceOptions
from cluster.experiments.evidence.figures import make_neighbors, show_answers, show_kernels
from cluster.experiments.evidence.items import make_results
from cluster.experiments.evidence.runs import (
    Evidence,
    describe_data,
    format_count,
    gather_evidence,
)
from cluster.experiments.evidence.studies import make_studies
from cluster.report.page import load_templates
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write


def make_page(paths: Sequence[Path], data: str = "") -> Evidence:
    """Compare the paper's claims with the runs and results in `paths`.

    Raises:
        UsageError: a folder is no run, or a run has no checkpoint.
        DataError: none of a run's checkpoints is sound.
    """
    if not paths:
        raise UsageError("no run was named; name one or more, or a folder of runs")
    evidence = gather_evidence(paths, data)
    for make in (make_results, show_kernels, show_answers, make_neighbors, make_studies):
        evidence.items += make(evidence)
    evidence.items.sort(key=lambda item: item.weight)  # what says something comes first
    return evidence


def render(page: Evidence) -> str:
    """Return the page as HTML."""
    environment = load_templates(Path(__file__).parent)
    environment.filters |= {"format_count": format_count, "describe_data": describe_data}
    template = environment.get_template("evidence.html.j2")
    return template.render(vars(page), runs=len(page.runs))


def choose_file(paths: Sequence[Path]) -> Path:
    """Return the default file: evidence.html in the folder that holds all `paths`."""
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    return Path(os.path.commonpath(folders)) / "evidence.html"


def main(argv: list[str] | None = None) -> int:
    """Write the page and print its path.

    Raises:
        DuetError: as `make_page`.
        UsageError: the file cannot be written.
    """
    options = parse_options(EvidenceOptions, argv, "python -m cluster.experiments.evidence")
    if options.out is not None and options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; name a file")
    page = make_page(options.runs, options.data)
    out = options.out or choose_file(options.runs)
    try:
        with atomic_write(out) as file:
            file.write(render(page).encode(errors="replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{out} cannot be written ({reason}); name another --out") from error
    count = len(page.runs)
    words = f"{len(page.items)} claims, {count} run{'s' if count != 1 else ''} -> {out}\n"
    (sys.stderr if options.json else sys.stdout).write(words)
    if options.json:
        sys.stdout.write(json.dumps(page.as_json()) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
