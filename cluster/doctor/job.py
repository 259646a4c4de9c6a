"""Checks of a config: whether network and job fit the data set's classes and the machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.config import Config
from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.doctor.hardware import Gpu, Hardware
from cluster.launch.placement import (
    CLASSES,
    PROCESS_BYTES,
    Node,
    NoRoom,
    choose_size,
    describe_crowd,
    describe_layout,
    estimate_memory,
    place_run,
    uses_gpus,
)
from model.architecture import build_stages
from model.summary import build_table, sum_rows
from pipeline.tools.text import human_bytes


def judge_network(config: Config, classes: int | None) -> Finding:
    """Judge whether the network can be built for so many classes; None: not known."""
    count = classes or CLASSES
    assumed = "" if classes else " assumed"
    try:
        build_stages(count, config.design)
    except ValueError as error:
        mend = "another --width, --columns or --pool; or a data set with more classes"
        return fail("network", f"{error}", mend)
    parameters = sum_rows(build_table(count, config.design)).parameters
    size, replicas = config.batch_size, config.replica_sizes[-1]
    text = f"{parameters / 1e6:,.1f} million parameters, {count} classes{assumed}"
    return ok("network", f"{text}; batch {size} = {replicas} x {size // replicas}")


def checkpoint_bytes(config: Config | None, classes: int | None) -> int:
    """Return the size of a checkpoint in bytes: value and velocity, float32, of each parameter."""
    design = (config or Config()).design
    return 2 * sum_rows(build_table(classes or CLASSES, design)).parameter_bytes


def judge_room(config: Config, nodes: Sequence[Node]) -> Finding:
    """Judge whether the job fits the free resources of a cluster."""
    gpu = uses_gpus(config, any(node.gpus + node.busy_gpus for node in nodes))
    try:
        placement = place_run(config, nodes, gpu)
    except NoRoom as error:
        text, _, mend = str(error).rpartition("; use ")
        return fail("room", text, mend)
    replicas, size, used = placement.replicas, placement.size, len(set(placement.nodes))
    layout = describe_layout(config, placement)
    return ok(
        "room",
        f"{replicas} replica{'s' * (replicas > 1)} of {size} {'GPU' if gpu else 'CPU'} "
        f"worker{'s' * (size > 1)} on {used} of {len(nodes)} node{'s' * (len(nodes) > 1)}"
        f"{'; ' * bool(layout)}{layout}",
    )


def judge_local_job(
    config: Config, classes: int | None, have: Hardware, gpus: Sequence[Gpu]
) -> Iterator[Finding]:
    """Judge whether the job fits this machine, if it starts a Ray of its own."""
    gpu = uses_gpus(config, bool(gpus))
    node = Node(id="", name=platform.node(), cpus=have.cores, gpus=float(len(gpus)))
    size = choose_size(config, [node], gpu)
    least = config.replica_sizes[0] * size
    images = config.microbatch_size(config.replica_sizes[0])  # of the fewest replicas
    need = estimate_memory(config, classes, size).count_bytes(images)
    halves = [images // n for n in (2, 4) if images % n == 0]  # what exact sums allow
    smaller = f"--microbatch {min(halves)}, or a smaller --width" if halves else "a smaller --width"
    if gpu:
        room = judge_room(config, [replace(node, cpus=max(have.cores, least))])
        yield room
        if room.status == "ok" and gpus:
            free = min(gpu.free for gpu in gpus)
            text = f"{human_bytes(need)} of {human_bytes(free)} free on the fullest GPU"
            yield fail("worker memory", text, smaller, unless=need <= free)
        return
    if crowd := describe_crowd(least, have.cores, size):  # they start all the same
        text, _, mend = crowd.rpartition("; use ")
        yield warn("room", text, mend)
    else:
        yield ok("room", f"{least} worker{'s' * (least > 1)} on {have.cores} cores")
    each = need + PROCESS_BYTES
    text = f"{least} x {human_bytes(each)} of {human_bytes(have.memory)}"
    yield fail("worker memory", text, smaller, unless=least * each <= have.memory)
