"""Shows the state of a run on one screen, from its files, also on another machine.

python -m cluster.status RUN [--watch] [--json]

RUN may be the address of a run's --store, which has the state of its last checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.options import StatusOptions
from cluster.run.console import MOST_WORKERS, format_device, format_duration
from cluster.run.jsonl import WAITS
from cluster.run.state import RunState, read_state
from pipeline.remote.filesystem import is_remote
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, run
from pipeline.tools.terminal import Terminal
from pipeline.tools.text import human_bytes

EVERY = 2.0
"""Seconds between refreshes with --watch."""
COLORS = {"running": "green", "finished": "green", "stalled": "yellow", "failed": "red"}
BARS = "▁▂▃▄▅▆▇█"


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        UsageError: RUN holds no run, or --watch is given with an address.
        SetupError, StoreError: the store cannot be reached.
    """
    options = parse_options(StatusOptions, argv, "python -m cluster.status")
    if is_remote(options.run):
        if options.watch:
            raise UsageError(
                f"{options.run} changes with each save only; look now and then without --watch, "
                "or name the folder of the run"
            )
        with _download_rows(options.run) as folder:
            return _show(replace(read_state(folder, mirrored=True), run=options.run), options.json)
    state = read_state(Path(options.run))
    if not options.watch:
        return _show(state, options.json)
    if options.json:
        raise UsageError("--json is one object, --watch are many; give one of them")
    console = Terminal(sys.stdout)
    with Live(render(state, console.width), console=console, auto_refresh=False) as live:
        while state.state not in ("finished", "failed"):
            time.sleep(EVERY)
            state = read_state(Path(options.run))
            live.update(render(state, console.width), refresh=True)
    return 0


def _show(state: RunState, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(asdict(state)) + "\n")
    else:
        console = Terminal(sys.stdout)
        console.print(render(state, console.width))
    return 0


@contextmanager
def _download_rows(store: str) -> Iterator[Path]:
    """Download the rows that a store has beside its checkpoints into a temporary folder."""
    from cluster.run.sync import RunMirror

    with tempfile.TemporaryDirectory(prefix="duet-status-") as scratch:
        if not RunMirror(Path(scratch), store).restore():
            raise UsageError(f"{store} holds no run; name the --store of a training")
        yield Path(scratch)


def render(state: RunState, width: int = 80) -> RenderableType:
    """Build the screen for a terminal of `width` characters."""
    color = COLORS.get(state.state, "default")
    head = Text.assemble(f"{state.run}  ", (state.state, f"bold {color}"))
    parts: list[RenderableType] = [head]
    for text in filter(None, (state.why, state.evidence)):
        parts.append(Text(f"  {text}", style=color if text is state.why else "dim"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _list_lines(state, width).items():
        table.add_row(name, Text(value))
    parts.append(table)
    if state.workers:
        parts += ["", _build_worker_table(state)]
    return Group(*parts)


def _list_lines(state: RunState, width: int) -> dict[str, str]:
    last, lines = state.last, _list_progress(state, width)
    if state.age_s is not None and "loss" in last:
        lines["last row"] = f"{format_duration(state.age_s)} ago"
    if "loss" in last:
        sparkline = draw_sparkline(state.losses, min(width, 100) - 40)
        lines["loss"] = f"{last['loss']:.3f}  {sparkline}"
        lines["top-1 error"] = f"{last['top1_error']:.1%} of the batch"
    if state.validation:
        row, best = state.validation, state.best
        lines["validation"] = (
            f"top-1 {row['top1_error']:.2%}, top-5 {row['top5_error']:.2%} at step "
            f"{row['step']:,}; best {best['top1_error']:.2%} at step {best['step']:,}"
        )
    if "lr" in last:
        lines["rates"] = f"weights {last['lr']:.3g}, biases {last['lr_bias']:.3g}"
    if "img_s" in last:
        now = f" (now {state.img_s_now:,.0f})" if state.img_s_now is not None else ""
        step = f"{last['seconds'] * 1000:,.0f} ms a step"
        lines["speed"] = f"{last['img_s']:,.0f} img/s{now}, {step}"
        lines["waiting"] = _format_waiting(last)
    if state.checkpoint:
        lines["checkpoint"] = _format_checkpoint(state.checkpoint)
    if state.replaced:
        lines["quarantine"] = f"{state.replaced:,} damaged or withdrawn images replaced by others"
    if state.starts > 1 or (state.ends and state.state != "finished"):
        lines["starts"] = "\n".join([f"{state.starts:,}", *map(_format_end, state.ends)])
    return lines


def _list_progress(state: RunState, width: int) -> dict[str, str]:
    lines = {}
    if state.total:
        share = min(1.0, state.step / state.total)
        cells = max(10, min(width, 100) - 40)
        lines["done"] = f"{'━' * round(share * cells):╌<{cells}}  {share:.1%}"
    of = f" of {state.total:,}" if state.total else ""
    epoch = f", epoch {state.epoch:.2f}" if state.epoch is not None else ""
    lines["step"] = f"{state.step:,}{of}{epoch}"
    times = [f"{format_duration(state.elapsed_s)} since the first start"] if state.elapsed_s else []
    times += [f"{format_duration(state.left_s)} left"] if state.left_s is not None else []
    return lines | ({"time": ", ".join(times)} if times else {})


def _format_end(end: dict[str, Any]) -> str:
    when = time.strftime("%b %d %H:%M", time.localtime(end["time"])) if end.get("time") else ""
    return f"{when} at step {end.get('step') or 0:,}: {end.get('why') or 'for no known reason'}"


def _format_waiting(last: dict[str, Any]) -> str:
    """Format the waits of a step, with the main cause of waiting for data if that is notable."""
    most = max(WAITS, key=lambda name: last.get(name, 0.0))
    is_known = last.get(most, 0.0) > 0.005 * last["seconds"]
    cause = f" (most: {most.removeprefix('wait_')})" if is_known else ""
    parts = [f"{last['data_wait']:.1%} of a step for data{cause}"]
    if last.get("exchange"):
        parts.append(f"{last['exchange'] / last['seconds']:.1%} for the other column")
    if last.get("reduce"):
        share = last["reduce"] / last["seconds"]
        parts.append(f"{share:.1%} for the gradients of other replicas")
    if "stall" in last:
        parts.append(f"{last['stall']:.1%} of all time for data or a save")
    return ", ".join(parts)


def _format_checkpoint(found: dict[str, Any]) -> str:
    if "step" not in found:
        return str(found["where"])
    return (
        f"step {found['step']:,}, {format_duration(found['age_s'])} ago, "
        f"{human_bytes(found['bytes'])}; {found['kept']} kept"
    )


def _build_worker_table(state: RunState) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("replica", "column", "node", "device"):
        table.add_column(name)
    for worker in state.workers[:MOST_WORKERS]:
        device = format_device(worker.get("gpu"))
        table.add_row(str(worker["replica"]), worker["column"], worker["node"], device)
    if len(state.workers) > MOST_WORKERS:
        table.add_row(f"... {len(state.workers) - MOST_WORKERS} more")
    return table


def draw_sparkline(values: list[float], width: int) -> str:
    """Draw values as bars, averaged into at most `width` of them."""
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
