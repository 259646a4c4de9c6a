"""How a run stands, from the files it has written: also from another machine that sees RUN.

Nothing here needs torch, Ray, or the run's own machine; of a long file only the end is read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.config_file import read_back
from cluster.run_folder import ATTEMPTS, CHECKPOINTS, CONFIG, ERRORS, checkpoints_in, step_of
from pipeline.errors import UsageError

TAIL = 400
"""Rows at the end of metrics.jsonl that are looked at."""
SLOW = 20.0
"""Times the usual step (and at least QUIET seconds) without a row until a run counts as stalled."""
QUIET = 60.0


@dataclass(kw_only=True)
class State:
    """A run as its files have it; None and empty where they say nothing."""

    run: str
    state: str
    """running, stalled, stopped, failed, finished, or not started."""
    why: str = ""
    step: int = 0
    total: int | None = None
    epoch: float | None = None
    left_s: float | None = None
    """Seconds to the end at the present speed."""
    age_s: float | None = None
    """Seconds since the last row."""
    last: dict[str, Any] = field(default_factory=dict)
    """Means over the last rows."""
    losses: list[float] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    replaced: int = 0
    """Damaged pictures in RUN/quarantine.jsonl."""
    starts: int = 0
    ends: list[str] = field(default_factory=list)
    """Why the last starts ended, newest last."""
    workers: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def look(run: Path, now: float | None = None) -> State:
    """Read how a run stands.

    Args:
        run: its folder.
        now: seconds since 1970; None: the clock's.

    Raises:
        UsageError: it is no run.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} holds no run ({CONFIG} is missing); name the --run of a training")
    now = time.time() if now is None else now
    config, _ = read_back(run / CONFIG)
    rows = list(tail(run / "metrics.jsonl", TAIL))
    validations = list(tail(run / "validation.jsonl", 10_000))
    attempts = list(tail(run / ATTEMPTS, 10_000))
    last = rows[-1] if rows else {}
    state = State(run=str(run), state="not started", step=last.get("step", 0))
    state.epoch, state.total = last.get("epoch"), _total(config, last)
    state.age_s = _age(run / "metrics.jsonl", now)
    recent = rows[-50:]
    state.losses = [row["loss"] for row in rows]
    for key in (
        "loss",
        "top1_error",
        "img_s",
        "data_wait",
        "stall",
        "exchange",
        "saving",
        "seconds",
    ):
        if values := [row[key] for row in recent if key in row]:
            state.last[key] = sum(values) / len(values)
    for key in ("lr", "lr_bias", "replicas"):
        if key in last:
            state.last[key] = last[key]
    if validations:
        state.validation = validations[-1]
        state.best = min(validations, key=lambda row: float(row.get("top1_error", 1)))
    state.checkpoint = _checkpoint(run, config, now)
    state.replaced = sum(1 for _ in tail(run / "quarantine.jsonl", 10**6))
    _tell(state, attempts, run, now)
    if state.state == "running" and state.total and "seconds" in state.last:
        state.left_s = (state.total - state.step) * state.last["seconds"]
    return state


def _tell(state: State, attempts: list[dict[str, Any]], run: Path, now: float) -> None:
    """Fill in what the starts and ends of the workers say."""
    starts = [row for row in attempts if row.get("event") == "start"]
    ends = [row for row in attempts if row.get("event") == "end"]
    state.starts = len(starts)
    state.ends = [str(row.get("why", "")) for row in ends[-5:]]
    state.workers = list(starts[-1].get("workers", [])) if starts else []
    if not attempts:
        return
    final = attempts[-1]
    if final.get("event") == "end" and final.get("why") == "finished":
        state.state = "finished"
    elif final.get("event") == "end" and final.get("why") == "stopped":
        state.state, state.why = "stopped", "by hand; the same command goes on"
    elif final.get("event") == "end" and (line := _error(run, float(final.get("time", 0)))):
        state.state, state.why = "failed", line
    else:
        usual = max(QUIET, SLOW * state.last.get("seconds", 0))
        # A start and a restart take their time before there is a row.
        since = min(
            state.age_s if state.age_s is not None else 1e9,
            max(0.0, now - float(final.get("time", 0))),
        )
        quiet = since > usual
        state.state = "stalled" if quiet else "running"
        if quiet:
            state.why = f"no row for {since:,.0f} s: its machines are gone, or something waits"
        elif final.get("event") == "end":
            state.why = f"starting again: {final.get('why', '')}"


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


def _total(config: Config, last: dict[str, Any]) -> int | None:
    if config.steps:
        return config.steps
    if last.get("epoch"):
        samples = last["position"] / last["epoch"]
        return config.total_steps(round(samples))
    return None


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _checkpoint(run: Path, config: Config, now: float) -> dict[str, Any]:
    """Step, age and size of the newest one, if it lies in a folder."""
    from pipeline.dataset import is_remote

    if config.store and is_remote(config.store):
        return {"where": config.store}
    found = checkpoints_in(Path(config.store or run) / CHECKPOINTS)
    if not found:
        return {}
    try:
        size = sum(path.stat().st_size for path in found[0].iterdir())
        age = max(0.0, now - found[0].stat().st_mtime)
    except OSError:  # deleted meanwhile
        return {}
    return {"step": step_of(found[0]), "age_s": round(age, 1), "bytes": size, "kept": len(found)}


def tail(path: Path, most: int) -> Iterator[dict[str, Any]]:
    """The last rows of a file, oldest first; what is half written or no row is left out."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - most * 600))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines[-most:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
