"""Checks of a config: whether network and job fit the data set's classes and the machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence

from cluster.config import Config
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from cluster.doctor.hardware import Gpu, Hardware
from cluster.launch.placement import Node, NoRoom, place_workers
from model.architecture import build_stages
from model.summary import FLOAT32_BYTES, build_table, sum_rows

PROCESS_BYTES = 0.7 * GB
"""Memory of a worker before any image: torch, DALI, Ray (measured: 0.61 to 0.65 GB resident)."""
PARAMETER_COPIES = 3
"""float32 numbers for each parameter: value, gradient and velocity."""
CLASSES = 1000
"""Number of classes assumed without a data set."""


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
    replicas = config.replica_sizes[-1]
    return ok(
        "network", f"{parameters / 1e6:,.1f} million parameters, {count} classes{assumed}; batch "
        f"{config.batch_size} = {replicas} x {config.batch_size // replicas}",
    )  # fmt: skip


def checkpoint_bytes(config: Config | None, classes: int | None) -> int:
    """Size of a checkpoint in bytes: value and velocity, float32, of each parameter."""
    design = (config or Config()).design
    return 2 * sum_rows(build_table(classes or CLASSES, design)).parameter_bytes


def worker_bytes(config: Config, classes: int | None, replicas: int) -> int:
    """Bytes of parameters and activations in a worker, without the memory of its process.

    The paper's M = X(W + B + A + Z), with gradient and velocity for each W and B; all in float32,
    so that it is an upper bound in bfloat16.

    Args:
        config: of the training.
        classes: number of classes; None: not known.
        replicas: number of replicas, which divide the batch.
    """
    rows = build_table(classes or CLASSES, config.design)
    if config.size == 2:
        rows = [row for row in rows if row.column == "a"]  # b's are as large
    sums = sum_rows(rows)
    batch = config.microbatch_size(replicas)
    return FLOAT32_BYTES * (PARAMETER_COPIES * sums.parameters + 2 * sums.neurons * batch)


def _uses_gpus(config: Config, has_gpus: bool) -> bool:
    """Whether a training uses GPUs, by the rule of `cluster.launch.controller`."""
    return config.device == "gpu" or (config.device == "auto" and has_gpus)


def judge_room(config: Config, nodes: Sequence[Node]) -> Finding:
    """Judge whether the job fits the free resources of a cluster."""
    gpu = _uses_gpus(config, any(node.gpus + node.busy_gpus for node in nodes))
    try:
        placement = place_workers(nodes, sizes=config.replica_sizes, size=config.size, gpu=gpu)
    except NoRoom as error:
        text, _, mend = str(error).rpartition("; use ")
        return fail("room", text, mend)
    kind = "GPU" if gpu else "CPU"
    return ok(
        "room", f"{placement.replicas} replica{'s' * (placement.replicas > 1)} of {placement.size} "
        f"{kind} worker{'s' * (placement.size > 1)} on {len(set(placement.nodes))} of "
        f"{len(nodes)} node{'s' * (len(nodes) > 1)}",
    )  # fmt: skip


def judge_local_job(
    config: Config, classes: int | None, have: Hardware, gpus: Sequence[Gpu]
) -> Iterator[Finding]:
    """Judge whether the job fits this machine, if it starts a Ray of its own."""
    least = config.replica_sizes[0] * config.size
    if _uses_gpus(config, bool(gpus)):
        node = Node(id="", name=platform.node(), cpus=max(have.cores, least), gpus=float(len(gpus)))
        room = judge_room(config, [node])
        yield room
        if room.status == "ok" and gpus:
            yield _judge_gpu_memory(config, classes, gpus)
        return
    if least > have.cores:  # Duet's own Ray starts them all the same
        yield warn(
            "room", f"{least} workers take turns on {have.cores} core(s)",
            "--columns-per-worker 2, or fewer --replicas" if config.size == 2
            else "fewer --replicas",
        )  # fmt: skip
    else:
        yield ok("room", f"{least} worker{'s' * (least > 1)} on {have.cores} cores")
    each = worker_bytes(config, classes, config.replica_sizes[0]) + PROCESS_BYTES
    text = f"{least} x {each / GB:.1f} GB of {have.memory / GB:.1f} GB"
    if least * each > have.memory:
        yield fail("worker memory", text, _suggest_smaller(config))
    else:
        yield ok("worker memory", text)


def _judge_gpu_memory(config: Config, classes: int | None, gpus: Sequence[Gpu]) -> Finding:
    need = worker_bytes(config, classes, config.replica_sizes[0])
    least = min(gpu.free for gpu in gpus)
    text = f"{need / GB:.1f} GB of {least / GB:.1f} GB free on the fullest GPU"
    if need > least:
        return fail("worker memory", text, _suggest_smaller(config))
    return ok("worker memory", text)


def _suggest_smaller(config: Config) -> str:
    size = config.microbatch_size(config.replica_sizes[0])
    return f"--microbatch {max(1, size // 4)}, or a smaller --width"
