"""The training loop, without Ray: one process against a pair, and a cut run against a whole one."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Failed, Finished, Saved, Started
from cluster.run.kernels import read_kernels
from cluster.training.components import describe_workers
from model.alexnet import AlexNet
from model.architecture import Design
from pipeline.stream.ledger.proof import prove
from pipeline.stream.order import FullShuffle
from pipeline.tools.errors import DataError
from tests.helpers.images import flip_bit
from tests.helpers.training_runs import (
    CONFIG,
    STEPS,
    Call,
    alone,
    cut_at,
    learned,
    rates_at,
    resume_at,
    rows,
    together,
    weights,
)

# Rounding differs between one process and a pair. Where a unit is near 0 or two pixels of a pooling
# window are level it decides otherwise, and that grows; with these draws it does not in six steps.
DRAWN = replace(CONFIG, seed=2)


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs `one` and `pair`; the others went on from step 3, as their names say."""
    root = tmp_path_factory.mktemp("runs")
    alone(DRAWN, tiny_data, root / "one")
    cut_at(3, root / "one", root / "pair-after-one")
    together(
        root / "job",
        [
            Call(DRAWN, tiny_data, root / "pair"),
            Call(DRAWN, tiny_data, root / "pair-again", cut=root / "pair"),
            Call(DRAWN, tiny_data, root / "pair-after-one"),
        ],
    )
    resume_at(3, DRAWN, tiny_data, root / "one", root / "one-again")
    resume_at(3, DRAWN, tiny_data, root / "pair", root / "one-after-pair")
    return root


@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl"])
def test_a_pair_learns_what_one_process_learns(runs, name):
    one, pair = learned(runs / "one", name), learned(runs / "pair", name)
    assert len(one) == {"metrics.jsonl": STEPS, "validation.jsonl": 2}[name]
    torch.testing.assert_close(torch.tensor(pair), torch.tensor(one), rtol=1e-4, atol=1e-5)


def test_a_pair_ends_with_the_weights_and_velocities_of_one_process(runs):
    one, pair = weights(runs / "one"), weights(runs / "pair")
    assert pair.keys() == one.keys()
    torch.testing.assert_close(pair, one, rtol=1e-3, atol=1e-5)
    start = AlexNet(classes=4, width=DRAWN.design.width, seed=DRAWN.seed).column_state()
    moved = [key for key in start if not torch.equal(start[key], one[f"weights/{key}"])]
    assert moved == list(start)


@pytest.mark.parametrize("layout", ["one", "pair"])
def test_a_run_cut_at_a_checkpoint_goes_on_as_if_nothing_had_happened(runs, layout):
    whole, again = runs / layout, runs / f"{layout}-again"
    assert learned(again) == learned(whole)
    assert learned(again, "validation.jsonl") == learned(whole, "validation.jsonl")
    before, after = weights(whole), weights(again)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize(("after", "before"), [("one", "pair"), ("pair", "one")])
def test_a_run_goes_on_in_the_other_layout(runs, after, before):
    found, wanted = learned(runs / f"{after}-after-{before}"), learned(runs / before)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert found[:3] == wanted[:3]  # those rows were kept, not made again


def test_a_row_says_how_the_step_went(runs):
    for step, row in enumerate(rows(runs / "pair"), start=1):
        assert row["step"] == step
        assert row["position"] == 8 * step
        assert row["epoch"] == round(8 * step / 48, 4)
        assert (row["lr"], row["lr_bias"]) == rates_at(CONFIG, step / STEPS)
        assert row["img_s"] == pytest.approx(8 / row["seconds"], rel=0.01)
        assert 0 <= row["data_wait"] <= 1
        assert math.log(4) / 3 < row["loss"] < 40


def test_a_pass_over_the_validation_images_counts_each_once(runs):
    (row, _) = rows(runs / "pair", "validation.jsonl")
    assert row["samples"] == 20
    assert (row["top1_error"] * 20) == pytest.approx(round(row["top1_error"] * 20), abs=1e-4)


THREE = replace(DRAWN, steps=3, validate_every=0, checkpoint_every=9)
"""The first step at which the momentum shows is the third."""


@pytest.fixture(scope="module")
def unchanged(tiny_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("unchanged")
    alone(THREE, tiny_data, run)
    return run


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 0.02},
        {"bias_factor": 1.0},
        {"momentum": 0.5},
        {"weight_decay": 0.5},
        {"colour": 0.9},
        {"lr_drops": 1},
        {"dtype": "bfloat16"},
        {"columns": 1},
        {"norm": "none"},
        {"relu_first": False},
        {"spatial_norm": True},
        {"pool": "2/2"},
        {"activation": "tanh"},
        {"without": "conv4"},
        {"mean": "image"},
        {"colour_divide": True},
        {"layer_rates": ("conv3=0",)},
        {"rate_scaling": "sqrt"},
        {"changes": ("0 lr.fc8 0.1",)},
        {"schedule": "plateau", "lr": 0.02, "validate_every": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_reaches_the_run(unchanged, tiny_data, tmp_path, change):
    """A setting that is parsed and then forgotten would leave the losses as they were."""
    config = Config.from_settings(THREE.to_settings() | change)
    alone(config, tiny_data, tmp_path / "run")
    assert learned(tmp_path / "run") != learned(unchanged)


def test_the_watcher_hears_of_start_checkpoints_and_end(tiny_data, tmp_path):
    told = alone(CONFIG, tiny_data, tmp_path / "run")
    kinds = [type(event) for event in told]
    assert (kinds[0], kinds[-1]) == (Started, Finished)
    assert [event.step for event in told if isinstance(event, Saved)] == [3, 6]
    assert Failed not in kinds
    assert told[0].total == STEPS


def test_bfloat16_stays_near_float32_and_keeps_float32_weights(runs, tiny_data, tmp_path):
    alone(replace(DRAWN, dtype="bfloat16", steps=3), tiny_data, tmp_path / "run")
    first, exact = rows(tmp_path / "run")[0]["loss"], rows(runs / "one")[0]["loss"]
    assert first == pytest.approx(exact, rel=0.05)
    assert first != exact
    assert {tensor.dtype for tensor in weights(tmp_path / "run", 3).values()} == {torch.float32}


def test_a_damaged_set_trains_to_the_end_and_the_ledger_proves_what_was_delivered(
    tiny_data, tmp_path
):
    """A pair is cut at step 3 and goes on as one process, on a set with four damaged images."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    bad = (20, 23, 26, 29)
    flip_bit(data, "train", *bad)
    config = replace(CONFIG, ledger=True, steps=9, keep=3, validate_every=0)  # an epoch and a half
    whole, again = tmp_path / "whole", tmp_path / "again"
    together(tmp_path / "job", [Call(config, data, whole)])
    cut_at(3, whole, again)
    shutil.copytree(whole / "ledger", again / "ledger")
    alone(config, data, again)

    replaced = {row["step"]: row["replaced"] for row in rows(whole)}
    due = [int(FullShuffle([48], CONFIG.seed).list_slots(p, 1).ids[0]) for p in range(72)]
    assert replaced == {
        step: sum(sample in bad for sample in due[8 * step - 8 : 8 * step]) for step in range(1, 10)
    }
    assert {row["step"]: row["replaced"] for row in rows(again)} == replaced
    for run in (whole, again):
        listed = [row["sample"] for row in rows(run, "quarantine.jsonl")]
        assert sorted(listed) == list(bad)
    proof = prove(data, [whole])
    assert not proof.findings
    assert "epoch 0 exactly once" in proof.summary()
    proof = prove(data, [again])
    assert not proof.findings
    assert "48 samples delivered again after restarts, all identical" in proof.summary()
    next((again / "ledger").glob("*-r0001of0002-*")).unlink()
    assert prove(data, [again]).findings


def test_strict_training_stops_with_exit_code_4(tiny_data, tmp_path):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    flip_bit(data, "train", 23)
    with pytest.raises(DataError, match=r"train sample 23 \(train-000002\.tar.*CRC-32 differs"):
        alone(replace(CONFIG, strict=True), data, tmp_path / "run")


def test_statistics_of_both_columns_are_written_alike_by_one_process_and_a_pair(runs):
    one, pair = ({row["step"]: row for row in rows(runs / name, "layers.jsonl")}
                 for name in ("one", "pair"))  # fmt: skip
    assert list(one) == list(pair) == [STEPS]  # 50 is further than the run, its end always has one
    means = one[STEPS]["layers"]
    trained = weights(runs / "one")
    assert set(means) == {key.partition("/")[2] for key in trained if key.startswith("weights/")}
    for key, (weight, update, gradient) in means.items():
        assert weight == pytest.approx(trained[f"weights/{key}"].abs().mean().item(), rel=1e-3)
        assert update == pytest.approx(trained[f"velocity/{key}"].abs().mean().item(), rel=1e-3)
        assert gradient > 0
        assert pair[STEPS]["layers"][key] == pytest.approx([weight, update, gradient], rel=0.01)


def test_kernels_of_both_columns_are_kept_alike_by_one_process_and_a_pair(runs):
    one, pair, again = (read_kernels(runs / name / "kernels.jsonl")
                        for name in ("one", "pair", "one-again"))  # fmt: skip
    assert [moment.step for moment in one] == [1, 2, 4, STEPS]
    trained = weights(runs / "one")
    for column in "ab":
        exact = trained[f"weights/{column}.conv1.weight"]
        torch.testing.assert_close(torch.from_numpy(one[-1].columns[column]), exact, rtol=1e-3,
                                   atol=1e-6)  # fmt: skip
        for mine, theirs, later in zip(one, pair, again, strict=True):
            expected = torch.from_numpy(mine.columns[column])
            torch.testing.assert_close(torch.from_numpy(theirs.columns[column]), expected,
                                       rtol=1e-2, atol=1e-4)  # fmt: skip
            assert torch.equal(torch.from_numpy(later.columns[column]), expected)


def test_the_workers_are_told_in_words():
    assert "1 worker (both columns, 1 thread), cpu" in describe_workers(CONFIG, ProcessMesh())
    assert "1 worker (the one column, 1 thread)" in describe_workers(
        replace(CONFIG, design=Design(columns=1)), ProcessMesh()
    )
    two = ProcessMesh(replica=1, replicas=2, cores=2)
    assert "2 workers (both columns each, 2 threads)" in describe_workers(CONFIG, two)
