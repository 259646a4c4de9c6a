"""What a data set holds, as a table and on one page to look at.

    python -m pipeline.describe DATA [--out FILE.html] [--json]

The page needs no network, no script and no other file. It shows the images as they are stored,
each checked against its CRC-32, and what the colour draws of the training do to them.

`python -m pipeline.describe DATA [--out FILE.html] [--json]`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import jinja2
import rich.console
import tyro

from pipeline.describe.facts import (
    ORIGINAL_MEAN,
    Facts,
    as_json,
    duplicates_line,
    gather,
    human_bytes,
    print_tables,
    stored_as,
)
from pipeline.describe.figures import (
    DRAWS,
    Samples,
    bars,
    class_chart,
    draw,
    groups,
    lively,
    mean_picture,
    mosaic,
    size_chart,
    strips,
)
from pipeline.remote.dataset import CACHE_SIZE, Dataset, is_remote, open_dataset, parse_size
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write

ENDS = 12
"""Classes named at each end where there are too many for a list."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show what a data set holds: a table, and a page with its images."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder or address of the data set."""
    out: Path | None = None
    """The page to write; NAME-inspect.html in the current folder unless given."""
    seed: int = 0
    """Seed of the choice of images."""
    cache: Path | None = None
    """Where shards of a set in a store are kept, as for training."""
    cache_size: str = f"{CACHE_SIZE // 10**9}GB"
    """The most that may lie there."""
    json: bool = False
    """Print one JSON object on stdout instead of the table."""


def inspect(options: Options) -> tuple[Facts, Path]:
    """Write the page and return what is on it, and its path.

    Raises:
        UsageError: no data set, or a page that cannot be written there.
        DataError: the set is not what its manifest says.
        StoreError: the store does not answer.
    """
    size = parse_size(options.cache_size)
    dataset = open_dataset(options.data, cache=options.cache, cache_size=size)
    try:
        page = _target(options, dataset)
        facts = gather(options.data, dataset)
        text = render(facts, dataset, options.seed)
    finally:
        dataset.close()
    try:
        with atomic_write(page) as file:
            file.write(text.encode(errors="replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"page {page} cannot be written ({reason}); name another --out") from error
    return facts, page


def _target(options: Options, dataset: Dataset) -> Path:
    """Return where the page goes: never into the data set, which is sealed."""
    page = options.out or Path(f"{name_of(options.data)}-inspect.html")
    folder = page.resolve().parent
    if folder == dataset.folder.resolve():
        raise UsageError(f"page {page} would lie in the sealed data set; name another --out")
    if page.is_dir() or not folder.is_dir():
        raise UsageError(f"page {page} has no folder to lie in, or is one; name a file by --out")
    return page


def name_of(data: str) -> str:
    """Return the last part of the path or address of a data set."""
    path = unquote(urlsplit(data).path) if "://" in data else data
    name = Path(path).resolve().name if not is_remote(data) else Path(path.rstrip("/")).name
    return name or "data"


def render(facts: Facts, dataset: Dataset, seed: int) -> str:
    """Return the page as HTML text."""
    samples = Samples(dataset, facts)
    try:
        shown, pixels = mosaic(facts, samples, draw(facts, seed, samples.local))
        context = {
            "mosaic": shown,
            "strips": strips(facts.statistics, lively(pixels)),
            "groups": groups(facts, samples),
            "damaged": samples.damaged,
        }
    finally:
        samples.close()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "minus": _minus}
    return environment.get_template("page.html.j2").render(
        title=name_of(facts.data),
        facts=facts,
        manifest=facts.manifest,
        stored_as=stored_as(facts),
        duplicates_line=duplicates_line(facts),
        class_charts=[class_chart(one) for one in facts.splits],
        class_bars=[(one.name, bars(one.per_class)) for one in facts.splits],
        ends=_ends(facts),
        size_charts=[size_chart(one) for one in facts.splits],
        mean=mean_picture(facts.statistics),
        draws=DRAWS,
        original_mean=ORIGINAL_MEAN,
        **context,
    )


def _minus(text: str) -> str:
    """Return numbers with minus signs that are as wide as a plus."""
    return text.replace("-", "−")


def _ends(facts: Facts) -> list[tuple[str, list[tuple[str, int]]]]:
    """Return the smallest and the largest classes of the first split, with their images."""
    counts = facts.splits[0].per_class
    order = counts.argsort(kind="stable").tolist()
    named = [(facts.title(label), int(counts[label])) for label in order]
    return [("smallest", named[:ENDS]), ("largest", named[: -ENDS - 1 : -1])]


def main(argv: list[str] | None = None) -> int:
    """Print what the data set holds, write its page, and name the page in the last line.

    Raises:
        As `inspect`.
    """
    options = tyro.cli(Options, args=argv, prog="python -m pipeline.describe", description=__doc__)
    facts, page = inspect(options)
    if options.json:
        table: dict[str, Any] = as_json(facts, str(page))
        sys.stdout.write(json.dumps(table) + "\n")
        return 0
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    print_tables(facts, console)
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    run(main)
