"""Items that are numbers: errors, ten views, single settings, speed, ensembles and studies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.experiments.evidence.claims import (
    ABLATIONS,
    ENSEMBLE,
    ENSEMBLE_ERRORS,
    ERRORS,
    PAPER_ERRORS,
    SPEED,
    VIEW_GAIN,
    VIEWS,
    Ablation,
    Claim,
)
from cluster.experiments.evidence.figures import embed_images
from cluster.experiments.evidence.runs import (
    NOT_COMPARABLE,
    Comparison,
    Evidence,
    Item,
    Missing,
    SeedGroup,
    TrainedRun,
    describe_scale,
    quote_path,
)
from cluster.experiments.evidence.significance import (
    Difference,
    Spread,
    binomial_margin,
    compare_groups,
    compare_pairs,
    format_points,
    view_margins,
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
AGAIN = "make it again"
DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
"""What a result file with other contents raises."""
SHARES = ("error", "gap")
"""Measures of a study that are errors; the others count images."""


def make_results(evidence: Evidence, missing: list[Missing]) -> Iterator[Item]:
    """Yield the items on errors, settings and speed; what does not exist is added to `missing`."""
    for run in evidence.runs:
        for views in (1, 10):
            if run.errors(views) is None:
                missing.append(_ask_for_evaluation(run, views, evidence.data_argument(run)))
    yield from filter(None, (_show_errors(evidence), _show_views(evidence)))
    for claim in ABLATIONS:
        item = _show_ablation(claim, evidence.groups)
        if item.rows:
            yield item
        elif evidence.groups:
            missing.append(_ask_for_ablation(claim, evidence))
    if evidence.groups:
        yield _show_speed(evidence.groups)


def _ask_for_evaluation(run: TrainedRun, views: int, data: str) -> Missing:
    old = run.records.evaluations.get(views, {}).get("step")
    return Missing(
        title=f"Errors of {run.name} with {VIEW_WORDS[views]}",
        command=f"python -m cluster.evaluate {quote_path(run.path)} --data {data} --views {views} "
        "--save-probabilities",
        why="" if old in (None, run.step) else f"its evaluation is of step {old}",
    )


def _spread(group: SeedGroup, views: int, name: str) -> Spread | None:
    """An error of the runs of a group that have it; None if none has."""
    tables = [run.errors(views) for run in group.runs]
    values = tuple(float(table[name]) for table in tables if table)
    return Spread(values) if values else None


def _count_images(group: SeedGroup, views: int) -> float:
    """Number of images that each error of the group was counted on, at least."""
    tables = [run.errors(views) for run in group.runs]
    return min(float(table["samples"]) for table in tables if table)


def _count_seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _show_errors(evidence: Evidence) -> Item | None:
    item = Item(ERRORS)
    paper = {1: PAPER_ERRORS[0], 10: PAPER_ERRORS[2]}
    for group in evidence.groups:
        for views in (1, 10):
            spreads = {rank: _spread(group, views, name) for rank, name in RANKS}
            found = {rank: one for rank, one in spreads.items() if one is not None}
            if not found:
                continue
            each = "; ".join(
                f"{rank}: " + ", ".join(f"{100 * value:.1f}" for value in one.values)
                for rank, one in found.items()
            )
            errors, scale = paper[views], describe_scale(group)
            item.rows.append(
                Comparison(
                    what=f"top-1 / top-5 error, {VIEW_WORDS[views]}",
                    group=group.letter,
                    paper=f"{100 * errors.top1:.1f} % / {100 * errors.top5:.1f} % ({errors.name})",
                    ours=" / ".join(map(str, found.values())),
                    seeds=f"{_count_seeds(len(found['top-1'].values))} ({each})",
                    verdict=NOT_COMPARABLE if scale != "none" else "the same scale",
                    scale=f"{scale}; {_count_images(group, views):,.0f} images counted",
                )
            )
    return item if item.rows else None


def _show_views(evidence: Evidence) -> Item | None:
    item = Item(VIEWS)
    for group in evidence.groups:
        both = [
            (one, ten) for run in group.runs if (one := run.errors(1)) and (ten := run.errors(10))
        ]
        if not both:
            continue
        margins = _margins_of_views(group, both)
        for (rank, name), margin, expected in zip(RANKS, margins, VIEW_GAIN, strict=True):
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
    return item if item.rows else None


def _margins_of_views(
    group: SeedGroup, both: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> list[float]:
    """Largest 95 % margin of one network's gain by ten views, for each of `RANKS`."""
    known = [one for run in group.runs if (one := view_margins(run.path))]
    if known:
        return [max(margins) for margins in zip(*known, strict=True)]
    images = _count_images(group, 10)
    return [
        max(binomial_margin(one[name], ten[name], images) for one, ten in both) for _, name in RANKS
    ]


def _compare(
    what: str, letters: str, gap: Difference, expected: float | None, seeds: str, group: SeedGroup
) -> Comparison:
    return Comparison(
        what=what,
        group=letters,
        paper="no number" if expected is None else f"{format_points(expected)} points",
        ours=str(gap),
        seeds=seeds,
        verdict=gap.verdict(expected),
        scale=describe_scale(group),
    )


def find_pairs(
    claim: Ablation, groups: Sequence[SeedGroup]
) -> Iterator[tuple[SeedGroup, SeedGroup]]:
    """Yield groups that differ in one setting alone: with the paper's choice, and with another."""

    def rest(group: SeedGroup) -> dict[str, Any]:
        free = {claim.setting, *claim.free}
        return {name: value for name, value in group.settings.items() if name not in free}

    for group in groups:
        if group.settings[claim.setting] == claim.paper_has:
            for other in groups:
                is_instead = other.settings[claim.setting] in claim.instead
                if is_instead and rest(other) == rest(group):
                    yield group, other


def _show_ablation(claim: Ablation, groups: Sequence[SeedGroup]) -> Item:
    item = Item(claim)
    for group, other in find_pairs(claim, groups):
        views = 10 if all(_spread(one, 10, "top1_error") for one in (group, other)) else 1
        for (rank, name), expected in zip(RANKS, claim.differences, strict=True):
            ours, theirs = _spread(group, views, name), _spread(other, views, name)
            if ours is None or theirs is None:
                continue
            images = min(_count_images(group, views), _count_images(other, views))
            instead = other.settings[claim.setting]
            setting = f"{claim.setting} {claim.paper_has} less {instead}"
            what = f"{rank} error, {VIEW_WORDS[views]}, {setting}"
            letters = f"{group.letter} − {other.letter}"
            gap = compare_groups(ours, theirs, images)
            seeds = " − ".join(f"{one} ({_count_seeds(len(one.values))})" for one in (ours, theirs))
            item.rows.append(_compare(what, letters, gap, expected, seeds, group))
    return item


def _ask_for_ablation(claim: Ablation, evidence: Evidence) -> Missing:
    groups = evidence.groups
    base = next(
        (one for one in groups if one.settings[claim.setting] == claim.paper_has), groups[0]
    )
    run = base.first
    return Missing(
        title=claim.title,
        command=f"python -m cluster.train {quote_path(run.path / CONFIG)} "
        f"--data {evidence.data_argument(run)} "
        f"--run {quote_path(f'{run.path}-{claim.key}')} {claim.command}",
        why=f"no two groups of runs differ in {claim.setting} alone; for the spread repeat it "
        "with --seed of each run",
    )


def _show_speed(groups: Sequence[SeedGroup]) -> Item:
    item = Item(SPEED)
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
                paper=SPEED.number,
                ours=" to ".join(f"{value:,.0f}" for value in sorted({min(medians), max(medians)}))
                + " img/s",
                seeds=f"seed{'s' if len(group.runs) > 1 else ''} {seeds}",
                verdict="another machine",
                scale=f"{where}; {describe_scale(group)}",
            )
        )
    return item


def make_studies(evidence: Evidence, missing: list[Missing]) -> Iterator[Item]:
    """Yield an item for all ensembles, and one for each study that was found."""
    item = Item(ENSEMBLE, kind="images", body=[])
    for path, table in evidence.ensembles:
        try:
            source = f"{path.resolve().parent.name}/{path.name}"
            rows = [replace(row, seeds=f"{source}: {row.seeds}") for row in _show_ensemble(table)]
            item.rows += rows
            item.body += embed_images(path.parent, [str(table["plot"])]) if "plot" in table else []
        except DAMAGED as error:
            evidence.skipped.append(
                f"{path} is no result of cluster.experiments.ensemble ({error!r}); {AGAIN}."
            )
    if item.rows:
        yield item
    elif evidence.runs:
        missing.append(_ask_for_ensemble(evidence))
    for path, table in evidence.studies:
        try:
            yield _show_study(path, table)
        except DAMAGED as error:
            evidence.skipped.append(f"{path} is no result of a study ({error!r}); {AGAIN}.")
    if not evidence.studies:
        missing.append(
            Missing(
                title="Studies: ReLU against tanh, normalisations, overfitting, pre-training",
                command="python -m cluster.experiments.study STUDY --data DATA "
                "--out OUT, then this page with OUT",
            )
        )


def _ask_for_ensemble(evidence: Evidence) -> Missing:
    runs = max((group.runs for group in evidence.groups), key=len)
    names = " ".join(quote_path(run.path) for run in runs) + ("" if len(runs) > 1 else " RUN")
    lacking = [run for run in runs if not probability_path(run.path, 10).is_file()]
    why = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of one kind, the paper averages five"
    if lacking:
        why += f"; {len(lacking)} without --save-probabilities of ten views"
    out = runs[0].path.parent / "ensemble.json"
    return Missing(
        title=ENSEMBLE.title,
        command=f"python -m cluster.experiments.ensemble {names} --out {quote_path(out)}",
        why=why,
    )


def _show_ensemble(table: Mapping[str, Any]) -> Iterator[Comparison]:
    """Yield the rows of either form: one average of all runs, or a table of several sizes."""
    count = table.get("samples")
    known = [table.get("scale"), f"{count:,} images counted" if count else None]
    scale = "; ".join([*filter(None, known), f"{table['views']} views"])
    if "sizes" not in table:
        runs, kind = table["runs"], "searched" if table.get("searched") else "equal"
        each = ", ".join(f"{100 * run['top1_error']:.1f}" for run in runs)
        single = [sum(run[name] for run in runs) / len(runs) for _, name in RANKS]
        seeds = f"{len(runs)} networks (top-1: {each})"
        yield _compare_average("1 network (mean)", 1, single, seeds, scale)
        found = [table["average"][name] for _, name in RANKS]
        what = f"{len(runs)} networks, {WEIGHTS[kind]}"
        yield _compare_average(what, len(runs), found, "1 average", scale, single, count)
        return
    first: list[float] | None = None
    for line in table["sizes"]:
        nets, ways = line["nets"], line["combinations"]
        for kind, words in WEIGHTS.items():
            found = [line[kind][name] for _, name in RANKS]
            deviation = line[kind].get("top1_error_sd")
            seeds = f"{ways} combination{'s' if ways > 1 else ''}"
            seeds += f" (top-1 ± {100 * deviation:.1f})" if deviation else ""
            if nets == 1:  # weights make no difference
                first = found
                yield _compare_average("1 network", 1, found, seeds, scale, None, count)
                break
            what = f"{nets} networks, {words}"
            yield _compare_average(what, nets, found, seeds, scale, first, count)


def _compare_average(
    what: str, nets: int, found: list[float], seeds: str, scale: str,
    single: list[float] | None = None, count: int | None = None,
) -> Comparison:  # fmt: skip
    """Compare top-1 and top-5 errors of an average with those of a `single` network."""
    paper = ENSEMBLE_ERRORS.get(nets)
    gain = ""
    verdict = NOT_COMPARABLE
    if single is not None:
        gains = [format_points(one - other) for one, other in zip(found, single, strict=True)]
        gain = f" ({gains[0]} / {gains[1]} points)"
        verdict = _judge_average(found[0], single[0], count)
        verdict += " (flattered: fitted to them)" if WEIGHTS["searched"] in what else ""
    return Comparison(
        what=f"top-1 / top-5 error of {what}",
        paper=f"{100 * paper.top1:.1f} % / {100 * paper.top5:.1f} %" if paper else "not given",
        ours=f"{100 * found[0]:.1f} % / {100 * found[1]:.1f} %{gain}",
        seeds=seeds,
        verdict=verdict,
        scale=scale,
    )


def _judge_average(average: float, single: float, count: int | None) -> str:
    """Judge the error of an average beside that of one of its networks."""
    margin = binomial_margin(average, single, count) if count else 0.0
    if abs(average - single) <= margin:
        return "cannot be told from chance (of the images)"
    if average >= single:
        return "not lower: contrary to the paper"
    return "as the paper says" if count else "lower (of how many images is not told)"


def _show_study(path: Path, table: Mapping[str, Any]) -> Item:
    """Show a study with its own claim; its variants are compared with the first one."""
    claim = Claim(
        key=f"study-{table['study']}",
        title=f"Study: {table.get('title') or table['study']}",
        section=str(table.get("source") or ""),
        text=str(table.get("claim") or ""),
        number=str(table.get("paper") or "no number"),
    )
    item = Item(claim, kind="images", body=embed_images(path.parent, [str(table.get("plot", ""))]))
    measure = str(table.get("measure") or table["rows"][0]["measure"])
    first: tuple[str, Spread] | None = None
    for name in dict.fromkeys(str(row["variant"]) for row in table["rows"]):
        mine = [row for row in table["rows"] if str(row["variant"]) == name]
        values = tuple(float(row["value"]) for row in mine if _is_number(row.get("value")))
        whole = Spread(values) if values else None
        rates = ", ".join(dict.fromkeys(f"{row['lr']:g}" for row in mine if row.get("lr")))
        item.rows.append(
            Comparison(
                what=f"{name}{f', lr {rates}' if rates else ''}: "
                f"{_describe_measure(measure, table.get('goal'))}",
                paper=claim.number,
                ours=_format_mean(measure, whole),
                seeds=f"{len(values)} of {len(mine)} seeds ({_format_each(measure, mine)})",
                verdict=_compare_variant(measure, whole, len(mine), first),
                scale=str(table.get("scale") or ""),
            )
        )
        if first is None and whole is not None and len(values) == len(mine):
            first = (name, whole)
    return item


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _describe_measure(measure: str, goal: float | None) -> str:
    return {
        "pictures": "images to " + (f"{goal:.0%} training error" if goal else "the goal"),
        "error": "top-1 validation error",
        "gap": "validation less training error",
    }.get(measure, measure)


def _format_mean(measure: str, found: Spread | None) -> str:
    if found is None:
        return "not reached"
    if measure in SHARES:
        return str(found)
    spread = "" if found.deviation is None else f" ± {found.deviation:,.4g}"
    return f"{found.mean:,.5g}{spread}"


def _format_each(measure: str, rows: list[Any]) -> str:
    scale = 100 if measure in SHARES else 1
    return ", ".join(
        f"{scale * row['value']:,.4g}" if _is_number(row.get("value")) else "not reached"
        for row in rows
    )


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
