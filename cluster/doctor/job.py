"""Whether the network and the job of a config fit the data set's classes and this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence

from cluster.config import Config
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from cluster.doctor.hardware import Gpu, Hardware
from cluster.launch.placement import Node, NoRoom, place_workers
from model.architecture import build_stages
from model.summary import FLOAT32_BYTES, build_table, sum_rows

PROCESS = 0.7 * GB
"""Of a worker before any image: torch, DALI, Ray (measured: 0.61 to 0.65 GB resident)."""
KEPT = 3
"""float32 numbers a parameter: its value, gradient and velocity."""
CLASSES = 1000
"""Taken where no data set says."""


def judge_network(config: Config, classes: int | None) -> Finding:
    """Judge whether the network can be built for the classes; None: no data set was given."""
    count = classes or CLASSES
    assumed = "" if classes else " assumed"
    try:
        build_stages(count, config.design)
    except ValueError as error:
        mend = "another --width, --columns or --pool; or a data set with more classes"
        return fail("network", f"{error}", mend)
    parameters = sum_rows(build_table(count, config.design)).parameters
    replicas = config.replica_sizes[-1]
    return ok(
        "network", f"{parameters / 1e6:,.1f} million parameters, {count} classes{assumed}; batch "
        f"{config.batch_size} = {replicas} x {config.batch_size // replicas}",
    )  # fmt: skip


def checkpoint_bytes(config: Config | None, classes: int | None) -> int:
    """Bytes of a checkpoint: a weight and a velocity, float32, for each parameter."""
    design = (config or Config()).design
    return 2 * sum_rows(build_table(classes or CLASSES, design)).parameter_bytes


def worker_bytes(config: Config, classes: int | None, replicas: int) -> int:
    """Bytes that a worker computes in, when there are so many replicas; its process not counted.

    The paper's M = X(W + B + A + Z), with gradient and velocity for each W and B; all in float32,
    so that there is room to spare in bfloat16.
    """
    rows = build_table(classes or CLASSES, config.design)
    if config.size == 2:
        rows = [row for row in rows if row.column == "a"]  # b's are as large
    sums = sum_rows(rows)
    batch = config.microbatch_size(replicas)
    return FLOAT32_BYTES * (KEPT * sums.parameters + 2 * sums.neurons * batch)


def on_gpus(config: Config, gpus: bool) -> bool:
    """Whether a training takes GPUs, where there are some or not; as the supervisor has it."""
    return config.device == "gpu" or (config.device == "auto" and gpus)


def judge_room(config: Config, nodes: Sequence[Node]) -> Finding:
    """Judge whether the job fits a cluster as it is now."""
    gpu = on_gpus(config, any(node.gpus + node.busy_gpus for node in nodes))
    try:
        found = place_workers(nodes, sizes=config.replica_sizes, size=config.size, gpu=gpu)
    except NoRoom as error:
        what, _, ways = str(error).rpartition("; use ")
        return fail("room", what, ways)
    kind = "GPU" if gpu else "CPU"
    return ok(
        "room", f"{found.replicas} replica{'s' * (found.replicas > 1)} of {found.size} "
        f"{kind} worker{'s' * (found.size > 1)} on {len(set(found.nodes))} of "
        f"{len(nodes)} node{'s' * (len(nodes) > 1)}",
    )  # fmt: skip


def judge_here(
    config: Config, classes: int | None, have: Hardware, gpus: Sequence[Gpu]
) -> Iterator[Finding]:
    """Judge whether the job fits this machine, with a Ray of its own."""
    least = config.replica_sizes[0] * config.size
    if on_gpus(config, bool(gpus)):
        node = Node(id="", name=platform.node(), cpus=max(have.cores, least), gpus=float(len(gpus)))
        room = judge_room(config, [node])
        yield room
        if room.status == "ok" and gpus:
            yield _gpu_memory(config, classes, gpus)
        return
    if least > have.cores:  # an own Ray has room for them all the same
        yield warn(
            "room", f"{least} workers take turns on {have.cores} core(s)",
            "--columns-per-worker 2, or fewer --replicas" if config.size == 2
            else "fewer --replicas",
        )  # fmt: skip
    else:
        yield ok("room", f"{least} worker{'s' * (least > 1)} on {have.cores} cores")
    each = worker_bytes(config, classes, config.replica_sizes[0]) + PROCESS
    told = f"{least} x {each / GB:.1f} GB of {have.memory / GB:.1f} GB"
    if least * each > have.memory:
        yield fail("worker memory", told, _smaller(config))
    else:
        yield ok("worker memory", told)


def _gpu_memory(config: Config, classes: int | None, gpus: Sequence[Gpu]) -> Finding:
    need = worker_bytes(config, classes, config.replica_sizes[0])
    least = min(gpu.free for gpu in gpus)
    told = f"{need / GB:.1f} GB of {least / GB:.1f} GB free on the fullest GPU"
    if need > least:
        return fail("worker memory", told, _smaller(config))
    return ok("worker memory", told)


def _smaller(config: Config) -> str:
    now = config.microbatch_size(config.replica_sizes[0])
    return f"--microbatch {max(1, now // 4)}, or a smaller --width"
