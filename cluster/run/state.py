"""How a run stands, from the files it has written: also from another machine that sees RUN.

Nothing here needs torch, Ray, or the run's own machine; of a long file only the end is read.
"""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import Config, read_run_config
from cluster.run.folder import (
    ATTEMPTS,
    CHECKPOINTS,
    CONFIG,
    ERRORS,
    METRICS,
    QUARANTINE,
    VALIDATION,
    list_checkpoints,
    parse_step,
)
from cluster.run.jsonl import WAITS, read_tail
from pipeline.tools.errors import UsageError

TAIL = 400
"""Rows at the end of metrics.jsonl that are looked at."""
SLOW = 20.0
"""Times the usual step (and at least QUIET seconds) without a row until a run counts as stalled."""
QUIET = 60.0
SOON = 10.0
"""Seconds in which workers that have died may be noticed and started again."""
AGAIN = 600.0
"""Seconds for which a run is believed to be starting again."""
RECENT = 50
"""Rows whose means are shown."""
MEANS = (
    "loss", "top1_error", "img_s", "data_wait", *WAITS, "stall", "exchange", "saving", "seconds",
)  # fmt: skip


@dataclass(kw_only=True)
class RunState:
    """A run as its files have it; None and empty where they say nothing."""

    run: str
    state: str
    """running, stalled, stopped, failed, finished, or not started."""
    why: str = ""
    evidence: str = ""
    """What tells that it is running or stalled, and how surely."""
    elapsed_s: float | None = None
    """Seconds since the first start, or from there to the end."""
    step: int = 0
    total: int | None = None
    epoch: float | None = None
    left_s: float | None = None
    """Seconds to the end at the present speed."""
    age_s: float | None = None
    """Seconds since the last row."""
    last: dict[str, Any] = field(default_factory=dict)
    """Means over the last rows."""
    img_s_now: float | None = None
    """Of the last row alone."""
    losses: list[float] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    replaced: int = 0
    """Damaged images in RUN/quarantine.jsonl."""
    starts: int = 0
    ends: list[dict[str, Any]] = field(default_factory=list)
    """When, at which step and why the last starts ended, newest last."""
    workers: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def read_state(run: Path, now: float | None = None, *, mirrored: bool = False) -> RunState:
    """Read how a run stands.

    Args:
        run: its folder.
        now: seconds since 1970; None: the clock's.
        mirrored: it is a copy from a store: its rows end with the last save.

    Raises:
        UsageError: it is no run.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} holds no run ({CONFIG} is missing); name the --run of a training")
    now = time.time() if now is None else now
    config, _ = read_run_config(run / CONFIG)
    rows = [row for row in read_tail(run / METRICS, TAIL) if "step" in row]
    validations = [row for row in read_tail(run / VALIDATION, 10_000) if "top1_error" in row]
    attempts = list(read_tail(run / ATTEMPTS, 10_000))
    state = RunState(run=str(run), state="not started")
    state.age_s = None if mirrored else _age(run / METRICS, now)
    if rows:
        _numbers(state, rows)
    if validations:
        state.validation = validations[-1]
        state.best = min(validations, key=lambda row: float(row["top1_error"]))
    starts = [row for row in attempts if row.get("event") == "start"]
    state.total = _total(config, rows, starts)
    state.checkpoint = _checkpoint(run, config, now)
    state.replaced = _lines(run / QUARANTINE)
    if attempts:
        _tell(state, attempts, starts, now)
        if state.state == "running" and not state.why:
            _doubt(state, attempts[-1], run, now, mirrored)
    if state.state == "running" and state.total and "seconds" in state.last:
        state.left_s = (state.total - state.step) * state.last["seconds"]
    return state


def _numbers(state: RunState, rows: list[dict[str, Any]]) -> None:
    """Fill in what the rows say."""
    last, recent = rows[-1], rows[-RECENT:]
    state.step, state.epoch, state.img_s_now = last["step"], last.get("epoch"), last.get("img_s")
    state.losses = [row["loss"] for row in rows if "loss" in row]
    for key in MEANS:
        if values := [row[key] for row in recent if key in row]:
            state.last[key] = sum(values) / len(values)
    state.last |= {key: last[key] for key in ("lr", "lr_bias", "replicas") if key in last}


def _tell(
    state: RunState, attempts: list[dict[str, Any]], starts: list[dict[str, Any]], now: float
) -> None:
    """Fill in what the starts and ends of the workers say."""
    ends = [row for row in attempts if row.get("event") == "end"]
    final = attempts[-1]
    over = final.get("event") == "end"
    why = str(final.get("why", "")) if over else ""
    state.starts = len(starts)
    state.ends = [{key: row.get(key) for key in ("time", "step", "why")} for row in ends[-5:]]
    state.workers = list(starts[-1].get("workers", [])) if starts else []
    state.state = {"finished": "finished", "stopped": "stopped"}.get(why, "running")
    until = now
    if state.state == "stopped":
        state.why = "by hand; the same command goes on"
    if over and state.state != "running":
        until = _when(final)
    elif over and (line := _error(Path(state.run), _when(final))):
        state.state, state.why, until = "failed", line, _when(final)
    elif over and now - _when(final) < AGAIN:
        state.why = f"starting again: {why}"
    state.elapsed_s = max(0.0, until - _when(attempts[0]))


def _doubt(state: RunState, final: dict[str, Any], run: Path, now: float, mirrored: bool) -> None:
    """Say how sure it is that a run goes on of which nobody has said that it ended."""
    if mirrored:
        state.evidence = "not sure: the store has its rows up to the last save only"
        return
    # A start takes its time before there is a row.
    since = max(0.0, now - _when(final))
    since = since if state.age_s is None else min(since, state.age_s)
    steps = SLOW * state.last.get("seconds", 0.0)
    usual = max(QUIET, steps, 3 * float(state.validation.get("seconds", 0.0)))
    leader = state.workers[0].get("node") if state.workers else None
    held = _held(run / ".leader") if leader == platform.node() else None
    ended = final.get("event") == "end"
    if not ended and held is False and since > SOON:
        state.state = "stalled"
        state.why = "its leading worker is gone; the same command goes on, if its driver is, too"
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


def _held(path: Path) -> bool | None:
    """Whether a process of this machine holds a lock on a file; None if that cannot be told.

    To try to take it might keep the run itself from it.
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


def _when(row: dict[str, Any]) -> float:
    return float(row.get("time", 0.0))


def _error(run: Path, ended: float) -> str:
    """The line of RUN/error.log, if that was written for this end."""
    path = run / ERRORS
    try:
        if path.stat().st_mtime < ended - 60:
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[1] if len(lines) > 1 else ""


def _total(config: Config, rows: list[dict[str, Any]], starts: list[dict[str, Any]]) -> int | None:
    """Steps of the whole run; of a young run of epochs they cannot be told from its rows."""
    if config.steps:
        return config.steps
    if starts and "total" in starts[-1]:
        return int(starts[-1]["total"])
    if rows and rows[-1].get("epoch", 0.0) > 0.01:  # it has 4 decimals
        return config.total_steps(round(rows[-1]["position"] / rows[-1]["epoch"]))
    return None


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _checkpoint(run: Path, config: Config, now: float) -> dict[str, Any]:
    """Step, age and size of the newest one, if it lies in a folder."""
    from pipeline.remote.dataset import is_remote

    if config.store and is_remote(config.store):
        return {"where": config.store}
    folder = Path(config.store or run)
    found = list_checkpoints(folder / CHECKPOINTS)
    if not found:
        return {}
    try:
        size = sum(path.stat().st_size for path in found[0].iterdir())
        age = max(0.0, now - found[0].stat().st_mtime)
    except OSError:  # deleted meanwhile
        return {}
    return {"step": parse_step(found[0]), "age_s": round(age, 1), "bytes": size, "kept": len(found)}


def _lines(path: Path) -> int:
    count = 0
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                count += part.count(b"\n")
    except OSError:
        pass
    return count
