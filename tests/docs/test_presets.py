"""The files in cluster/configs/: sound, and what they claim to be."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.train import parse_command
from model.architecture import Design
from model.schedule import compute_rates, parse_changes

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "cluster" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_of_the_repository_are_sound_and_say_what_they_are_for(path):
    text = path.read_text(encoding="utf-8")
    parse_command([str(path), "--data", "d", "--run", "r"])
    head = text[: text.index("\n\n")]
    preset = path.stem not in ("demo", "narrow")
    assert not preset or "source" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"duet train {path.stem} --data" in head
    assert "hardware" in head
    assert "expected" in head
    assert tomllib.loads(text)


def test_presets_say_what_is_known_of_them():
    """A claim each: what differs from the paper's network, and the published number."""
    presets = {path.stem: parse_command([str(path), "--data", "d", "--run", "r"]).settings
               for path in CONFIGS}  # fmt: skip
    heads = {path.stem: path.read_text(encoding="utf-8") for path in CONFIGS}
    source = {"relu_first": False, "spatial_norm": True}
    assert presets["paper"].design == Design()
    for name, design in {
        "dexp": Design(**source),
        "source2012": Design(**source),
        "one_gpu": Design(columns=1, **source),
        "no_lrn": Design(norm="none", relu_first=False),
        "pool2": Design(pool="2/2", **source),
        "tanh": Design(activation="tanh", **source),
        "norm_spatial": Design(norm="spatial", relu_first=False),
        "norm_lcn": Design(norm="lcn", relu_first=False),
        "norm_batch": Design(norm="batch", relu_first=False),
        "no_dropout": Design(dropout=False, **source),
        "conv6": Design(conv6=True, **source),
        "no_conv3": Design(without="conv3", **source),
        "no_conv4": Design(without="conv4", **source),
        "no_conv5": Design(without="conv5", **source),
    }.items():
        assert presets[name].design == design, name
        full = replace(presets[name], design=presets["dexp"].design)
        if name != "source2012":  # an ablation differs from dexp by its network alone
            assert full == presets["dexp"], name
    for name, changed in {
        "no_augment": {"augment": False},
        "no_decay": {"weight_decay": 0.0},
        "no_colour": {"colour": 0.0, "colour_divide": False, "changes": ("74 lr.conv1 0",)},
    }.items():
        assert presets[name] == replace(presets["dexp"], **changed), name
    tuned = presets["finetune"]
    assert tuned.design == Design(conv6=True, **source)
    rates = compute_rates(tuned.lr, tuned.lr * tuned.bias_factor,
                     [(c.name, c.value) for c in parse_changes(
                         tuned.changes, [layer.name for layer in tuned.design.layers()]
                     ) if c.epoch == 0])  # fmt: skip
    assert [rates.get(f"{name}.weight") for name in ("conv1", "conv6", "fc8")] == [1e-4, 1e-3, 0.01]
    assert {rates.get(f"{name}.bias") for name in ("conv1", "conv6", "fc8")} == {0.02}
    four = presets["four"]
    assert (four.weight_decay, four.augment, four.design.norm, four.design.columns) == (
        0.0,
        False,
        "none",
        1,
    )
    assert "42.34" in heads["dexp"]
    assert "18.05" in heads["dexp"]
    assert presets["source2012"].colours == ((0, 0.1), (67, 0.0))
    assert presets["dexp"].colours == ((0, 0.1), (68, 0.0))
    assert presets["dexp"].epochs == 95  # layer-params-169.cfg, from which 170 went on
    assert "a pair of GPUs" not in heads["one_gpu"]
