"""Items on studies and on ensembles, from the results that their commands wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.experiments.evidence import claims
from cluster.experiments.evidence.claims import Claim
from cluster.experiments.evidence.figures import embed_images
from cluster.experiments.evidence.items import NOT_COMPARABLE, RANKS
from cluster.experiments.evidence.runs import Comparison, Evidence, Item, quote_path
from cluster.experiments.evidence.significance import (
    Spread,
    compare_groups,
    compute_binomial_margin,
    format_points,
)
from cluster.run.probabilities import probability_path

WEIGHTS = {
    "equal": "equal weights",
    "searched": "weights searched on these images",
    "held_out": "weights searched on the other half",
}
DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
"""Exceptions that a result file with other contents raises."""
SHARES = ("error", "gap")
"""Measures of a study that are errors; the others count images."""


def make_studies(evidence: Evidence) -> Iterator[Item]:
    """Yield an item for all ensembles, and one for each study that was found."""
    item = Item(claims.ENSEMBLE, kind="images", body=[])
    for path, table in evidence.ensembles:
        try:
            source = f"{path.resolve().parent.name}/{path.name}"
            command = f"duet ensemble RUN ... --out {quote_path(path)}"
            if "study" in table:
                command = _command_study(path, table)
            rows = [
                replace(row, seeds=f"{source}: {row.seeds}", command=command)
                for row in _show_ensemble(table)
            ]
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
    command = _command_study(path, table)
    scale = str(table.get("scale") or "")
    rows = _show_goals(table) if table.get("goals") else _show_variants(table)
    item.rows = [
        replace(row, paper=row.paper or claim.number, scale=scale, command=command) for row in rows
    ]
    return item


def _command_study(path: Path, table: Mapping[str, Any]) -> str:
    """Return the command of a study; one made before study.json had it names the file alone."""
    words = str(table.get("command") or f"duet study {table['study']}")
    return f"{words} --out {quote_path(path.parent)}"


def _show_goals(table: Mapping[str, Any]) -> Iterator[Comparison]:
    """Yield a row for each goal of a study and each variant; the paper's number is of the last."""
    for part in table["goals"]:
        first = part["variants"][0]
        for one in part["variants"]:
            each = [f"{count:,.0f}" if _is_number(count) else "not reached"
                    for count in one["each"]]  # fmt: skip
            known = Spread(tuple(filter(_is_number, one["each"])) or (math.nan,))
            is_whole = one["came_to_it"] == one["n"]
            if one is first:
                verdict = "what the others are compared with" if is_whole else "not reached by all"
            elif one["against_first"] is not None:
                verdict = f"{one['against_first']:.2f} times {first['variant']}"
                verdict += f" ({', '.join(f'{factor:.2f}' for factor in one['factors'])})"
            elif one["above"] is not None:
                verdict = f"more than {one['above']:.1f} times {first['variant']}"
            else:
                verdict = "no verdict"
            at = "" if one["at"] is None else f", {one['at']}"
            yield Comparison(
                what=f"{one['variant']}{at}: images to {100 * part['goal']:g}% training error",
                paper="" if part is table["goals"][-1] else "no number",
                ours=_format_mean("pictures", known if is_whole else None),
                seeds=f"{one['came_to_it']} of {one['n']} seeds ({', '.join(each)})",
                verdict=verdict,
            )


def _show_variants(table: Mapping[str, Any]) -> Iterator[Comparison]:
    """Yield a row for each variant of a study."""
    measure = str(table.get("measure") or table["rows"][0]["measure"])
    goal = f"{100 * table['goal']:g}% training error" if table.get("goal") else "the goal"
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
        yield Comparison(
            what=f"{name}{f', lr {rates}' if rates else ''}: {number}",
            paper="",
            ours=_format_mean(measure, whole),
            seeds=f"{len(known)} of {len(mine)} seeds ({', '.join(each)})",
            verdict=_compare_variant(measure, whole, len(mine), first),
        )
        if first is None and whole is not None and len(known) == len(mine):
            first = (name, whole)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _format_mean(measure: str, found: Spread | None) -> str:
    if found is None:
        return "not reached"
    if measure in SHARES:
        return str(found)
    spread = "" if found.deviation is None else f" ± {found.deviation:,.0f}"
    return f"{found.mean:,.0f}{spread}"


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
