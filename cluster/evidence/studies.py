"""Items from results of other commands: averages of networks, and studies of several variants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.evidence.item import NOT_COMPARABLE, Item, Missing, Row, word
from cluster.experiments.evidence.claims import ENSEMBLE, ENSEMBLE_ERRORS, Claim
from cluster.experiments.evidence.figures import pictures_in
from cluster.experiments.evidence.runs import Gathered
from cluster.experiments.evidence.significance import Difference, Spread, counting, difference
from cluster.run.probabilities import file_of

AGAIN = "make it again"
WEIGHTS = {
    "equal": "equal weights",
    "searched": "weights searched on these pictures",
    "held_out": "weights searched on the other half",
}


def studies(gathered: Gathered, missing: list[Missing]) -> Iterator[Item]:
    """Yield an item for all ensembles, and one for each study that was found."""
    item = Item(ENSEMBLE, kind="pictures", body=[])
    for path, table in gathered.ensembles:
        try:
            source = f"{path.resolve().parent.name}/{path.name}"
            item.rows += [replace(row, seeds=f"{source}: {row.seeds}") for row in _ensemble(table)]
            item.body += pictures_in(path.parent, [str(table["plot"])]) if "plot" in table else []
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
                command="python -m cluster.experiments.study cluster/configs/studies/STUDY.toml --data DATA "
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
    told = [table.get("scale"), f"{count:,} pictures counted" if count else None]
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
        return "cannot be told from chance (of the pictures)"
    if average >= single:
        return "not lower: contrary to the paper"
    return "as the paper says" if count else "lower (of how many pictures is not told)"


def _study(path: Path, table: Mapping[str, Any]) -> Item:
    """A study, with its own claim; variants are compared with the first one."""
    claim = Claim(
        key=f"study-{table['study']}",
        title=f"Study: {table.get('title') or table['study']}",
        section=str(table.get("source") or ""),
        text=str(table.get("claim") or ""),
        number=str(table.get("paper") or "no number"),
    )
    item = Item(claim, kind="pictures", body=pictures_in(path.parent, [str(table.get("plot", ""))]))
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
        "pictures": "pictures to " + (f"{goal:.0%} training error" if goal else "the goal"),
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
