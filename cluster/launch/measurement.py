"""`cluster.train --measure`: splits the time of a step, for the settings and machines of a run.

Writes RUN/measure.json, and RUN/throughput.html with the split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.launch.controller import WorkerGroup, build_environment
from cluster.launch.placement import (
    describe_layout,
    has_gpus,
    list_nodes,
    place_run,
    uses_gpus,
)
from cluster.launch.workers import Workers
from cluster.run.console import RunConsole
from cluster.run.events import Measured, Placed
from cluster.run.folder import MEASURE
from cluster.run.jsonl import WAITS
from pipeline.throughput.report import round_floats, write_page
from pipeline.tools.files import atomic_write

NAMES = {
    "compute": "compute", "exchange": "waiting for the other column",
    "reduce": "waiting for other replicas",
    "wait_storage": "waiting for storage", "wait_feed": "waiting for the feed",
    "wait_decode": "waiting for decoding", "wait_transfer": "waiting for the transfer",
}  # fmt: skip
"""Name of each part of a step."""
SHARED = {"cpu": ("on CPUs both share the cores: the job gets neither of the two rates in full",)}
"""Lines about the rates of network and stream alone, by device."""
METERS = {"gpu": "the driver's power reading", "cpu": "the CPU's counter"}
"""Source of the energy of an image, by device."""


def measure_with_ray(
    config: Config, data: str, folder: Path, screen: RunConsole, read_output: Callable[[], str]
) -> None:
    """Have workers measure, print the result and write it to RUN; needs a Ray.

    Raises:
        NoRoom: the cluster has none.
        DuetError: it failed.
        KeyboardInterrupt: the user ended it.
    """
    gpu = uses_gpus(config, has_gpus())
    placement = place_run(config, list_nodes(), gpu)
    if layout := describe_layout(config, placement):
        screen.say(layout)
    found: Mapping[str, Any] | None = None
    with Workers(0, build_environment()) as workers:
        group = WorkerGroup(config, data, folder, workers, placement, measure=True)
        for event in group.events():
            if isinstance(event, Measured):
                found = round_floats(event.found)
            elif isinstance(event, Placed):
                screen.wait("measuring")
            elif event is not None:
                screen.show(event)
    if found is None:
        raise group.failure.build_error(folder, read_output())
    for line in format_measurement(found):
        screen.say(line)
    with atomic_write(folder / MEASURE) as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    page = folder / "throughput.html"
    write_page(page, found["report"], split_step(found))
    screen.say(f"written: {folder / MEASURE}, {page}")


def split_step(found: Mapping[str, Any]) -> dict[str, float]:
    """Return seconds of a step by the name of each part; the replay splits computing in two."""
    parts, wall = found["step"]["parts"], found["step"]["wall"]
    alone = min(parts["compute"], found["replayed"]["parts"]["compute"])
    named = {"compute": alone, "compute, slowed by the stream": parts["compute"] - alone}
    named |= {NAMES[name]: parts[name] for name in ("exchange", "reduce", *WAITS)}
    return named | {"bookkeeping": max(0.0, wall - sum(parts.values()))}


def format_measurement(found: Mapping[str, Any]) -> list[str]:
    """Format the result as lines for people."""
    wall = found["step"]["wall"]
    workers = found["workers"]
    job = f"the job of {workers} workers" if workers > 1 else "the job"
    lines = [f"a step takes {wall * 1e3:,.1f} ms ({job}: {found['img_s']:,.0f} img/s):"]
    for name, seconds in split_step(found).items():
        if seconds / wall >= 0.0005:
            lines.append(f"  {name:<32}{seconds * 1e3:>10,.1f} ms {seconds / wall:>7.1%}")
    device = found["report"]["setting"]["device"]
    if found["watts"] is not None:
        lines.append(
            f"energy of an image: {found['joules_per_image']:.3g} J ({found['watts']:,.0f} W at "
            f"{found['img_s']:,.0f} img/s, by {METERS[device]})"
        )
    low, high = found["spread"]
    turns = f"turns {low:.1%} to {high:.1%}"
    ready, stream = found["replayed_img_s"], found["stream_img_s"]
    lines.append(f"the parts add up to {found['step']['accounted']:.1%} of the wall time")
    if found["steady"]:
        lines += [
            f"the job on batches that lie ready: {ready:,.0f} img/s; accelerator utilisation "
            f"{found['au']:.1%} ({turns}), stall {found['stall']:.1%}",
            f"the job's stream alone: {stream:,.0f} img/s, "
            f"{stream / ready:.1f} times what the network takes",
            *SHARED.get(device, ()),
            found["report"]["verdict"],
        ]
    else:
        lines.append(
            f"no verdict: steps on batches that lie ready took {low:.0%} to {high:.0%} of the time "
            "of real ones from turn to turn; measure again when less runs here"
        )
    if found["others"] > 0.1:
        lines.append(f"warning: other programs used {found['others']:.0%} of a machine meanwhile")
    return lines
