"""Items that are numbers: errors, ten views, single settings, speed, the competition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from cluster.experiments.evidence import claims
from cluster.experiments.evidence.claims import Ablation
from cluster.experiments.evidence.runs import (
    Comparison,
    Evidence,
    Item,
    SeedGroup,
    TrainedRun,
    describe_scale,
    quote_path,
)
from cluster.experiments.evidence.significance import (
    Difference,
    Spread,
    compare_groups,
    compare_pairs,
    compute_binomial_margin,
    compute_view_margins,
    format_points,
)
from cluster.report.curves import VALIDATIONS, draw_comparison
from cluster.run.folder import CONFIG

RANKS = (("top-1", "top1_error"), ("top-5", "top5_error"))
VIEW_WORDS = {1: "one view", 10: "ten views"}
NOT_COMPARABLE = "another scale"


def make_results(evidence: Evidence) -> Iterator[Item]:
    """Yield the items on errors, settings and speed; list what does not exist as missing."""
    for run in evidence.runs:
        for views in (1, 10):
            if run.find_errors(views) is None:
                old = run.records.evaluations.get(views, {}).get("step")
                evidence.add_missing(
                    f"Errors of {run.name} with {VIEW_WORDS[views]}",
                    f"duet evaluate {quote_path(run.path)} --views {views} --save-probabilities",
                    "" if old in (None, run.step) else f"its evaluation is of step {old}",
                )
    for item in (_show_errors(evidence.groups), _show_views(evidence.groups)):
        if item.rows:
            yield item
    for claim in claims.ABLATIONS:
        item = _show_ablation(claim, evidence)
        if item.rows:
            yield item
        elif evidence.groups:
            _ask_for_ablation(claim, evidence)
    if evidence.groups:
        yield _show_speed(evidence.groups)
        yield _show_competition(evidence.groups)


def _collect_errors(group: SeedGroup, views: int) -> tuple[dict[str, Spread], float]:
    """Collect the errors of the runs of a group that have them.

    Returns:
        both errors by their name, and the least number of images that one was counted on; nothing
        and 0 if no run has them.
    """
    tables = [table for run in group.runs if (table := run.find_errors(views))]
    if not tables:
        return {}, 0
    errors = {name: Spread(tuple(float(one[name]) for one in tables)) for _, name in RANKS}
    return errors, min(float(one["samples"]) for one in tables)


def _count_seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


MOST_CURVES = 6
"""Runs that a chart has a line for: as many as there are colors."""


def _draw_errors(groups: Iterable[SeedGroup]) -> dict[str, Any]:
    """Return the chart of validation errors over the images seen, as fields of `Item`."""
    runs = [(group.letter, run) for group in groups for run in group.runs][:MOST_CURVES]
    names = [f"{letter}, {run.name}" for letter, run in runs]
    charts = draw_comparison([run.records for _, run in runs], names, VALIDATIONS[1:2])
    return {"kind": "charts", "body": charts}


def _show_errors(groups: Sequence[SeedGroup]) -> Item:
    item = Item(claims.ERRORS, **_draw_errors(groups))
    for group in groups:
        for views in (1, 10):
            found, images = _collect_errors(group, views)
            if not found:
                continue
            each = "; ".join(
                f"{rank}: " + ", ".join(f"{100 * value:.1f}" for value in found[name].values)
                for rank, name in RANKS
            )
            scale = describe_scale(group)
            item.rows.append(
                Comparison(
                    what=f"top-1 / top-5 error, {VIEW_WORDS[views]}",
                    group=group.letter,
                    paper=claims.PAPER_ERRORS[views],
                    ours=" / ".join(map(str, found.values())),
                    seeds=f"{_count_seeds(len(found['top1_error'].values))} ({each})",
                    verdict=NOT_COMPARABLE if scale != "none" else "the same scale",
                    scale=f"{scale}; {images:,.0f} images counted",
                    command=_command_evaluation(group, views),
                )
            )
    return item


def _command_evaluation(group: SeedGroup, views: int) -> str:
    return f"duet evaluate {quote_path(group.first.path)} --views {views} --save-probabilities"


def _show_views(groups: Sequence[SeedGroup]) -> Item:
    item = Item(claims.VIEWS)
    for group in groups:
        both = [
            (one, ten)
            for run in group.runs
            if (one := run.find_errors(1)) and (ten := run.find_errors(10))
        ]
        if not both:
            continue
        # The largest margin of one network's gain.
        if known := [some for run in group.runs if (some := compute_view_margins(run.path))]:
            margins = [max(each) for each in zip(*known, strict=True)]
        else:
            _, images = _collect_errors(group, 10)
            margins = [
                max(compute_binomial_margin(one[name], ten[name], images) for one, ten in both)
                for _, name in RANKS
            ]
        for (rank, name), margin, expected in zip(RANKS, margins, claims.VIEW_GAIN, strict=True):
            ones, tens = (
                [float(table[name]) for table in side] for side in zip(*both, strict=True)
            )
            gap = compare_pairs(tens, ones, margin)
            each = [format_points(ten - one) for ten, one in zip(tens, ones, strict=True)]
            seeds = f"{_count_seeds(len(each))} ({', '.join(each)})"
            what = f"{rank} error, ten views less one"
            command = f"{_command_evaluation(group, 1)}, and with --views 10"
            item.rows.append(_compare(what, group.letter, gap, expected, seeds, group, command))
    item.notes.append(
        "±: 95 %, over images: those that change sides, where the probabilities of both were "
        "kept (McNemar), else as if each had been counted on others; from three seeds on over "
        "seeds, if that is more."
    )
    return item


def _compare(
    what: str, letters: str, gap: Difference, expected: float | None, seeds: str,
    group: SeedGroup, command: str,
) -> Comparison:  # fmt: skip
    return Comparison(
        what=what,
        group=letters,
        paper="no number" if expected is None else f"{format_points(expected)} points",
        ours=str(gap),
        seeds=seeds,
        verdict=gap.judge(expected),
        scale=describe_scale(group),
        command=command,
    )


def find_pairs(
    claim: Ablation, groups: Sequence[SeedGroup]
) -> Iterator[tuple[SeedGroup, SeedGroup]]:
    """Yield groups that differ in one setting alone: with the paper's choice, and with another."""

    def rest(group: SeedGroup) -> dict[str, Any]:
        free = {claim.setting, *claim.free}
        return {name: value for name, value in group.first.settings.items() if name not in free}

    for group, other in permutations(groups, 2):
        has_setting = group.first.settings[claim.setting] == claim.paper_has
        is_instead = other.first.settings[claim.setting] in claim.instead
        if has_setting and is_instead and rest(group) == rest(other):
            yield group, other


def _show_ablation(claim: Ablation, evidence: Evidence) -> Item:
    groups = evidence.groups
    item = Item(claim)
    pairs = list(find_pairs(claim, groups))
    for group, other in pairs:
        for views in (10, 1):
            ours, images = _collect_errors(group, views)
            theirs, other_images = _collect_errors(other, views)
            if ours and theirs:
                break
        else:
            continue
        setting = f"{claim.setting} {claim.paper_has} less {other.first.settings[claim.setting]}"
        for (rank, name), expected in zip(RANKS, claim.differences, strict=True):
            what = f"{rank} error, {VIEW_WORDS[views]}, {setting}"
            letters = f"{group.letter} − {other.letter}"
            both = (ours[name], theirs[name])
            gap = compare_groups(*both, min(images, other_images))
            seeds = " − ".join(f"{one} ({_count_seeds(len(one.values))})" for one in both)
            command = _command_ablation(claim, evidence, group.first)
            item.rows.append(_compare(what, letters, gap, expected, seeds, group, command))
    if item.rows:
        shown = {group.letter: group for pair in pairs for group in pair}
        item.kind, item.body = _draw_errors(shown.values()).values()
    return item


def _command_ablation(claim: Ablation, evidence: Evidence, run: TrainedRun) -> str:
    """Return the command of a run without the paper's choice, from one that has it."""
    return (
        f"duet train {quote_path(run.path / CONFIG)} --data {evidence.quote_data(run)} "
        f"--run {quote_path(f'{run.path}-{claim.key}')} {claim.command}"
    )


def _ask_for_ablation(claim: Ablation, evidence: Evidence) -> None:
    runs = [group.first for group in evidence.groups]
    run = next((one for one in runs if one.settings[claim.setting] == claim.paper_has), runs[0])
    evidence.add_missing(
        claim.title,
        _command_ablation(claim, evidence, run),
        f"no two groups of runs differ in {claim.setting} alone; for the spread repeat it "
        "with --seed of each run",
    )


def _show_speed(groups: Sequence[SeedGroup]) -> Item:
    item = Item(claims.SPEED)
    for group in groups:
        speeds = [run.records.metrics["img_s"] for run in group.runs]
        medians = [float(np.nanmedian(one)) for one in speeds if np.isfinite(one).any()]
        if not medians:
            continue
        machine = group.first.records.machine
        gpus = ", ".join(map(str, machine.get("gpus") or []))
        where = gpus or f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'a machine')}"
        seeds = ", ".join(str(run.config.seed) for run in group.runs)
        item.rows.append(
            Comparison(
                what="training images a second, median step",
                group=group.letter,
                paper=claims.SPEED.number,
                ours=" to ".join(f"{value:,.0f}" for value in sorted({min(medians), max(medians)}))
                + " img/s",
                seeds=f"seed{'s' if len(group.runs) > 1 else ''} {seeds}",
                verdict="another machine",
                scale=f"{where}; {describe_scale(group)}",
                command=f"duet report {quote_path(group.first.path)}",
            )
        )
    return item


def _show_competition(groups: Sequence[SeedGroup]) -> Item:
    """Show the published results of the competition, which runs on its 1,000 classes may test."""
    item = Item(claims.COMPETITION)
    found = [
        (float(errors["top5_error"]), group, run, views)
        for group in groups
        for run in group.runs
        for views in (10, 1)
        if len(run.checkpoint.classes) == claims.CLASSES and (errors := run.find_errors(views))
    ]
    item.rows.append(
        Comparison(
            what="top-1 / top-5 error of 7 networks, two of them pre-trained (7 CNNs*), ten views",
            paper=claims.SEVEN_ERRORS,
            ours="not made",
            verdict="not tested: takes two networks pre-trained on 22,000 classes, and five others",
            command="duet train pretrain2009 and pretrain2011, then finetune, each with --data and "
            "--run; duet ensemble of these two and five runs of dexp",
        )
    )
    best = min(found, key=lambda one: one[0], default=None)
    ours, scale, command = "no run on the 1,000 classes has been evaluated", "", ""
    if best is not None:
        error, group, run, views = best
        ours = f"{100 * error:.1f} % ({run.name}, {VIEW_WORDS[views]}, validation)"
        scale, command = describe_scale(group), _command_evaluation(group, views)
    words = "" if best is None else "below that, " if best[0] < claims.SECOND_BEST else "above, "
    item.rows.append(
        Comparison(
            what="top-5 error beside that of the second-best entry of 2012",
            group="" if best is None else best[1].letter,
            paper=f"{100 * claims.SECOND_BEST:.1f} % (test)",
            ours=ours,
            verdict=f"{words}on other images: the test labels are not public",
            scale=scale,
            command=command,
        )
    )
    return item
