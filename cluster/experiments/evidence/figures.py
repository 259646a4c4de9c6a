"""Items that are pictures: what the first layer learned, and answers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.evidence.item import Item, Missing, Row, scale_of, word
from cluster.experiments.evidence.claims import ANSWERS, KERNELS
from cluster.experiments.evidence.runs import Gathered, Group, Run
from cluster.report.answers import Answers, answers
from cluster.report.images import Unavailable
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
    """A picture file inside the page."""

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
                what=f"of {len(verdicts)} pictures drawn by lot",
                group=letter,
                paper="eight pictures of its own choice",
                ours=f"{right} right, {near} wrong with the truth in the top 5, "
                f"{len(verdicts) - right - near} wrong",
                seeds=f"seed {run.config.seed}",
                verdict="to be looked at",
                scale=scale,
            )
        )
    return item


def pictures_in(folder: Path, names: Sequence[str] = ()) -> list[Picture]:
    """Pictures of a folder that fit into a page, by name; only `names` if some are given."""
    found = []
    for path in sorted(folder / name for name in names) if names else sorted(folder.glob("*")):
        kind = KINDS.get(path.suffix.lower())
        if kind and path.is_file() and path.stat().st_size <= MOST_BYTES:
            content = base64.b64encode(path.read_bytes()).decode()
            found.append(Picture(f"data:{kind};base64,{content}", path.stem.replace("_", " ")))
    return found[:MOST_PICTURES]
