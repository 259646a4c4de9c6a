"""Small network with velocities, and a run folder that it is saved to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch

from cluster.checkpoint.format import collect_state
from cluster.checkpoint.writer import CheckpointManager
from cluster.mesh import ProcessMesh
from cluster.run.events import Saved, Warned
from cluster.run.folder import CHECKPOINTS, Mark
from model.alexnet import AlexNet
from model.exchange import Exchange
from model.optimizer import Sgd2012

CLASSES = ("cat", "dog", "owl")
ABOUT = {"config": {"lr": 0.01}, "data_sha256": "abc", "classes": CLASSES}


def network(seed: int = 0, mesh: ProcessMesh | None = None) -> tuple[AlexNet, Sgd2012]:
    """Return a network of which nothing is 0; the same tensors in one process as in two."""
    pair = mesh.pair if mesh else None
    net = AlexNet(
        columns=mesh.columns if mesh and pair else None,
        classes=len(CLASSES),
        width=0.05,
        seed=seed,
        exchange=Exchange(pair) if pair else None,
    )
    optimizer = Sgd2012(net.named_parameters())
    velocities = optimizer.column_state(net)
    for key, velocity in velocities.items():
        generator = torch.Generator().manual_seed(1000 * seed + crc32(key.encode()))
        velocities[key] = torch.randn(velocity.shape, generator=generator)
    optimizer.load_column_state(net, velocities)
    return net, optimizer


def same(state: dict[str, torch.Tensor], seed: int) -> bool:
    """Return whether a state is that of a seed's network, or of one of its columns."""
    wanted = collect_state(*network(seed))
    columns = {key.split("/")[1][0] for key in state}
    wanted = {key: value for key, value in wanted.items() if key.split("/")[1][0] in columns}
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


class Run:
    """A run folder, and the events that its checkpoints have told."""

    def __init__(
        self, folder: Path, keep: int = 5, keep_best: int = 0, store: str = "",
        mesh: ProcessMesh | None = None, name: str = "",
    ) -> None:  # fmt: skip
        self.folder = folder
        self.about = ABOUT | ({"run": name} if name else {})
        self.told: list = []
        self.keep, self.keep_best, self.store = keep, keep_best, store
        self.mesh = mesh or ProcessMesh()
        self.open()

    def open(self) -> None:
        """Open the checkpoints, as a new start of the workers does."""
        self.checkpoints = CheckpointManager(
            self.folder, self.mesh, self.about, self.told.append,
            keep=self.keep, keep_best=self.keep_best, store=self.store,
        )  # fmt: skip
        (self.folder / CHECKPOINTS).mkdir(exist_ok=True)

    def begin(self, step: int, seed: int, error: float | None = None) -> None:
        mark = Mark(step=step, position=8 * step)
        self.checkpoints.begin(mark, *network(seed, self.mesh), error)

    def save(self, step: int, seed: int, error: float | None = None) -> None:
        self.begin(step, seed, error)
        self.checkpoints.finish(must=True)

    def resume(self) -> tuple[Mark, dict[str, torch.Tensor]]:
        self.open()
        net, optimizer = network(99, self.mesh)
        mark = self.checkpoints.resume(net, optimizer)
        return mark, collect_state(net, optimizer)

    def step(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / f"step-{step:08d}"

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / CHECKPOINTS).iterdir())

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.told if isinstance(event, Warned)]

    @property
    def saved(self) -> list[int]:
        return [event.step for event in self.told if isinstance(event, Saved)]


def steps(*numbers: int) -> Sequence[str]:
    """Return the names of the checkpoints of some steps."""
    return [f"step-{number:08d}" for number in numbers]


def flip_a_byte(step: Path) -> None:
    data = bytearray((step / "column-b.safetensors").read_bytes())
    data[-7] ^= 1
    (step / "column-b.safetensors").write_bytes(data)
