"""Items that are images: what the first layer learned, and answers.

Items from RUN/neighbours/summary.json, which `cluster.experiments.neighbors` and its `codes` write.

step         of the checkpoint that the features are of
neighbours   k, precision_at_k, precision_by_chance, auc, auc_error, queries, base, ...
codes        k, rows of the table: method, bits, bytes, recall_at_k, precision_at_k, queries_s
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.experiments.evidence.claims import ANSWERS, CODES, KERNELS, NEIGHBOURS
from cluster.experiments.evidence.runs import (
    Gathered,
    Group,
    Item,
    Missing,
    Row,
    Run,
    scale_of,
    word,
)
from cluster.experiments.evidence.significance import NORMAL, counting
from cluster.report.images import Answers, Unavailable, answers
from cluster.report.kernels import FirstLayer, first_layer
from cluster.report.tables import probability
from cluster.run.folder import KERNELS as KERNEL_ROWS
from cluster.run.kernels import read_kernels

OTHER_SEEDS = 3
"""Runs beside the first whose kernels are shown, too."""
MOST_PICTURES = 4
MOST_BYTES = 6_000_000
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Layer:
    """The first layer of a run."""

    name: str
    seed: int
    layer: FirstLayer


@dataclass(frozen=True)
class Picture:
    """An image file inside the page."""

    uri: str
    name: str


def figures(gathered: Gathered, missing: list[Missing]) -> Iterator[Item]:
    """Yield the items there is something to show of; what lacks is added to `missing`."""
    yield from filter(None, (_kernels(gathered, missing), _answers(gathered, missing)))


def _kernels(gathered: Gathered, missing: list[Missing]) -> Item | None:
    item, layers = Item(KERNELS, kind="kernels"), []
    for group in gathered.groups:
        found = []
        for run in group.runs:
            try:
                layer = first_layer(run.found, read_kernels(run.path / KERNEL_ROWS))
            except Unavailable as error:
                missing.append(Missing(title=f"Kernels of {run.name}", command="", why=f"{error}"))
                continue
            found.append(Layer(run.name, run.config.seed, layer))
            if not layer.strips:
                item.notes.append(f"{run.name} kept no kernels over time (kernels.jsonl).")
        item.rows += _apart(found, group)
        layers += found
    if not layers:
        return None
    item.notes.insert(
        0,
        "Share of pairs, a kernel of each column, in which the one column's scores higher: 50 % if "
        "the columns are alike, 100 % if they share nothing; p: share of random splits of the same "
        "kernels that are as far apart. What was learned: the kernels less what they began as, "
        "which is noise. The paper judged by eye, after 90 passes over ImageNet.",
    )
    item.body = {"first": layers[0], "others": layers[1 : 1 + OTHER_SEEDS]}
    return item


def _apart(layers: Sequence[Layer], group: Group) -> Iterator[Row]:
    """A row for each score, over the seeds of a group; none for networks of one column."""
    for what, name, paper in (
        ("colour of the kernels", "colour", "told apart by eye, every run"),
        ("colour of what was learned", "change_colour", "told apart by eye, every run"),
        ("orientation of the kernels", "orientation", "no number"),
    ):
        splits = {
            one.seed: split for one in layers if (split := getattr(one.layer, name)) is not None
        }
        if not splits:
            continue
        told, chance = [split.told for split in splits.values()], next(iter(splits.values()))
        yield Row(
            what=f"columns apart: {what}",
            group=group.letter,
            paper=paper,
            ours=", ".join(f"{100 * split.apart:.0f} %" for split in splits.values()),
            seeds="; ".join(f"seed {s}: p {probability(one.p)}" for s, one in splits.items())
            + f"; 95 % of random splits are below {100 * chance.chance_95:.0f} %",
            verdict=_specialised(told, paper),
            scale=scale_of(group),
        )


def _specialised(told: Sequence[bool], paper: str) -> str:
    if not any(told):
        return "not beyond a random split"
    if not all(told):
        return f"beyond a random split in {sum(told)} of {len(told)} seeds"
    return "as the paper says" if paper != "no number" else "the columns differ"


def _answers(gathered: Gathered, missing: list[Missing]) -> Item | None:
    reason = ""
    for group in gathered.groups:
        for run in group.runs:
            config = {"cache": run.config.cache, "cache_size": run.config.cache_size}
            try:
                found = answers(run.path, gathered.data, config)
            except Unavailable as error:
                reason = reason or str(error)
                continue
            return _answered(run, found, group.letter, scale_of(group))
    if gathered.runs:
        run = gathered.runs[0]
        data = gathered.data_of(run)
        command = (
            f"python -m cluster.evaluate {word(run.path)} --data {data} --views 10 "
            f"--save-probabilities, then this page with --data {data}"
        )
        missing.append(Missing(title=ANSWERS.title, command=command, why=reason.rstrip(".")))
    return None


def _answered(run: Run, found: Answers, letter: str, scale: str) -> Item:
    item = Item(ANSWERS, kind="answers", body=found)
    for title, pictures in found.groups:
        if title != "Drawn by lot":
            continue
        verdicts = [one.verdict for one in pictures]
        right, near = verdicts.count("right"), verdicts.count("in the top 5")
        item.rows.append(
            Row(
                what=f"of {len(verdicts)} images drawn by lot",
                group=letter,
                paper="eight images of its own choice",
                ours=f"{right} right, {near} wrong with the truth in the top 5, "
                f"{len(verdicts) - right - near} wrong",
                seeds=f"seed {run.config.seed}",
                verdict="to be looked at",
                scale=scale,
            )
        )
    return item


def images_in(folder: Path, names: Sequence[str] = ()) -> list[Picture]:
    """Images of a folder that fit into a page, by name; only `names` if some are given."""
    found = []
    for path in sorted(folder / name for name in names) if names else sorted(folder.glob("*")):
        kind = KINDS.get(path.suffix.lower())
        if kind and path.is_file() and path.stat().st_size <= MOST_BYTES:
            content = base64.b64encode(path.read_bytes()).decode()
            found.append(Picture(f"data:{kind};base64,{content}", path.stem.replace("_", " ")))
    return found[:MOST_PICTURES]


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
    near.body = near.body or images_in(path.parent)


def _near(table: Mapping[str, Any], run: Run, group: Group) -> Iterator[Row]:
    facts = table.get("neighbours")
    if not facts:
        return
    queries, base = facts["queries"], facts["base"]
    scale = (
        f"{queries['pictures']:,} images of {queries['split']} among {base['pictures']:,} of "
        f"{base['split']}, {facts['units']:,} activations; {scale_of(group)}"
    )
    share, chance = facts["precision_at_k"], facts["precision_by_chance"]
    margin = counting(share, chance, queries["pictures"])
    yield Row(
        what=f"of the {facts['k']} nearest images, of the same class",
        group=group.letter,
        paper="no number: five images with six neighbours each",
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
            verdict=f"{row['bytes']:,} bytes an image, {row['queries_s']:,.0f} queries/s",
            scale=f"{facts['queries']['pictures']:,} images of {facts['queries']['split']} among "
            f"{facts['base']['pictures']:,} of {facts['base']['split']}; {scale_of(group)}",
        )
