"""Small trainings without Ray, by one process or several, and what they wrote down."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from cluster.config import Config
from cluster.mesh import ProcessMesh, create_mesh
from cluster.run.events import Event
from cluster.run.folder import read_identity
from cluster.training.loop import train
from model.architecture import Design
from model.schedule import dexp
from tests.helpers.processes import run_ranks

CONFIG = Config(
    dtype="float32",
    design=Design(width=0.125),
    batch_size=8,
    steps=6,
    checkpoint_every=3,
    validate_every=3,
    threads=1,
)
STEPS = CONFIG.steps


def rates_at(config: Config, progress: float) -> tuple[float, float]:
    return dexp(progress, config.lr, config.bias_factor, config.lr_drop, config.lr_drops,
                config.bias_drop, config.bias_drops)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of `train` that the processes of a job make together."""

    config: Config
    data: Path
    run: Path
    cut: Path | None = None
    """First make `run` what this finished run was at step 3."""


def work(rank: int, world: int, size: int, folder: Path, calls: list[Call]) -> None:
    """Run one process of a job without Ray."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    seats = [tuple(range(start, start + size)) for start in range(0, world, size)]
    mesh = create_mesh(seats, torch.device("cpu"), cores=1)
    for call in calls:
        if call.cut and rank == 0:
            cut_at(3, call.cut, call.run)
        dist.barrier()
        train(call.config, call.data, call.run, mesh, lambda event: None)
    dist.destroy_process_group()


def together(folder: Path, calls: list[Call], world: int = 2, size: int = 2) -> None:
    """Run `calls` in `world` processes, `size` of them to a replica."""
    folder.mkdir()
    for call in calls:
        call.run.mkdir(exist_ok=True)
    run_ranks(work, (world, size, folder, calls), world)


def alone(config: Config, data: Path | str, run: Path, stop_after: int = 0) -> list[Event]:
    run.mkdir(exist_ok=True)
    told: list[Event] = []
    steps = itertools.count(1)
    train(
        config, data, run, ProcessMesh(), told.append, identity=read_identity(run),
        is_stopping=lambda: next(steps) == stop_after,
    )  # fmt: skip
    return told


def resume_at(step: int, config: Config, data: Path, whole: Path, run: Path) -> None:
    """Train `run` from the checkpoint of `step` of a whole run to the end, in one process."""
    cut_at(step, whole, run)
    alone(config, data, run)


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def learned(run: Path, name: str = "metrics.jsonl", first: int = 1) -> list[list[float]]:
    """Fields of every row that do not depend on the clock."""
    names = ("position", "step", "epoch", "loss", "top1_error")
    return [[row[key] for key in names] for row in rows(run, name) if row["step"] >= first]


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "column-a.safetensors") | load_file(folder / "column-b.safetensors")


def cut_at(step: int, whole: Path, run: Path) -> Path:
    """Copy a run as if it had died some steps after the checkpoint of `step`; return its folder."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(whole / name, run / name)
    for file in ("metrics.jsonl", "validation.jsonl", "kernels.jsonl"):
        shutil.copy(whole / file, run / file)
    with (run / "metrics.jsonl").open("a") as half:
        half.write('{"position": 999, "st')
    return run
