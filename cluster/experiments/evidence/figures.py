"""Items that show images: first-layer kernels, answers, neighbors, and short codes.

The last two come from RUN/neighbours/summary.json (`cluster.experiments.neighbors.summary`).
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.experiments.evidence.claims import ANSWERS, CODES, KERNELS, NEIGHBOURS
from cluster.experiments.evidence.runs import (
    Comparison,
    Evidence,
    Item,
    SeedGroup,
    TrainedRun,
    describe_scale,
    quote_path,
)
from cluster.experiments.evidence.significance import NORMAL_975, compute_binomial_margin
from cluster.experiments.neighbors.features import FOLDER
from cluster.experiments.neighbors.summary import SUMMARY, describe_search
from cluster.report.images import TITLES, Answers, MissingFigure, collect_answers
from cluster.report.kernels import FirstLayer, describe_first_layer
from cluster.report.tables import format_probability
from cluster.run.folder import KERNELS as KERNEL_ROWS
from cluster.run.kernels import read_kernels
from pipeline.tools.jsonl import parse_json

MOST_IMAGES = 4
MOST_BYTES = 6_000_000
MEDIA_TYPES = ("image/png", "image/jpeg", "image/svg+xml")
SCORES = (
    ("colour of the kernels", "colour", "told apart by eye, every run"),
    ("colour of what was learned", "change_colour", "told apart by eye, every run"),
    ("orientation of the kernels", "orientation", "no number"),
)
"""Quantity, field of `FirstLayer` that holds it, and the paper's number."""
KERNEL_NOTE = (
    "Share of pairs, a kernel of each column, in which the one column's scores higher: 50 % if "
    "the columns are alike, 100 % if they share nothing; p: share of random splits of the same "
    "kernels that are as far apart. What was learned: the kernels less what they began as, "
    "which is noise. The paper judged by eye, after 90 passes over ImageNet."
)


def show_kernels(evidence: Evidence) -> Iterator[Item]:
    """Yield the item on kernels; list those that cannot be shown as missing."""
    item = Item(KERNELS, kind="kernels", notes=[KERNEL_NOTE])
    layers: list[tuple[TrainedRun, FirstLayer]] = []
    for group in evidence.groups:
        first = len(layers)
        for run in group.runs:
            try:
                layer = describe_first_layer(run.checkpoint, read_kernels(run.path / KERNEL_ROWS))
            except MissingFigure as error:
                evidence.add_missing(f"Kernels of {run.name}", command="", why=str(error))
                continue
            layers.append((run, layer))
            if not layer.strips:
                item.notes.append(f"{run.name} kept no kernels over time (kernels.jsonl).")
        item.rows += _compare_columns(layers[first:], group)
    if layers:
        item.body = layers[:4]
        yield item


def _compare_columns(
    layers: Sequence[tuple[TrainedRun, FirstLayer]], group: SeedGroup
) -> Iterator[Comparison]:
    """Yield a row for each score, over the seeds of a group; none for networks of one column."""
    for what, name, paper in SCORES:
        splits = {run.config.seed: getattr(layer, name) for run, layer in layers}
        splits = {seed: split for seed, split in splits.items() if split is not None}
        if not splits:
            continue
        differ = [split.is_significant for split in splits.values()]
        if not any(differ):
            verdict = "not beyond a random split"
        elif not all(differ):
            verdict = f"beyond a random split in {sum(differ)} of {len(differ)} seeds"
        else:
            verdict = "as the paper says" if paper != "no number" else "the columns differ"
        chance = next(iter(splits.values())).chance_95
        yield Comparison(
            what=f"columns apart: {what}",
            group=group.letter,
            paper=paper,
            ours=", ".join(f"{100 * split.apart:.0f} %" for split in splits.values()),
            seeds="; ".join(f"seed {s}: p {format_probability(one.p)}" for s, one in splits.items())
            + f"; 95 % of random splits are below {100 * chance:.0f} %",
            verdict=verdict,
            scale=describe_scale(group),
            command=f"duet report {quote_path(group.first.path)}",
        )


def show_answers(evidence: Evidence) -> Iterator[Item]:
    """Yield the item on the answers of the first run that has kept its probabilities."""
    reason = ""
    for group in evidence.groups:
        for run in group.runs:
            config = {"cache": run.config.cache, "cache_size": run.config.cache_size}
            try:
                found = collect_answers(run.path, evidence.data, config)
            except MissingFigure as error:
                reason = reason or str(error)
                continue
            yield _count_answers(run, found, group)
            return
    if evidence.runs:
        run = evidence.runs[0]
        command = (
            f"duet evaluate {quote_path(run.path)} --views 10 --save-probabilities, "
            "then this page again"
        )
        evidence.add_missing(ANSWERS.title, command, why=reason.rstrip("."))


def _count_answers(run: TrainedRun, found: Answers, group: SeedGroup) -> Item:
    item = Item(ANSWERS, kind="answers", body=found)
    if images := dict(found.groups).get(TITLES["random"]):
        verdicts = [one.verdict for one in images]
        right, near = verdicts.count("right"), verdicts.count("in the top 5")
        item.rows.append(
            Comparison(
                what=f"of {len(verdicts)} randomly sampled images",
                group=group.letter,
                paper="eight images of its own choice",
                ours=f"{right} right, {near} wrong with the truth in the top 5, "
                f"{len(verdicts) - right - near} wrong",
                seeds=f"seed {run.config.seed}",
                verdict="to be looked at",
                scale=describe_scale(group),
                command=f"duet evaluate {quote_path(run.path)} --views 10 --save-probabilities",
            )
        )
    return item


def embed_images(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Return the data URI and the name of each image that fits into a page."""
    found = []
    for path in paths:
        kind, _ = mimetypes.guess_type(path.name)
        if kind in MEDIA_TYPES and path.is_file() and path.stat().st_size <= MOST_BYTES:
            content = base64.b64encode(path.read_bytes()).decode()
            found.append((f"data:{kind};base64,{content}", path.stem.replace("_", " ")))
    return found[:MOST_IMAGES]


def make_neighbors(evidence: Evidence) -> Iterator[Item]:
    """Yield the items on neighbors and short codes; list what does not exist as missing."""
    near, codes = Item(NEIGHBOURS, kind="images", body=[]), Item(CODES)
    for group in evidence.groups:
        for run in group.runs:
            if (run.path / FOLDER / SUMMARY).is_file():
                _add_summary(evidence, near, codes, run, group)
    for item, command in (
        (near, "duet neighbors {}"),
        (codes, "duet codes {}"),
    ):
        if item.rows:
            yield item
        elif evidence.runs:
            run = evidence.runs[0]
            words = command.format(quote_path(run.path))
            evidence.add_missing(item.claim.title, words)


def _add_summary(
    evidence: Evidence, near: Item, codes: Item, run: TrainedRun, group: SeedGroup
) -> None:
    path = run.path / FOLDER / SUMMARY
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
        step = table["step"]
        found = [
            list(_compare_neighbors(table.get("neighbours"), run, group)),
            list(_compare_codes(table.get("codes"), run, group)),
        ]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        evidence.skipped.append(f"{path} cannot be read ({error!r}); make it again.")
        return
    for item, rows in zip((near, codes), found, strict=True):
        item.rows += rows
        if rows and step != run.step:
            item.notes.append(
                f"{run.name}: features of step {step:,}, it has come to {run.step:,}."
            )
    near.body = near.body or embed_images(sorted(path.parent.iterdir()))


def _compare_neighbors(
    facts: Mapping[str, Any] | None, run: TrainedRun, group: SeedGroup
) -> Iterator[Comparison]:
    if not facts:
        return
    compare = partial(
        Comparison,
        group=group.letter,
        command=f"duet neighbors {quote_path(run.path)} -k {facts['k']}",
        seeds=f"seed {run.config.seed}",
        scale=f"{describe_search(facts)}, {facts['units']:,} activations; {describe_scale(group)}",
    )
    share, chance = facts["precision_at_k"], facts["precision_by_chance"]
    margin = compute_binomial_margin(share, chance, facts["queries"]["pictures"])
    yield compare(
        what=f"of the {facts['k']} nearest images, of the same class",
        paper="no number: five images with six neighbours each",
        ours=f"{100 * share:.1f} % (by chance {100 * chance:.1f} %)",
        verdict="above chance" if share - chance > margin else "not above chance",
    )
    if (auc := facts.get("auc")) is not None:
        margin = NORMAL_975 * facts["auc_error"]
        yield compare(
            what="how often a pair of one class is closer than one of two (AUC)",
            paper="no number",
            ours=f"{100 * auc:.1f} ± {100 * margin:.1f} % (by chance 50 %)",
            verdict="above chance" if auc - 0.5 > margin else "not above chance",
        )


def _compare_codes(
    facts: Mapping[str, Any] | None, run: TrainedRun, group: SeedGroup
) -> Iterator[Comparison]:
    if not facts:
        return
    for row in facts["rows"]:
        if "missing" not in row:
            yield Comparison(
                what=f"{row['method']}, {row['bits']:,} bits: recall of the {facts['k']} exact "
                "neighbours / of the same class",
                group=group.letter,
                command=f"duet codes {quote_path(run.path)}",
                paper="not done",
                ours=f"{100 * row['recall_at_k']:.1f} % / {100 * row['precision_at_k']:.1f} %",
                seeds=f"seed {run.config.seed}",
                verdict=f"{row['bytes']:,} bytes an image, {row['queries_s']:,.0f} queries/s",
                scale=f"{describe_search(facts)}; {describe_scale(group)}",
            )
