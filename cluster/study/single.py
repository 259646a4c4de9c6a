"""One run in this process, without Ray: what many small runs beside each other want.

    python -m cluster.study.single CONFIG --data DATA --run RUN

Takes what `cluster.train` takes and does what it does, up to where that starts workers.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cluster import train
from cluster.config import Config
from cluster.launch.controller import wanted_end
from cluster.mesh import Place
from cluster.run.console import Screen
from cluster.run.folder import leading, write_machine
from cluster.training.loop import train as make_run
from pipeline.tools.errors import SetupError, run


def main(argv: list[str] | None = None) -> int:
    """Run the command; raises as `cluster.train.main`."""
    return train.main(argv, train_here)


def train_here(config: Config, data: str, folder: Path, screen: Screen) -> None:
    """Have the run trained by this process, with both columns, on the first GPU it sees.

    Raises:
        DuetError: the run failed.
        KeyboardInterrupt: the user ended it; it is saved.
    """
    there = torch.cuda.is_available() and config.device != "cpu"
    if config.device == "gpu" and not there:
        raise SetupError("device gpu needs a CUDA device, and torch sees none; use --device cpu")
    place = Place(
        device=torch.device("cuda" if there else "cpu"), cores=len(os.sched_getaffinity(0))
    )
    with leading(folder), wanted_end() as end:
        write_machine(folder, place.world_size)
        make_run(config, data, folder, place, screen.show, ending=lambda: end() > 0)
        if end():
            raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
