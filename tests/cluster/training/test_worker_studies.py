"""The loop with what the studies change: batch normalisation, other networks, no augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.training.components import open_stream
from pipeline.batches import Stream
from tests.helpers.training_runs import (
    CONFIG,
    STEPS,
    Call,
    alone,
    learned,
    resume_at,
    rows,
    together,
    weights,
)

BATCH = Config.from_settings(CONFIG.to_settings() | {"norm": "batch", "seed": 2, "steps": STEPS})

OWN = [
    {"name": "conv1", "maps": 4, "kernel": 8, "stride": 8, "then": ["relu", "norm", "pool"]},
    {"name": "conv2", "maps": 4, "kernel": 3, "pad": 1, "reads": "both"},
    {"name": "conv3", "maps": 4, "kernel": 3, "pad": 1, "adds": ["conv1"], "then": ["dropout"]},
    {"name": "fc4", "kind": "fc", "reads": "both"},
]


def read_statistics(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights(run, step).items() if "running" in key}


def test_batch_normalisation_learns_the_same_in_a_pair_and_after_a_cut(tiny_data, tmp_path):
    one, pair, again = (tmp_path / name for name in ("one", "pair", "again"))
    alone(BATCH, tiny_data, one)
    resume_at(3, BATCH, tiny_data, one, again)
    assert learned(again) == learned(one)
    found = read_statistics(one)
    assert sorted(found) == [
        f"weights/{c}.conv{n}.norm.running_{what}"
        for c in "ab" for n in (1, 2) for what in ("mean", "var")
    ]  # fmt: skip
    for key, value in read_statistics(again).items():
        assert torch.equal(value, found[key])
        assert not torch.equal(value, read_statistics(one, 3)[key])  # it had moved on
    assert not [key for key in weights(one) if key.startswith("velocity/") and "running" in key]
    together(tmp_path / "job", [Call(BATCH, tiny_data, pair)])
    assert rows(pair)[0]["loss"] == pytest.approx(rows(one)[0]["loss"], rel=1e-5)
    for key, value in read_statistics(pair, 3).items():
        torch.testing.assert_close(value, read_statistics(one, 3)[key], rtol=1e-3, atol=1e-3)
    # Validation normalises by the running statistics, whatever else is in the batch.
    other = tmp_path / "other"
    resume_at(3, replace(BATCH, validate_every=1), tiny_data, one, other)
    assert learned(other, "validation.jsonl", 6)[0] == learned(one, "validation.jsonl", 6)[0]


def test_replicas_average_what_their_parts_of_the_batch_have_seen(tiny_data, tmp_path):
    """One process takes the same parts of the batch one after the other."""
    config = replace(BATCH, replicas="1:2", columns_per_worker=2, steps=3)
    one, two = tmp_path / "one", tmp_path / "two"
    alone(config, tiny_data, one)
    together(tmp_path / "job", [Call(config, tiny_data, two)], world=2, size=1)
    for key, value in read_statistics(two, 3).items():
        torch.testing.assert_close(value, read_statistics(one, 3)[key], rtol=1e-3, atol=1e-3)
    assert [row["loss"] for row in rows(two)] == pytest.approx(
        [row["loss"] for row in rows(one)], rel=1e-4
    )
    whole = tmp_path / "whole"
    alone(replace(config, replicas=1), tiny_data, whole)
    assert rows(whole)[0]["loss"] != rows(one)[0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"net": "four", "columns": 1, "norm": "none", "width": 0.5, "augment": False, "lr": 0.001},
        {"width": 1.0, "layers": OWN, "activation": "sigmoid"},
        {"conv6": True, "dropout": False, "norm": "lcn", "weight_decay": 0.0, "colour": 0.0},
    ],
    ids=["four", "layers", "conv6"],
)
def test_other_networks_train_and_go_on(changes, tiny_data, tmp_path):
    config = Config.from_settings(CONFIG.to_settings() | changes)
    whole, again = tmp_path / "whole", tmp_path / "again"
    alone(config, tiny_data, whole)
    if config.design.columns == 1:
        (whole / "checkpoints/step-00000003/column-b.safetensors").unlink(missing_ok=True)
    resume_at(3, config, tiny_data, whole, again)
    assert learned(again) == learned(whole)
    assert learned(again, "validation.jsonl") == learned(whole, "validation.jsonl")
    last = [run / f"checkpoints/step-{STEPS:08d}/column-a.safetensors" for run in (whole, again)]
    first, second = (load_file(path) for path in last)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    if config.design.net == "four":
        assert {key.split(".")[1] for key in first} == {"conv1", "conv2", "conv3", "fc4"}


def test_without_augmentation_images_are_what_a_test_sees_in_the_same_order(tiny_data, tmp_path):
    plain = replace(CONFIG, augment=False)
    with Stream(tiny_data, crop="center", once=True, batch_size=48, threads=1) as stream:
        centre = next(stream)
    seen = {int(i): image for i, image in zip(centre.ids, centre.images, strict=True)}
    with (
        open_stream(plain, str(tiny_data), tmp_path, ProcessMesh()) as stream,
        open_stream(CONFIG, str(tiny_data), tmp_path, ProcessMesh()) as cropped,
    ):
        for _ in range(8):  # over the end of the first pass of 48
            batch, other = next(stream), next(cropped)
            assert torch.equal(batch.ids, other.ids)
            for i, image in zip(batch.ids, batch.images, strict=True):
                assert torch.equal(image, seen[int(i)])
        assert not torch.equal(batch.images, other.images)
