"""Items from `cluster.experiments.neighbors` and `cluster.experiments.neighbors.codes`: RUN/neighbours/summary.json.

step         of the checkpoint that the features are of
neighbours   k, precision_at_k, precision_by_chance, auc, auc_error, queries, base, ...
codes        k, rows of the table: method, bits, bytes, recall_at_k, precision_at_k, queries_s
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.evidence.item import Item, Missing, Row, scale_of, word
from cluster.experiments.evidence.claims import CODES, NEIGHBOURS
from cluster.experiments.evidence.figures import pictures_in
from cluster.experiments.evidence.runs import Gathered, Group, Run
from cluster.experiments.evidence.significance import NORMAL, counting

SUMMARY = "neighbours/summary.json"


def alike(gathered: Gathered, missing: list[Missing]) -> Iterator[Item]:
    """Yield what is known of neighbours and of short codes; what lacks is added to `missing`."""
    near, codes = Item(NEIGHBOURS, kind="pictures", body=[]), Item(CODES)
    for group in gathered.groups:
        for run in group.runs:
            if (run.path / SUMMARY).is_file():
                _take(gathered, near, codes, run, group)
    runs = gathered.runs
    for item, command in (
        (near, "python -m cluster.experiments.neighbors {} --data {}"),
        (codes, "python -m cluster.experiments.neighbors.codes {}"),
    ):
        if item.rows:
            yield item
        elif runs:
            words = command.format(word(runs[0].path), gathered.data_of(runs[0]))
            missing.append(Missing(title=item.claim.title, command=words))


def _take(gathered: Gathered, near: Item, codes: Item, run: Run, group: Group) -> None:
    path = run.path / SUMMARY
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        step, now = table["step"], run.found.mark.step
        found = [list(_near(table, run, group)), list(_codes(table, run, group))]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        gathered.left_out.append(f"{path} cannot be read ({error!r}); make it again.")
        return
    for item, rows in zip((near, codes), found, strict=True):
        item.rows += rows
        if rows and step != now:
            item.notes.append(f"{run.name}: features of step {step:,}, it has come to {now:,}.")
    near.body = near.body or pictures_in(path.parent)


def _near(table: Mapping[str, Any], run: Run, group: Group) -> Iterator[Row]:
    facts = table.get("neighbours")
    if not facts:
        return
    queries, base = facts["queries"], facts["base"]
    scale = (
        f"{queries['pictures']:,} pictures of {queries['split']} among {base['pictures']:,} of "
        f"{base['split']}, {facts['units']:,} activations; {scale_of(group)}"
    )
    share, chance = facts["precision_at_k"], facts["precision_by_chance"]
    margin = counting(share, chance, queries["pictures"])
    yield Row(
        what=f"of the {facts['k']} nearest pictures, of the same class",
        group=group.letter,
        paper="no number: five pictures with six neighbours each",
        ours=f"{100 * share:.1f} % (by chance {100 * chance:.1f} %)",
        seeds=f"seed {run.config.seed}",
        verdict="above chance" if share - chance > margin else "not above chance",
        scale=scale,
    )
    if (auc := facts.get("auc")) is not None:
        margin = NORMAL * facts["auc_error"]
        yield Row(
            what="how often a pair of one class is closer than one of two (AUC)",
            group=group.letter,
            paper="no number",
            ours=f"{100 * auc:.1f} ± {100 * margin:.1f} % (by chance 50 %)",
            seeds=f"seed {run.config.seed}",
            verdict="above chance" if auc - 0.5 > margin else "not above chance",
            scale=scale,
        )


def _codes(table: Mapping[str, Any], run: Run, group: Group) -> Iterator[Row]:
    facts = table.get("codes")
    if not facts:
        return
    for row in facts["rows"]:
        if "missing" in row:
            continue
        yield Row(
            what=f"{row['method']}, {row['bits']:,} bits: recall of the {facts['k']} exact "
            "neighbours / of the same class",
            group=group.letter,
            paper="not done",
            ours=f"{100 * row['recall_at_k']:.1f} % / {100 * row['precision_at_k']:.1f} %",
            seeds=f"seed {run.config.seed}",
            verdict=f"{row['bytes']:,} bytes a picture, {row['queries_s']:,.0f} queries/s",
            scale=f"{facts['queries']['pictures']:,} pictures of {facts['queries']['split']} among "
            f"{facts['base']['pictures']:,} of {facts['base']['split']}; {scale_of(group)}",
        )
