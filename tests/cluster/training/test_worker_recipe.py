"""The training loop: replicas, other networks and recipes, and a loss that is no number."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.config import Config
from cluster.training.finite_check import NotFinite
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from model.schedule import Rates
from pipeline.batches import Stream
from tests.helpers.training_runs import (
    CONFIG,
    Call,
    alone,
    learned,
    rates_at,
    rows,
    together,
    weights,
)


def train_by_hand(
    config: Config, data: Path, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Data-parallel training in one process, written out: mean gradient of the replicas' slices."""
    net = AlexNet(classes=4, width=config.design.width)
    optimizer = Sgd2012(net.named_parameters())
    losses = []
    with Stream(data, batch_size=config.batch_size, threads=1) as stream:
        for step in range(1, steps + 1):
            batch = next(stream)
            total = 0.0
            optimizer.zero_grad()
            slices = zip(batch.images.chunk(2), batch.labels.chunk(2), strict=True)
            for replica, (images, labels) in enumerate(slices):
                net.set_position((step - 1) * config.batch_size + replica * len(images))
                logits = net(images)
                loss = torch.nn.functional.cross_entropy(logits, labels) / 2
                loss.backward()  # gradients add up
                total += float(loss.detach())
            optimizer.step(Rates(*rates_at(config, step / config.steps)))
            losses.append(total)
    return losses, net.column_state()


def test_two_replicas_of_two_columns_average_their_gradients(tiny_data, tmp_path):
    config = replace(CONFIG, replicas=2, steps=3)
    together(tmp_path / "job", [Call(config, tiny_data, tmp_path / "run")], world=4)
    losses, state = train_by_hand(config, tiny_data, steps=3)
    found = [row["loss"] for row in rows(tmp_path / "run")]
    assert found == pytest.approx(losses, rel=1e-4)
    trained = weights(tmp_path / "run", step=3)
    for key, tensor in state.items():
        torch.testing.assert_close(trained[f"weights/{key}"], tensor, rtol=1e-3, atol=1e-5)
    # Validation counts the images of every replica, not only those of the one that writes.
    net = AlexNet(classes=4, width=config.design.width)
    net.load_column_state({key: trained[f"weights/{key}"] for key in state})
    net.eval()
    with Stream(tiny_data, split="val", batch_size=20, crop="center", once=True) as stream:
        batch = next(stream)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(net(batch.images), batch.labels).item()
    (row,) = rows(tmp_path / "run", "validation.jsonl")
    assert row["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tiny_data, tmp_path):
    wild = replace(CONFIG, lr=1e30)
    with pytest.raises(NotFinite, match=r"the loss of step 2 is (nan|inf): conv\d is the first"):
        alone(wild, tiny_data, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_designs_train_and_go_on_from_their_checkpoints(tiny_data, tmp_path):
    """One column, and the source's network with its recipe, cut at step 3."""
    for name, changes in {
        "one_gpu": {"columns": 1},
        "source": {
            "relu_first": False,
            "spatial_norm": True,
            "mean": "image",
            "colour_divide": True,
            "schedule": "manual",
            "changes": ("0.5 lr 0.005", "0.5 lr.conv1 0", "1 colour 0"),
        },
    }.items():
        config = Config.from_settings(CONFIG.to_settings() | {"steps": 9, "keep": 3} | changes)
        whole, again = tmp_path / name, tmp_path / f"{name}-again"
        alone(config, tiny_data, whole)
        shutil.copytree(whole, again)
        for step in (6, 9):
            shutil.rmtree(again / f"checkpoints/step-{step:08d}", ignore_errors=True)
        (again / "checkpoints").mkdir(exist_ok=True)
        alone(config, tiny_data, again)
        assert learned(again) == learned(whole)
        assert rows(again, "rates.jsonl") == rows(whole, "rates.jsonl")
    rates = [row["lr"] for row in rows(whole)]
    assert rates == [0.01] * 3 + [0.005] * 6
    told = [row["what"] for row in rows(whole, "rates.jsonl")]
    assert any("lr.conv1" in what for what in told)
    frozen = {step: load_file(whole / f"checkpoints/step-{step:08d}/column-a.safetensors")
              for step in (6, 9)}  # fmt: skip
    for key, value in frozen[6].items():
        same = torch.equal(value, frozen[9][key])
        assert same == key.endswith("a.conv1.weight"), key
