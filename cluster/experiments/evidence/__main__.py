"""One page of evidence: every claim of the paper that runs here have something to say on.

    python -m cluster.experiments.evidence RUN... [--data DATA] [--out FILE] [--json]

RUN is a run, a folder of runs, the folder of a study, or a result of
`cluster.experiments.ensemble --out`. The page needs no network, no script and no other file. Runs
that differ only in their seed are grouped, with the spread over seeds; a result that is missing is
listed with the command that makes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.experiments.evidence.figures import alike, figures
from cluster.experiments.evidence.items import results, studies
from cluster.experiments.evidence.runs import (
    Gathered,
    Item,
    Missing,
    data_word,
    gather,
    rounded,
    scale_of,
)
from cluster.report.page import templates
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write

NAME = "evidence.html"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the paper's claims beside what runs here have found, on one page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Runs, folders of runs, folders of studies, results of cluster.experiments.ensemble --out."""
    data: str | None = None
    """Data set of the runs (folder or address), for images with their answers."""
    out: Path | None = None
    """File to write; default: evidence.html in the folder that holds all that was named."""
    json: bool = False
    """Print the rows as one JSON object to stdout, everything else to stderr."""


@dataclass(frozen=True)
class Page:
    """All that the page says."""

    gathered: Gathered
    items: list[Item]
    missing: list[Missing]

    def as_json(self) -> dict[str, Any]:
        """For machines: without images."""
        return {
            "groups": [
                {
                    "letter": group.letter,
                    "runs": [str(run.path) for run in group.runs],
                    "seeds": [run.config.seed for run in group.runs],
                    "step": group.first.found.mark.step,
                    "scale": scale_of(group),
                    "differs": group.differs,
                }
                for group in self.gathered.groups
            ],
            "items": [item.as_json() for item in self.items],
            "missing": [vars(one) for one in self.missing],
            "left_out": self.gathered.left_out,
        }


def evidence(paths: Sequence[Path], data: str | None = None) -> Page:
    """Gather what there is on the paper's claims.

    Raises:
        UsageError: a folder is no run, or a run has no checkpoint.
        DataError: none of a run's checkpoints is sound.
    """
    if not paths:
        raise UsageError("no run was named; name one or more, or a folder of runs")
    gathered = gather(paths, data)
    missing: list[Missing] = []
    parts = (results, figures, alike, studies)
    items = [item for part in parts for item in part(gathered, missing)]
    return Page(gathered, items, missing)


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = templates(Path(__file__).parent)
    environment.filters |= {"rounded": rounded, "scale": scale_of, "data_word": data_word}
    return environment.get_template("evidence.html.j2").render(
        items=page.items,
        groups=page.gathered.groups,
        missing=page.missing,
        left_out=page.gathered.left_out,
        runs=len(page.gathered.runs),
    )


def write(page: Page, out: Path) -> None:
    """Write the page.

    Raises:
        UsageError: the file cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    try:
        with atomic_write(out) as file:
            file.write(render(page).encode())
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{out} cannot be written ({reason}); name another --out") from error


def place_of(paths: Sequence[Path]) -> Path:
    """Where the page goes if nothing else is said: into the folder that holds all of them."""
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    return Path(os.path.commonpath(folders)) / NAME


def main(argv: list[str] | None = None) -> int:
    """Write the page that the command line asks for and print its path.

    Raises:
        DuetError: as `evidence` and `write`.
    """
    options = tyro.cli(Options, args=argv, prog="python -m cluster.experiments.evidence")
    page = evidence(options.runs, options.data)
    out = options.out or place_of(options.runs)
    write(page, out)
    count = len(page.gathered.runs)
    words = f"{len(page.items)} claims, {count} run{'s' if count != 1 else ''} -> {out}\n"
    (sys.stderr if options.json else sys.stdout).write(words)
    if options.json:
        sys.stdout.write(json.dumps(page.as_json()) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
