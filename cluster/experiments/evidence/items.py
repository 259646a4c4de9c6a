"""Items that are numbers: errors, ten views, what a setting is worth, speed.

Items from results of other commands: averages of networks, and studies of several variants.
"""

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
from cluster.experiments.evidence.figures import images_in
from cluster.experiments.evidence.runs import (
    NOT_COMPARABLE,
    Gathered,
    Group,
    Item,
    Missing,
    Row,
    Run,
    scale_of,
    seeds_of,
    word,
)
from cluster.experiments.evidence.significance import (
    Difference,
    Spread,
    counting,
    difference,
    discord,
    paired,
    signed,
)
from cluster.run.folder import CONFIG
from cluster.run.probabilities import file_of

AGAIN = "make it again"
WEIGHTS = {
    "equal": "equal weights",
    "searched": "weights searched on these images",
    "held_out": "weights searched on the other half",
}


def studies(gathered: Gathered, missing: list[Missing]) -> Iterator[Item]:
    """Yield an item for all ensembles, and one for each study that was found."""
    item = Item(ENSEMBLE, kind="pictures", body=[])
    for path, table in gathered.ensembles:
        try:
            source = f"{path.resolve().parent.name}/{path.name}"
            item.rows += [replace(row, seeds=f"{source}: {row.seeds}") for row in _ensemble(table)]
            item.body += images_in(path.parent, [str(table["plot"])]) if "plot" in table else []
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            gathered.left_out.append(
                f"{path} is no result of cluster.experiments.ensemble ({error!r}); {AGAIN}."
            )
    if item.rows:
        yield item
    elif gathered.runs:
        missing.append(_no_ensemble(gathered))
    for path, table in gathered.studies:
        try:
            yield _study(path, table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            gathered.left_out.append(f"{path} is no result of a study ({error!r}); {AGAIN}.")
    if not gathered.studies:
        missing.append(
            Missing(
                title="Studies: ReLU against tanh, normalisations, overfitting, pre-training",
                command="python -m cluster.experiments.study STUDY --data DATA "
                "--out OUT, then this page with OUT",
            )
        )


def _no_ensemble(gathered: Gathered) -> Missing:
    runs = max((group.runs for group in gathered.groups), key=len)
    names = " ".join(word(run.path) for run in runs) + ("" if len(runs) > 1 else " RUN")
    lacking = [run for run in runs if not file_of(run.path, 10).is_file()]
    why = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of one kind, the paper averages five"
    if lacking:
        why += f"; {len(lacking)} without --save-probabilities of ten views"
    out = runs[0].path.parent / "ensemble.json"
    return Missing(
        title=ENSEMBLE.title,
        command=f"python -m cluster.experiments.ensemble {names} --out {word(out)}",
        why=why,
    )


def _ensemble(table: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of either form: one average of all runs, or a table of several sizes."""
    count = table.get("samples")
    told = [table.get("scale"), f"{count:,} images counted" if count else None]
    scale = "; ".join([*filter(None, told), f"{table['views']} views"])
    if "sizes" not in table:
        runs, searched = table["runs"], "searched" if table.get("searched") else "equal"
        each = ", ".join(f"{100 * run['top1_error']:.1f}" for run in runs)
        mean = [sum(run[name] for run in runs) / len(runs) for name in ("top1_error", "top5_error")]
        yield _row("1 network (mean)", 1, mean, f"{len(runs)} networks (top-1: {each})", scale)
        average = table["average"]
        found = [average["top1_error"], average["top5_error"]]
        what = f"{len(runs)} networks, {WEIGHTS[searched]}"
        yield _row(what, len(runs), found, "1 average", scale, mean, count)
        return
    single: list[float] | None = None
    for line in table["sizes"]:
        nets, ways = line["nets"], line["combinations"]
        for kind, words in WEIGHTS.items():
            errors = line[kind]
            found = [errors["top1_error"], errors["top5_error"]]
            single = found if nets == 1 else single
            spread = errors.get("top1_error_sd")
            seeds = f"{ways} combination{'s' if ways > 1 else ''}"
            seeds += f" (top-1 ± {100 * spread:.1f})" if spread else ""
            what = f"{nets} network" if nets == 1 else f"{nets} networks, {words}"
            yield _row(what, nets, found, seeds, scale, single if nets > 1 else None, count)
            if nets == 1:
                break


def _row(
    what: str, nets: int, found: list[float], seeds: str, scale: str,
    single: list[float] | None = None, count: int | None = None,
) -> Row:  # fmt: skip
    told = ENSEMBLE_ERRORS.get(nets)
    gain = ""
    verdict = NOT_COMPARABLE
    if single is not None:
        gains = [one - other for one, other in zip(found, single, strict=True)]
        gain = f" ({100 * gains[0]:+.1f} / {100 * gains[1]:+.1f} points)".replace("-", "−")
        verdict = _gained(found[0], single[0], count)
        verdict += " (flattered: fitted to them)" if WEIGHTS["searched"] in what else ""
    return Row(
        what=f"top-1 / top-5 error of {what}",
        paper=f"{100 * told.top1:.1f} % / {100 * told.top5:.1f} %" if told else "not given",
        ours=f"{100 * found[0]:.1f} % / {100 * found[1]:.1f} %{gain}",
        seeds=seeds,
        verdict=verdict,
        scale=scale,
    )


def _gained(average: float, single: float, count: int | None) -> str:
    """What it says that an average errs so much, and one network of it so much."""
    margin = counting(average, single, count) if count else 0.0
    if abs(average - single) <= margin:
        return "cannot be told from chance (of the images)"
    if average >= single:
        return "not lower: contrary to the paper"
    return "as the paper says" if count else "lower (of how many images is not told)"


def _study(path: Path, table: Mapping[str, Any]) -> Item:
    """A study, with its own claim; variants are compared with the first one."""
    claim = Claim(
        key=f"study-{table['study']}",
        title=f"Study: {table.get('title') or table['study']}",
        section=str(table.get("source") or ""),
        text=str(table.get("claim") or ""),
        number=str(table.get("paper") or "no number"),
    )
    item = Item(claim, kind="pictures", body=images_in(path.parent, [str(table.get("plot", ""))]))
    measure = str(table.get("measure") or table["rows"][0]["measure"])
    first: tuple[str, Spread] | None = None
    for name in dict.fromkeys(str(row["variant"]) for row in table["rows"]):
        mine = [row for row in table["rows"] if str(row["variant"]) == name]
        values = tuple(float(row["value"]) for row in mine if _is_number(row.get("value")))
        whole = Spread(values) if values else None
        rates = ", ".join(dict.fromkeys(f"{row['lr']:g}" for row in mine if row.get("lr")))
        item.rows.append(
            Row(
                what=f"{name}{f', lr {rates}' if rates else ''}: {_words(measure, table)}",
                paper=claim.number,
                ours=_mean(measure, whole),
                seeds=f"{len(values)} of {len(mine)} seeds ({_each(measure, mine)})",
                verdict=_against(measure, whole, len(mine), first),
                scale=str(table.get("scale") or ""),
            )
        )
        if first is None and whole is not None and len(values) == len(mine):
            first = (name, whole)
    return item


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _words(measure: str, table: Mapping[str, Any]) -> str:
    goal = table.get("goal")
    return {
        "pictures": "images to " + (f"{goal:.0%} training error" if goal else "the goal"),
        "error": "top-1 validation error",
        "gap": "validation less training error",
    }.get(measure, measure)


def _mean(measure: str, found: Spread | None) -> str:
    if found is None:
        return "not reached"
    if measure in ("error", "gap"):
        return str(found)
    spread = "" if found.deviation is None else f" ± {found.deviation:,.4g}"
    return f"{found.mean:,.5g}{spread}"


def _each(measure: str, rows: list[Any]) -> str:
    scale = 100 if measure in ("error", "gap") else 1
    return ", ".join(
        f"{scale * row['value']:,.4g}" if _is_number(row.get("value")) else "not reached"
        for row in rows
    )


def _against(
    measure: str, found: Spread | None, runs: int, first: tuple[str, Spread] | None
) -> str:
    """What a variant came to beside the first one."""
    if first is None:
        return "no verdict: not reached" if found is None else "what the others are compared with"
    name, other = first
    if found is None or len(found.values) < runs:
        return f"not reached by all, {name} was"
    gap: Difference = difference(found, other, None)
    if measure in ("error", "gap"):
        size = f"{gap} against {name}"
    else:
        size = f"{found.mean / other.mean:.2f} times {name}" if other.mean else ""
    if gap.margin is None:
        return f"{size}; no verdict: one seed each"
    return size if gap.telling else f"{size}; cannot be told from chance"


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
    """Images that an error of the group was counted on."""
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
                    scale=f"{scale_of(group)}; {counted(group, views):,.0f} images counted",
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
        "±: 95 %, over images: those that change sides, where the probabilities of both were "
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
                what="training images a second, median step",
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
