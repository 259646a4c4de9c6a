"""Items that are numbers: errors, ten views, what a setting is worth, speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cluster.evidence.discord import discord
from cluster.evidence.item import NOT_COMPARABLE, Item, Missing, Row, scale_of, seeds_of, word
from cluster.experiments.evidence.claims import (
    ABLATIONS,
    ERRORS,
    PAPER_ERRORS,
    SPEED,
    VIEW_GAIN,
    VIEWS,
    Ablation,
)
from cluster.experiments.evidence.runs import Gathered, Group, Run
from cluster.experiments.evidence.significance import (
    Difference,
    Spread,
    counting,
    difference,
    paired,
    signed,
)
from cluster.run.folder import CONFIG

RANKS = (("top-1", "top1_error"), ("top-5", "top5_error"))
WORDS = {1: "one view", 10: "ten views"}


def results(gathered: Gathered, missing: list[Missing]) -> Iterator[Item]:
    """Yield the items there is something to say on; what lacks is added to `missing`."""
    for run in gathered.runs:
        for views in (1, 10):
            if run.errors(views) is None:
                missing.append(_evaluation(run, views, gathered.data_of(run)))
    yield from filter(None, (_errors(gathered), _views(gathered)))
    for claim in ABLATIONS:
        item = _ablation(claim, gathered.groups)
        if item.rows:
            yield item
        elif gathered.groups:
            missing.append(_no_pair(claim, gathered))
    if gathered.groups:
        yield _speed(gathered.groups)


def _evaluation(run: Run, views: int, data: str) -> Missing:
    old = run.records.evaluations.get(views, {}).get("step")
    why = f"its evaluation is of step {old}" if old not in (None, run.found.mark.step) else ""
    return Missing(
        title=f"Errors of {run.name} with {WORDS[views]}",
        command=f"python -m cluster.evaluate {word(run.path)} --data {data} --views {views} "
        "--save-probabilities",
        why=why,
    )


def spread(group: Group, views: int, name: str) -> Spread | None:
    """An error of the runs of a group that have it; None if none has."""
    tables = [run.errors(views) for run in group.runs]
    values = tuple(float(table[name]) for table in tables if table)
    return Spread(values) if values else None


def counted(group: Group, views: int) -> float:
    """Pictures that an error of the group was counted on."""
    tables = [run.errors(views) for run in group.runs]
    return min(float(table["samples"]) for table in tables if table)


def _errors(gathered: Gathered) -> Item | None:
    item = Item(ERRORS)
    paper = {1: PAPER_ERRORS[0], 10: PAPER_ERRORS[2]}
    for group in gathered.groups:
        for views in (1, 10):
            if (found := [spread(group, views, name) for _, name in RANKS])[0] is None:
                continue
            whole = [one for one in found if one is not None]
            each = "; ".join(
                f"{rank}: " + ", ".join(f"{100 * value:.1f}" for value in one.values)
                for (rank, _), one in zip(RANKS, whole, strict=False)
            )
            told = paper[views]
            item.rows.append(
                Row(
                    what=f"top-1 / top-5 error, {WORDS[views]}",
                    group=group.letter,
                    paper=f"{100 * told.top1:.1f} % / {100 * told.top5:.1f} % ({told.name})",
                    ours=" / ".join(map(str, whole)),
                    seeds=f"{_many(len(whole[0].values))} ({each})",
                    verdict=NOT_COMPARABLE if scale_of(group) != "none" else "the same scale",
                    scale=f"{scale_of(group)}; {counted(group, views):,.0f} pictures counted",
                )
            )
    return item if item.rows else None


def _many(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _views(gathered: Gathered) -> Item | None:
    item = Item(VIEWS)
    for group in gathered.groups:
        both = [
            (one, ten) for run in group.runs if (one := run.errors(1)) and (ten := run.errors(10))
        ]
        if not both:
            continue
        margins = _margins(group, both)
        for (rank, name), expected in zip(RANKS, VIEW_GAIN, strict=True):
            ones, tens = (
                [float(table[name]) for table in side] for side in zip(*both, strict=True)
            )
            gap = paired(tens, ones, margins[name])
            each = [signed(ten - one) for ten, one in zip(tens, ones, strict=True)]
            seeds = f"{_many(len(each))} ({', '.join(each)})"
            what = f"{rank} error, ten views less one"
            item.rows.append(_compared(what, group.letter, gap, expected, seeds, group))
    item.notes.append(
        "±: 95 %, over pictures: those that change sides, where the probabilities of both were "
        "kept (McNemar), else as if each had been counted on others; from three seeds on over "
        "seeds, if that is more."
    )
    return item if item.rows else None


def _margins(
    group: Group, both: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, float]:
    """How far chance may take one network's gain by ten views, by the name of the error."""
    known = [one for run in group.runs if (one := discord(run.path))]
    if known:
        return {name: max(one[at] for one in known) for at, (_, name) in enumerate(RANKS)}
    pictures = counted(group, 10)
    return {
        name: max(counting(one[name], ten[name], pictures) for one, ten in both)
        for _, name in RANKS
    }


def _compared(
    what: str, letters: str, gap: Difference, expected: float | None, seeds: str, group: Group
) -> Row:
    return Row(
        what=what,
        group=letters,
        paper="no number" if expected is None else f"{signed(expected)} points",
        ours=str(gap),
        seeds=seeds,
        verdict=gap.verdict(expected),
        scale=scale_of(group),
    )


def pairs(claim: Ablation, groups: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    """Groups that differ in one setting alone: that with the paper's choice, that with another."""
    free = {claim.setting, *claim.free}
    for with_it in groups:
        if with_it.settings[claim.setting] != claim.paper_has:
            continue
        rest = _rest(with_it.settings, free)
        for other in groups:
            if other.settings[claim.setting] in claim.instead and (
                _rest(other.settings, free) == rest
            ):
                yield with_it, other


def _rest(table: dict[str, Any], free: set[str]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in free}


def _ablation(claim: Ablation, groups: Sequence[Group]) -> Item:
    item = Item(claim)
    for with_it, other in pairs(claim, groups):
        views = 10 if all(spread(group, 10, "top1_error") for group in (with_it, other)) else 1
        for (rank, name), expected in zip(RANKS, claim.differences, strict=True):
            ours, theirs = spread(with_it, views, name), spread(other, views, name)
            if ours is None or theirs is None:
                continue
            pictures = min(counted(with_it, views), counted(other, views))
            instead = other.settings[claim.setting]
            what = f"{rank} error, {WORDS[views]}, {claim.setting} {claim.paper_has} less {instead}"
            letters = f"{with_it.letter} − {other.letter}"
            gap = difference(ours, theirs, pictures)
            seeds = " − ".join(f"{one} ({_many(len(one.values))})" for one in (ours, theirs))
            item.rows.append(_compared(what, letters, gap, expected, seeds, with_it))
    return item


def _no_pair(claim: Ablation, gathered: Gathered) -> Missing:
    groups = gathered.groups
    base = next(
        (one for one in groups if one.settings[claim.setting] == claim.paper_has), groups[0]
    )
    run = base.first
    return Missing(
        title=claim.title,
        command=f"python -m cluster.train {word(run.path / CONFIG)} "
        f"--data {gathered.data_of(run)} "
        f"--run {word(f'{run.path}-{claim.key}')} {claim.command}",
        why=f"no two groups of runs differ in {claim.setting} alone; for the spread repeat it "
        "with --seed of each run",
    )


def _speed(groups: Sequence[Group]) -> Item:
    item = Item(SPEED)
    for group in groups:
        speeds = [run.records.metrics["img_s"] for run in group.runs]
        medians = [float(np.nanmedian(one)) for one in speeds if np.isfinite(one).any()]
        if not medians:
            continue
        machine = group.first.records.machine
        gpus = ", ".join(map(str, machine.get("gpus") or []))
        where = gpus or f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'a machine')}"
        item.rows.append(
            Row(
                what="training pictures a second, median step",
                group=group.letter,
                paper=SPEED.number,
                ours=" to ".join(f"{value:,.0f}" for value in sorted({min(medians), max(medians)}))
                + " img/s",
                seeds=seeds_of(group),
                verdict="another machine",
                scale=f"{where}; {scale_of(group)}",
            )
        )
    return item
