"""Tables of a page, written between their markers from files of results.

    <!-- table: NAME -->
    ...
    <!-- end of table -->

NAME is a key of `tables` in some file of the folder. Text outside of markers is prose, written by
hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.report import describe_facts, describe_load
from pipeline.tools.errors import UsageError
from pipeline.tools.files import atomic_write

PLACE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.S)
"""A table with its markers."""


def read_tables(folder: Path) -> dict[str, str]:
    """Return the Markdown of every table in a folder of results, by its name.

    Raises:
        UsageError: a file is not one of results, or two have a table of the same name.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        results = read_results(path)
        for name, table in results["tables"].items():
            if name in found:
                raise UsageError(f"{path} has a table {name}, as another file there; remove one")
            found[name] = format_table(results, table)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Raises:
        UsageError: it is not one.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"benchmark", "date", "machine", "command", "tables"} - set(results)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as results ({error}); measure again") from None
    if missing:
        raise UsageError(f"{path} lacks {', '.join(sorted(missing))}; measure again")
    return results


def format_table(results: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """Return a table as Markdown: what it was measured by and on, then rows, then notes."""
    busy = "" if isinstance(results["machine"], str) else describe_load(results["machine"])
    facts = [describe_facts(dict(results)), busy, results["command"] and f"`{results['command']}`"]
    lines = [
        f"{'; '.join(filter(None, facts))}.",
        "",
        *(f"| {' | '.join(row)} |" for row in (table["head"], ["---"] * len(table["head"]))),
        *(f"| {' | '.join(row)} |" for row in table["rows"]),
    ]
    if table["notes"]:
        lines += ["", *table["notes"]]
    return "\n".join(lines)


def fill_page(text: str, tables: Mapping[str, str]) -> str:
    """Return a page with every table between its markers.

    Raises:
        UsageError: there is no marker, or one names no table.
    """
    places = [match["name"] for match in PLACE.finditer(text)]
    if not places:
        raise UsageError("the page has no <!-- table: NAME --> and <!-- end of table -->; add them")
    if unknown := [name for name in places if name not in tables]:
        raise UsageError(f"the page has a place for {unknown[0]}, a table of no file of results")
    return PLACE.sub(lambda match: f"{match[1]}{tables[match['name']]}\n{match[3]}", text)


def write_page(page: Path, folder: Path) -> None:
    """Write all tables of a folder of results into a page."""
    text = fill_page(page.read_text(encoding="utf-8"), read_tables(folder))
    with atomic_write(page) as file:
        file.write(text.encode())
