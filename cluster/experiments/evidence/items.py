"""Items that are numbers: errors, ten views, single settings, speed, ensembles and studies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from cluster.experiments.evidence import claims
from cluster.experiments.evidence.claims import Ablation, Claim
from cluster.experiments.evidence.figures import embed_images
from cluster.experiments.evidence.runs import (
    Comparison,
    Evidence,
    Item,
    SeedGroup,
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
from cluster.run.folder import CONFIG
from cluster.run.probabilities import probability_path

RANKS = (("top-1", "top1_error"), ("top-5", "top5_error"))
VIEW_WORDS = {1: "one view", 10: "ten views"}
WEIGHTS = {
    "equal": "equal weights",
    "searched": "weights searched on these images",
    "held_out": "weights searched on the other half",
}
NOT_COMPARABLE = "another scale"
DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
"""Exceptions that a result file with other contents raises."""
SHARES = ("error", "gap")
"""Measures of a study that are errors; the others count images."""


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
        item = _show_ablation(claim, evidence.groups)
        if item.rows:
            yield item
        elif evidence.groups:
            _ask_for_ablation(claim, evidence)
    if evidence.groups:
        yield _show_speed(evidence.groups)


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


def _show_errors(groups: Sequence[SeedGroup]) -> Item:
    item = Item(claims.ERRORS)
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
                )
            )
    return item


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
            item.rows.append(_compare(what, group.letter, gap, expected, seeds, group))
    item.notes.append(
        "±: 95 %, over images: those that change sides, where the probabilities of both were "
        "kept (McNemar), else as if each had been counted on others; from three seeds on over "
        "seeds, if that is more."
    )
    return item


def _compare(
    what: str, letters: str, gap: Difference, expected: float | None, seeds: str, group: SeedGroup
) -> Comparison:
    return Comparison(
        what=what,
        group=letters,
        paper="no number" if expected is None else f"{format_points(expected)} points",
        ours=str(gap),
        seeds=seeds,
        verdict=gap.judge(expected),
        scale=describe_scale(group),
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


def _show_ablation(claim: Ablation, groups: Sequence[SeedGroup]) -> Item:
    item = Item(claim)
    for group, other in find_pairs(claim, groups):
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
            item.rows.append(_compare(what, letters, gap, expected, seeds, group))
    return item


def _ask_for_ablation(claim: Ablation, evidence: Evidence) -> None:
    runs = [group.first for group in evidence.groups]
    run = next((one for one in runs if one.settings[claim.setting] == claim.paper_has), runs[0])
    evidence.add_missing(
        claim.title,
        f"duet train {quote_path(run.path / CONFIG)} "
        f"--data {evidence.quote_data(run)} "
        f"--run {quote_path(f'{run.path}-{claim.key}')} {claim.command}",
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
            )
        )
    return item


def make_studies(evidence: Evidence) -> Iterator[Item]:
    """Yield an item for all ensembles, and one for each study that was found."""
    item = Item(claims.ENSEMBLE, kind="images", body=[])
    for path, table in evidence.ensembles:
        try:
            source = f"{path.resolve().parent.name}/{path.name}"
            rows = [replace(row, seeds=f"{source}: {row.seeds}") for row in _show_ensemble(table)]
            item.rows += rows
            item.body += embed_images([path.parent / str(table["plot"])] if "plot" in table else [])
        except DAMAGED as error:
            evidence.skipped.append(
                f"{path} is no result of cluster.experiments.ensemble ({error!r}); make it again."
            )
    if item.rows:
        yield item
    elif evidence.runs:
        _ask_for_ensemble(evidence)
    for path, table in evidence.studies:
        try:
            yield _show_study(path, table)
        except DAMAGED as error:
            evidence.skipped.append(f"{path} is no result of a study ({error!r}); make it again.")
    if not evidence.studies:
        evidence.add_missing(
            "Studies: ReLU against tanh, normalisations, overfitting, pre-training",
            "duet study STUDY --data DATA --out OUT, then this page with OUT",
        )


def _ask_for_ensemble(evidence: Evidence) -> None:
    runs = max((group.runs for group in evidence.groups), key=len)
    names = " ".join(quote_path(run.path) for run in runs) + ("" if len(runs) > 1 else " RUN")
    lacking = [run for run in runs if not probability_path(run.path, 10).is_file()]
    why = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of one kind, the paper averages five"
    if lacking:
        why += f"; {len(lacking)} without --save-probabilities of ten views"
    out = runs[0].path.parent / "ensemble.json"
    command = f"duet ensemble {names} --out {quote_path(out)}"
    evidence.add_missing(claims.ENSEMBLE.title, command, why)


def _show_ensemble(table: Mapping[str, Any]) -> Iterator[Comparison]:
    """Yield a row for each average; they are compared with a single network."""
    count = table.get("samples")
    known = [table.get("scale"), f"{count:,} images counted" if count else None]
    single: list[float] | None = None
    for what, nets, found, seeds in _list_averages(table):
        gain, verdict = "", NOT_COMPARABLE
        if single is not None:
            gains = [format_points(one - other) for one, other in zip(found, single, strict=True)]
            gain = f" ({gains[0]} / {gains[1]} points)"
            margin = compute_binomial_margin(found[0], single[0], count) if count else 0.0
            if abs(found[0] - single[0]) <= margin:
                verdict = "cannot be told from chance (of the images)"
            elif found[0] >= single[0]:
                verdict = "not lower: contrary to the paper"
            else:
                verdict = "as the paper says" if count else "lower (of how many images is not told)"
            verdict += " (flattered: fitted to them)" if WEIGHTS["searched"] in what else ""
        elif nets == 1:
            single = found
        yield Comparison(
            what=f"top-1 / top-5 error of {what}",
            paper=claims.ENSEMBLE_ERRORS.get(nets, "not given"),
            ours=f"{100 * found[0]:.1f} % / {100 * found[1]:.1f} %{gain}",
            seeds=seeds,
            verdict=verdict,
            scale="; ".join([*filter(None, known), f"{table['views']} views"]),
        )


def _list_averages(table: Mapping[str, Any]) -> Iterator[tuple[str, int, list[float], str]]:
    """Yield what was averaged, how many networks, top-1 and top-5 error, and the runs of each.

    A result has one average of all runs, or a table of several sizes.
    """
    if "sizes" not in table:
        runs, kind = table["runs"], "searched" if table.get("searched") else "equal"
        each = ", ".join(f"{100 * run['top1_error']:.1f}" for run in runs)
        means = [sum(run[name] for run in runs) / len(runs) for _, name in RANKS]
        yield "1 network (mean)", 1, means, f"{len(runs)} networks (top-1: {each})"
        found = [table["average"][name] for _, name in RANKS]
        yield f"{len(runs)} networks, {WEIGHTS[kind]}", len(runs), found, "1 average"
        return
    for line in table["sizes"]:
        nets, ways = line["nets"], line["combinations"]
        for kind, words in WEIGHTS.items():
            found = [line[kind][name] for _, name in RANKS]
            deviation = line[kind].get("top1_error_sd")
            seeds = f"{ways} combination{'s' if ways > 1 else ''}"
            seeds += f" (top-1 ± {100 * deviation:.1f})" if deviation else ""
            if nets == 1:  # weights make no difference
                yield "1 network", 1, found, seeds
                break
            yield f"{nets} networks, {words}", nets, found, seeds


def _show_study(path: Path, table: Mapping[str, Any]) -> Item:
    """Show a study with its own claim; its variants are compared with the first one."""
    claim = Claim(
        key=f"study-{table['study']}",
        title=f"Study: {table.get('title') or table['study']}",
        section=str(table.get("source") or ""),
        text=str(table.get("claim") or ""),
        number=str(table.get("paper") or "no number"),
    )
    item = Item(claim, kind="images", body=embed_images([path.parent / str(table.get("plot", ""))]))
    measure = str(table.get("measure") or table["rows"][0]["measure"])
    goal = f"{table['goal']:.0%} training error" if table.get("goal") else "the goal"
    number = {
        "pictures": f"images to {goal}",
        "error": "top-1 validation error",
        "gap": "validation less training error",
    }.get(measure, measure)
    factor = 100 if measure in SHARES else 1
    first: tuple[str, Spread] | None = None
    for name in dict.fromkeys(str(row["variant"]) for row in table["rows"]):
        mine = [row for row in table["rows"] if str(row["variant"]) == name]
        values = [row["value"] if _is_number(row.get("value")) else None for row in mine]
        known = tuple(float(value) for value in values if value is not None)
        whole = Spread(known) if known else None
        each = ["not reached" if one is None else f"{factor * one:,.4g}" for one in values]
        rates = ", ".join(dict.fromkeys(f"{row['lr']:g}" for row in mine if row.get("lr")))
        item.rows.append(
            Comparison(
                what=f"{name}{f', lr {rates}' if rates else ''}: {number}",
                paper=claim.number,
                ours=_format_mean(measure, whole),
                seeds=f"{len(known)} of {len(mine)} seeds ({', '.join(each)})",
                verdict=_compare_variant(measure, whole, len(mine), first),
                scale=str(table.get("scale") or ""),
            )
        )
        if first is None and whole is not None and len(known) == len(mine):
            first = (name, whole)
    return item


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _format_mean(measure: str, found: Spread | None) -> str:
    if found is None:
        return "not reached"
    if measure in SHARES:
        return str(found)
    spread = "" if found.deviation is None else f" ± {found.deviation:,.4g}"
    return f"{found.mean:,.5g}{spread}"


def _compare_variant(
    measure: str, found: Spread | None, runs: int, first: tuple[str, Spread] | None
) -> str:
    """Compare a variant of a study with the first one."""
    if first is None:
        return "no verdict: not reached" if found is None else "what the others are compared with"
    name, other = first
    if found is None or len(found.values) < runs:
        return f"not reached by all, {name} was"
    gap = compare_groups(found, other, None)
    if measure in SHARES:
        size = f"{gap} against {name}"
    else:
        size = f"{found.mean / other.mean:.2f} times {name}" if other.mean else ""
    if gap.margin is None:
        return f"{size}; no verdict: one seed each"
    return size if gap.is_significant else f"{size}; cannot be told from chance"
