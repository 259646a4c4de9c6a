"""State of a run, read from the files in RUN, also by another machine that sees the folder.

Nothing here needs torch, Ray, or the run's own machine; only the end of long files is read.
"""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import Config, read_run_config
from cluster.run import folder
from cluster.run.jsonl import WAITS, count_rows, read_tail

TAIL = 400
"""Number of rows to read from the end of metrics.jsonl."""
SLOW = 20.0
"""A run counts as stalled after so many times its usual step (and QUIET seconds) without a row."""
QUIET = 60.0
SOON = 10.0
"""Seconds within which the controller notices dead workers and restarts them."""
AGAIN = 600.0
"""Seconds after an end for which a run counts as restarting."""
RECENT = 50
"""Number of rows whose means are shown."""
MEANS = (
    "loss", "top1_error", "img_s", "data_wait", *WAITS, "stall", "exchange", "reduce", "saving",
    "seconds",
)  # fmt: skip


@dataclass(kw_only=True)
class RunState:
    """State of a run; None or empty where its files say nothing."""

    run: str
    state: str
    """running, stalled, stopped, failed, finished, or not started."""
    why: str = ""
    evidence: str = ""
    """Evidence that it is running or stalled, and how sure it is."""
    elapsed_s: float | None = None
    """Seconds from the first start until now, or until the end."""
    step: int = 0
    total: int | None = None
    epoch: float | None = None
    left_s: float | None = None
    """Estimated seconds to the end at the present speed."""
    age_s: float | None = None
    """Seconds since the last row."""
    last: dict[str, Any] = field(default_factory=dict)
    """Means of metrics over the last rows."""
    img_s_now: float | None = None
    """Images a second in the last row."""
    losses: list[float] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    replaced: int = 0
    """Number of damaged images in RUN/quarantine.jsonl."""
    starts: int = 0
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Time, step and reason of the last ends, newest last."""
    workers: list[dict[str, Any]] = field(default_factory=list)


def read_state(run: Path, now: float | None = None, *, mirrored: bool = False) -> RunState:
    """Read the state of a run.

    Args:
        run: run folder.
        now: seconds since 1970; None: the present.
        mirrored: the folder is a copy from a store, whose rows end with the last checkpoint.

    Raises:
        UsageError: the folder holds no run.
    """
    now = time.time() if now is None else now
    config, _ = read_run_config(run / folder.CONFIG)
    rows = [row for row in read_tail(run / folder.METRICS, TAIL) if "step" in row]
    validations = [row for row in read_tail(run / folder.VALIDATION, 10_000) if "top1_error" in row]
    attempts = list(read_tail(run / folder.ATTEMPTS, 10_000))
    state = RunState(run=str(run), state="not started")
    if not mirrored:
        with suppress(OSError):
            state.age_s = max(0.0, now - (run / folder.METRICS).stat().st_mtime)
    if rows:
        _fill_metrics(state, rows)
    if validations:
        state.validation = validations[-1]
        state.best = min(validations, key=lambda row: float(row["top1_error"]))
    starts = [row for row in attempts if row.get("event") == "start"]
    state.total = _find_total(config, rows, starts)
    state.checkpoint = _find_checkpoint(run, config, now)
    state.replaced = count_rows(run / folder.QUARANTINE)
    if attempts:
        _fill_attempts(state, attempts, starts, now)
        if state.state == "running" and not state.why:
            _judge_running(state, attempts[-1], run, now, mirrored)
    if state.state == "running" and state.total and "seconds" in state.last:
        state.left_s = (state.total - state.step) * state.last["seconds"]
    return state


def _fill_metrics(state: RunState, rows: list[dict[str, Any]]) -> None:
    """Fill in the fields that follow from metrics.jsonl."""
    last, recent = rows[-1], rows[-RECENT:]
    state.step, state.epoch, state.img_s_now = last["step"], last.get("epoch"), last.get("img_s")
    state.losses = [row["loss"] for row in rows if "loss" in row]
    for key in MEANS:
        if values := [row[key] for row in recent if key in row]:
            state.last[key] = sum(values) / len(values)
    state.last |= {key: last[key] for key in ("lr", "lr_bias", "replicas") if key in last}


def _fill_attempts(
    state: RunState, attempts: list[dict[str, Any]], starts: list[dict[str, Any]], now: float
) -> None:
    """Fill in the fields that follow from the starts and ends of the workers."""
    ends = [row for row in attempts if row.get("event") == "end"]
    final = attempts[-1]
    over = final.get("event") == "end"
    why = str(final.get("why", "")) if over else ""
    # A start that was cut before its first step has an end only.
    state.starts = max(len(starts), len({row["attempt"] for row in attempts if "attempt" in row}))
    state.ends = [{key: row.get(key) for key in ("time", "step", "why")} for row in ends[-5:]]
    state.workers = list(starts[-1].get("workers", [])) if starts else []
    state.state = why if why in ("finished", "stopped") else "running"
    ended = _read_time(final)
    if state.state == "stopped":
        state.why = "by hand; the same command resumes"
    elif over and state.state == "running" and (line := _read_error(Path(state.run), ended)):
        state.state, state.why = "failed", line
    elif over and state.state == "running" and now - ended < AGAIN:
        state.why = f"starting again: {why}"
    until = now if state.state == "running" else ended
    state.elapsed_s = max(0.0, until - _read_time(attempts[0]))


def _judge_running(
    state: RunState, final: dict[str, Any], run: Path, now: float, mirrored: bool
) -> None:
    """Judge whether a run without a recorded end is still running."""
    if mirrored:
        state.evidence = "not sure: the store has its rows up to the last save only"
        return
    # A start takes its time before there is a row.
    since = max(0.0, now - _read_time(final))
    since = since if state.age_s is None else min(since, state.age_s)
    steps = SLOW * state.last.get("seconds", 0.0)
    usual = max(QUIET, steps, 3 * float(state.validation.get("seconds", 0.0)))
    leader = state.workers[0].get("node") if state.workers else None
    held = _is_locked(run / ".leader") if leader == platform.node() else None
    ended = final.get("event") == "end"
    if not ended and held is False and since > SOON:
        state.state = "stalled"
        state.why = "its leading worker is gone; the same command resumes, if its driver is, too"
        state.evidence = "sure: nobody holds RUN/.leader on this machine"
    elif since > usual or (ended and since > AGAIN):
        state.state = "stalled"
        state.why = f"no row for {since:,.0f} s: something waits"
        if not held:
            state.why += ", or its machines are gone"
    if held:
        state.evidence = "sure: a worker on this machine holds RUN/.leader"
    elif not state.evidence:
        sure = "likely" if state.state == "running" else "not sure"
        state.evidence = f"{sure}: by the age of the last row or start, {since:,.0f} s"


def _is_locked(path: Path) -> bool | None:
    """Return whether a process of this machine locks a file; None if that is unknown.

    Trying to take the lock could keep the run itself from it.
    """
    try:
        number = str(path.stat().st_ino)
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return any(
        "FLOCK" in fields and fields[fields.index("FLOCK") + 4].rpartition(":")[2] == number
        for fields in map(str.split, locks)
    )


def _read_time(row: dict[str, Any]) -> float:
    return float(row.get("time", 0.0))


def _read_error(run: Path, ended: float) -> str:
    """Return the message in RUN/error.log, if it was written for this end."""
    path = run / folder.ERRORS
    try:
        if path.stat().st_mtime < ended - 60:
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[1] if len(lines) > 1 else ""


def _find_total(
    config: Config, rows: list[dict[str, Any]], starts: list[dict[str, Any]]
) -> int | None:
    """Return the steps of the whole run; unknown for a young run whose length is in epochs."""
    if config.steps:
        return config.steps
    if starts and "total" in starts[-1]:
        return int(starts[-1]["total"])
    if rows and rows[-1].get("epoch", 0.0) > 0.01:  # it has 4 decimals
        return config.total_steps(round(rows[-1]["position"] / rows[-1]["epoch"]))
    return None


def _find_checkpoint(run: Path, config: Config, now: float) -> dict[str, Any]:
    """Return step, age and size of the newest own checkpoint, if it lies in a folder."""
    from pipeline.remote.filesystem import is_remote

    if config.store and is_remote(config.store):
        return {"where": config.store}
    found = folder.list_own_checkpoints(run, config.store)
    if not found:
        place = Path(config.store or run)
        others = folder.list_checkpoints(place / folder.CHECKPOINTS)[:1]
        makers = [f"none; {place} has those of run {folder.read_maker(one)}" for one in others]
        return {"where": makers[0]} if makers else {}
    try:
        size = sum(path.stat().st_size for path in found[0].iterdir())
        age = round(max(0.0, now - found[0].stat().st_mtime), 1)
    except OSError:  # deleted meanwhile
        return {}
    step = folder.parse_step(found[0])
    return {"step": step, "age_s": age, "bytes": size, "kept": len(found)}
