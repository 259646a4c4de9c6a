"""A loss that is no number: the layer, the step and the checkpoint are named, by either column."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.config import Config
from cluster.mesh import ProcessMesh, create_mesh
from cluster.training.finite_check import NotFinite, check_finite
from model.alexnet import AlexNet
from model.exchange import Exchange
from tests.helpers.processes import run_ranks

WIDTH = 1 / 16


def make_images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 60


def build_network(mesh: ProcessMesh) -> AlexNet:
    columns = mesh.columns if mesh.pair else None
    net = AlexNet(
        columns, classes=5, width=WIDTH, exchange=Exchange(mesh.pair) if mesh.pair else None
    ).train()
    net.set_position(7)
    return net


def make_training(net: AlexNet, run: Path, mesh: ProcessMesh) -> Any:
    """The parts of a `Training` that are looked at."""
    return SimpleNamespace(config=Config(dtype="float32"), net=net, run=run, mesh=mesh)


def read_message(
    net: AlexNet, run: Path, mesh: ProcessMesh, pixels: torch.Tensor | None = None
) -> str:
    """Return the message about a loss that is not finite."""
    pixels = make_images() if pixels is None else pixels
    with pytest.raises(NotFinite) as caught:
        check_finite(make_training(net, run, mesh), float("nan"), pixels, 7)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("layer", ["conv1", "conv4", "fc7", "fc8"])
def test_the_first_layer_that_is_not_finite_is_named(layer: str, tmp_path: Path) -> None:
    net = build_network(ProcessMesh())
    with torch.no_grad():
        net.get_parameter(f"{layer}.weight")[0, 0] = torch.inf
    message = read_message(net, tmp_path, ProcessMesh())
    assert f"the loss of step 7 is nan: {layer} is the first layer whose output" in message
    assert "its weight is not either, since the update before" in message
    assert "there is no checkpoint yet" in message


def test_weights_that_are_too_large_are_told_from_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    net = build_network(ProcessMesh())
    with torch.no_grad():
        net.get_parameter("conv5.weight").mul_(1e37)
        net.get_parameter("fc6.weight").mul_(1e37)
    message = read_message(net, tmp_path, ProcessMesh())
    assert "fc6 is the first layer" in message
    assert "its weights are, the largest is" in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000005'}" in message


def test_images_and_logits_have_their_own_words(tmp_path: Path) -> None:
    broken = make_images()
    broken[1, 2, 3, 4] = torch.nan
    assert "the images themselves" in read_message(
        build_network(ProcessMesh()), tmp_path, ProcessMesh(), broken
    )
    assert "all layers are finite" in read_message(
        build_network(ProcessMesh()), tmp_path, ProcessMesh()
    )


def test_a_finite_loss_passes_without_a_second_look(tmp_path: Path) -> None:
    net = build_network(ProcessMesh())
    net.forward = None  # type: ignore[method-assign, assignment]
    check_finite(make_training(net, tmp_path, ProcessMesh()), 2.5, make_images(), 7)


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = create_mesh([(0, 1)], torch.device("cpu"), cores=1)
    net = build_network(mesh)
    with torch.no_grad():
        if rank == 1:  # column a only gets to see it in conv3
            net.get_parameter("conv2.weight")[0, 0] = torch.nan
    (Path(folder) / f"{rank}.txt").write_text(read_message(net, Path(folder), mesh))
    dist.barrier()
    dist.destroy_process_group()


def test_both_columns_name_the_one_that_broke_first() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(run_rank, (folder,), 2)
        first, second = ((Path(folder) / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "column b, conv2 is the first layer" in first
