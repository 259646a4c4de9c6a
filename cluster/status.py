"""How a run stands, on one screen, from its files: also from another machine that sees RUN.

python -m cluster.status RUN [--watch] [--json]
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.console import MOST_WORKERS, clock
from cluster.run_state import State, look
from pipeline.errors import run

EVERY = 2.0
"""Seconds between looks with --watch."""
COLOURS = {"running": "green", "finished": "green", "stalled": "yellow", "failed": "red"}
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show how a run stands, from its files."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    watch: bool = False
    """Look again every 2 seconds, until the run has ended or Ctrl-C."""
    json: bool = False
    """Print one JSON object to stdout."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        UsageError: RUN holds no run.
    """
    options = tyro.cli(Status, args=argv, prog="python -m cluster.status")
    state = look(options.run)
    if options.json:
        sys.stdout.write(json.dumps(state.as_json()) + "\n")
        return 0
    console = Console(file=sys.stdout, highlight=False)
    if not options.watch:
        console.print(screen(state, console.width))
        return 0
    with Live(screen(state, console.width), console=console, auto_refresh=False) as live:
        while state.state not in ("finished", "failed"):
            time.sleep(EVERY)
            state = look(options.run)
            live.update(screen(state, console.width), refresh=True)
    return 0


def screen(state: State, width: int = 80) -> RenderableType:
    """All of it, for a terminal of some width."""
    head = Text.assemble(
        f"{state.run}  ", (state.state, f"bold {COLOURS.get(state.state, 'default')}")
    )
    if state.why:
        head.append(f"  {state.why}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _lines(state, width):
        table.add_row(name, value)
    parts: list[RenderableType] = [head, table]
    if state.workers:
        parts.append(_workers(state))
    return Group(*parts)


def _lines(state: State, width: int) -> list[tuple[str, str]]:
    last, lines = state.last, []
    of = f" of {state.total:,} ({state.step / state.total:.1%})" if state.total else ""
    epoch = f", epoch {state.epoch:.2f}" if state.epoch is not None else ""
    left = f", {clock(state.left_s)} left" if state.left_s is not None else ""
    lines.append(("step", f"{state.step:,}{of}{epoch}{left}"))
    if state.age_s is not None:
        lines.append(("last row", f"{clock(state.age_s)} ago"))
    if "loss" in last:
        lines.append(("loss", f"{last['loss']:.3f}  {sparkline(state.losses, width - 40)}"))
        lines.append(("top-1 error", f"{last['top1_error']:.1%} of the batch"))
    if state.validation:
        row, best = state.validation, state.best
        lines.append(
            (
                "validation",
                f"top-1 {row['top1_error']:.2%}, top-5 {row['top5_error']:.2%} at step "
                f"{row['step']:,}; best {best['top1_error']:.2%} at step {best['step']:,}",
            )
        )
    if "lr" in last:
        lines.append(("rates", f"weights {last['lr']:.3g}, biases {last['lr_bias']:.3g}"))
    if "img_s" in last:
        speed = f"{last['img_s']:,.0f} img/s, {last['seconds'] * 1000:,.0f} ms a step"
        lines.append(("speed", speed))
        lines.append(("waiting", _waiting(state)))
    if state.checkpoint:
        lines.append(("checkpoint", _checkpoint(state)))
    if state.replaced:
        lines.append(("quarantine", f"{state.replaced:,} damaged pictures replaced by others"))
    if state.starts > 1:
        lines.append(("starts", f"{state.starts}; the last ended: {state.ends[-1]}"
                      if state.ends else f"{state.starts}"))  # fmt: skip
    return lines


def _waiting(state: State) -> str:
    last = state.last
    told = [f"for data {last['data_wait']:.1%}"]
    if last.get("exchange"):
        told.append(f"for the other column {last['exchange'] / last['seconds']:.1%}")
    if "stall" in last:
        told.append(f"for data or a checkpoint {last['stall']:.1%}")
    return ", ".join(told)


def _checkpoint(state: State) -> str:
    found = state.checkpoint
    if "step" not in found:
        return str(found["where"])
    return (
        f"step {found['step']:,}, {clock(found['age_s'])} ago, {found['bytes'] / 1e6:,.1f} MB; "
        f"{found['kept']} kept"
    )


def _workers(state: State) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("replica", "column", "node", "device"):
        table.add_column(name)
    for worker in state.workers[:MOST_WORKERS]:
        device = "CPU" if worker.get("gpu") is None else f"GPU {worker['gpu']}"
        table.add_row(str(worker["replica"]), worker["column"], worker["node"], device)
    if len(state.workers) > MOST_WORKERS:
        table.add_row(f"... {len(state.workers) - MOST_WORKERS} more")
    return table


def sparkline(values: list[float], width: int) -> str:
    """Values as bars, averaged into at most `width` of them."""
    width = max(1, min(width, len(values)))
    if len(values) < 2:
        return ""
    cuts = [round(place * len(values) / width) for place in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    steps = len(BARS) - 1
    return "".join(BARS[round((mean - low) / (high - low or 1) * steps)] for mean in means)


if __name__ == "__main__":
    run(main)
