"""Show what a data set holds, as a table and on one page.

    python -m pipeline.describe DATA [--out FILE.html] [--card] [--json]

The page needs no network, no script and no other file. It shows the images as they are stored,
each checked against its CRC-32, and the effect of the random color shifts of training.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import find_root
from pipeline.dataset.versions import LATEST, parse_version
from pipeline.describe import figures
from pipeline.describe.card import open_folder, write_card
from pipeline.describe.facts import (
    ORIGINAL_MEAN,
    Facts,
    describe_change,
    describe_duplicates,
    describe_encoding,
    gather_facts,
    print_tables,
    to_json,
)
from pipeline.options import DescribeOptions
from pipeline.remote.dataset import open_dataset
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.remote.local import Dataset
from pipeline.tools.arguments import MOST_SEED, parse_options, require_range
from pipeline.tools.charts import encode_image, page_templates
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write
from pipeline.tools.progress import announce
from pipeline.tools.terminal import Terminal
from pipeline.tools.units import parse_size

ENDS = 12
"""Classes named at each end where there are too many for a list."""


def describe_dataset(options: DescribeOptions) -> tuple[Facts, Path, list[str]]:
    """Write the page, and the card if it is asked for.

    Returns:
        the facts, the path of the page, and the files of the card.

    Raises:
        UsageError: there is no data set, or the page or the card cannot be written.
        DataError: the data set differs from its manifest.
        StoreError: the store does not answer.
    """
    require_range("seed", options.seed, 0, MOST_SEED)
    version = parse_version(options.data_version, "--data-version")
    if options.card and version not in (None, LATEST):
        raise UsageError(
            f"--card describes the newest version, not {options.data_version}; leave one of "
            "--card and --data-version out"
        )
    cached: dict[str, Any] = {"cache": options.cache, "cache_size": parse_size(options.cache_size)}
    with closing(open_dataset(options.data, version=version, **cached)) as dataset:
        page = _choose_page(options, dataset)
        card = open_folder(options.data) if options.card else None
        with announce(f"reading {options.data}"):
            facts = gather_facts(options.data, dataset)
            text = render_page(facts, dataset, options.seed)
        files = []
        if card is not None:
            name = find_name(options.data)
            files = write_card(card, facts, name, dataset.folder / MANIFEST)
    try:
        with atomic_write(page) as file:
            file.write(text.encode(errors="replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"page {page} cannot be written ({reason}); name another --out") from error
    return facts, page, files


def _choose_page(options: DescribeOptions, dataset: Dataset) -> Path:
    """Return the path of the page, which is never in the sealed data set."""
    page = options.out or Path(f"{find_name(options.data)}-describe.html")
    folder = page.resolve().parent
    own = {dataset.folder.resolve(), dataset.root.resolve()}
    if not is_remote(options.data):
        own.add(find_root(local_path(options.data)).resolve())
    if folder in own:
        raise UsageError(f"page {page} would lie in the sealed data set; name another --out")
    if page.is_dir() or not folder.is_dir():
        raise UsageError(f"page {page} has no folder to lie in, or is one; name a file by --out")
    return page


def find_name(data: str) -> str:
    """Return the last part of the path or address of a data set."""
    path = unquote(urlsplit(data).path) if "://" in data else data
    name = Path(path).resolve().name if not is_remote(data) else Path(path.rstrip("/")).name
    return name or "data"


def render_page(facts: Facts, dataset: Dataset, seed: int) -> str:
    """Return the page as HTML text."""
    with closing(figures.Samples(dataset)) as samples:
        ids = figures.sample_ids(facts, seed, samples.local)
        mosaic, pixels = figures.load_mosaic(facts, samples, ids)
        groups = figures.load_groups(facts, samples)
    environment = page_templates(Path(__file__).parent)
    environment.filters["minus"] = lambda text: text.replace("-", "−")  # as wide as a plus sign
    environment.filters["change"] = describe_change
    is_alone = len(facts.splits) == 1
    return environment.get_template("page.html.j2").render(
        title=find_name(facts.data),
        facts=facts,
        manifest=facts.manifest,
        mosaic=mosaic,
        strips=figures.make_strips(facts.statistics, figures.choose_lively(pixels)),
        groups=groups,
        damaged=samples.damaged,
        stored_as=describe_encoding(facts),
        duplicates_line=describe_duplicates(facts),
        class_charts=[figures.draw_class_chart(one, is_alone) for one in facts.splits],
        class_bars=[(one.name, figures.make_class_bars(facts, one)) for one in facts.splits],
        ends=_list_ends(facts),
        size_charts=[figures.draw_size_chart(one, is_alone) for one in facts.splits],
        mean=encode_image(facts.statistics.mean_picture.round().clip(0, 255).astype("u1"), 256, 92),
        draws=figures.DRAWS,
        original_mean=ORIGINAL_MEAN,
    )


def _list_ends(facts: Facts) -> list[tuple[str, list[tuple[str, int]]]]:
    """Return the smallest and the largest classes of the first split, with their image counts."""
    counts = facts.splits[0].per_class
    order = counts.argsort(kind="stable").tolist()
    named = [(facts.title(label), int(counts[label])) for label in order]
    return [("smallest", named[:ENDS]), ("largest", named[: -ENDS - 1 : -1])]


def main(argv: list[str] | None = None) -> int:
    """Print the facts of a data set, write its page, and print its path in the last line.

    Raises:
        DuetError: as `describe_dataset`.
    """
    options = parse_options(DescribeOptions, argv, "python -m pipeline.describe")
    facts, page, card = describe_dataset(options)
    if options.json:
        sys.stdout.write(json.dumps(to_json(facts, str(page)) | {"card": card}) + "\n")
        return 0
    print_tables(facts, Terminal(sys.stdout, width=None if sys.stdout.isatty() else 120))
    sys.stdout.write("".join(f"{path}\n" for path in (*card, page)))
    return 0


if __name__ == "__main__":
    run(main)
