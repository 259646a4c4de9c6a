"""The files in cluster/config/presets/: sound, and what they claim to be."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.train import parse_command
from model.architecture import Design
from model.layer_table import Layer
from model.schedule import compute_rates, parse_changes

CONFIGS = sorted(
    (Path(__file__).resolve().parents[2] / "cluster" / "config" / "presets").glob("*.toml")
)


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


def halve_dense(rows: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(replace(row, maps=1024) if row.maps == 2048 else row for row in rows)


def test_presets_say_what_is_known_of_them():
    """A claim each: what differs from the paper's network, and the published number."""
    presets = {path.stem: parse_command([str(path), "--data", "d", "--run", "r"]).settings
               for path in CONFIGS}  # fmt: skip
    heads = {path.stem: path.read_text(encoding="utf-8") for path in CONFIGS}
    source = {"relu_first": False, "spatial_norm": True}
    dexp = replace(presets["dexp"], milestones=())  # those are of its own network
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
        "norm_scale": Design(norm="scale", relu_first=False),
        "no_dropout": Design(dropout=False, **source),
        "conv6": Design(conv6=True, **source),
        "no_conv3": Design(without="conv3", **source),
        "no_conv4": Design(without="conv4", **source),
        "no_conv5": Design(without="conv5", **source),
        "no_fc7": Design(without="fc7", **source),
        "no_dense": Design(without="dense", **source),
        "half_dense": Design(layers=halve_dense(Design(**source).rows())),
    }.items():
        assert presets[name].design == design, name
        full = replace(presets[name], design=presets["dexp"].design)
        full = replace(full, milestones=())
        if name != "source2012":  # an ablation differs from dexp by its network alone
            assert full == dexp, name
    for name, changed in {
        "no_augment": {"augment": False},
        "no_decay": {"weight_decay": 0.0},
        "no_colour": {"colour": 0.0, "colour_divide": False, "changes": ("74 lr.conv1 0",)},
    }.items():
        assert presets[name] == replace(dexp, **changed), name
    tuned = presets["finetune"]
    assert tuned.design == Design(conv6=True, **source)
    rates = compute_rates(tuned.lr, tuned.lr * tuned.bias_factor,
                     [(c.name, c.value) for c in parse_changes(
                         tuned.changes, [layer.name for layer in tuned.design.rows()]
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


def test_presets_of_the_source_s_other_networks_are_those_of_its_files():
    """layers-150.cfg, -167, 170-quant, 170-256-double, 146-2009 and 146-2011."""
    presets = {path.stem: parse_command([str(path), "--data", "d", "--run", "r"]).settings
               for path in CONFIGS}  # fmt: skip
    source = {"relu_first": False, "spatial_norm": True}
    half, alone = presets["half_exchange"], presets["no_exchange"]
    assert half.exchange_dtype == "float16"
    assert replace(half, exchange_dtype="auto", dtype="auto", milestones=()) == replace(
        presets["dexp"], milestones=()
    )
    assert alone.design == Design(communication=False, **source)
    assert [stage.reads for stage in alone.design.rows()] == ["picture", *["own"] * 6, "both"]
    assert presets["no_norm2"].design == Design(norm_layers=("conv2=none",), relu_first=False)
    assert (presets["no_norm2"].lr_drop, presets["batch256"].rate_scaling) == (1000, "linear")
    assert presets["batch256"].batch_size == 256
    for name, expected in {
        "pretrain2009": {"conv1": 0.001, "conv5": 0.001, "conv6": 0.01, "fc6": 0.01, "fc8": 0.01},
        "pretrain2011": {"conv1": 0.001, "conv6": 0.001, "bottleneck": 0.01, "fc8": 0.01},
    }.items():
        config = presets[name]
        assert config.init_layers == "conv"
        assert config.design.bottleneck == (1024 if name == "pretrain2011" else 0)
        layers = [layer.name for layer in config.design.rows()]
        changes = parse_changes(config.changes, layers)
        begin = [(one.name, one.value) for one in changes if one.epoch == 0]
        rates = compute_rates(config.lr, config.lr * config.bias_factor, begin)
        assert {layer: rates.get(f"{layer}.weight") for layer in expected} == expected
        assert [rates.get(f"{layer}.bias") for layer in ("conv1", "conv6", "fc8")] == [
            0.02, 0.002, 0.02
        ]  # fmt: skip
        end = compute_rates(0.01, 0.02, [(one.name, one.value) for one in changes])
        assert {end.get(f"{layer}.weight") for layer in layers} == {0.001}
    large = presets["lars32k"]
    assert (large.batch_size, large.lars, large.lr, large.warmup) == (32_768, 0.001, 32.0, 10.0)
    assert presets["local11"].design.layer_norms == {"conv1": "lrn", "conv2": "lrn"}
    assert presets["local13"].design.layer_norms == {"conv1": "none", "conv2": "none"}


def test_heads_with_published_log_probabilities_give_them():
    for name, words in {
        "dexp": ["1.839", "1.730", "5.31"], "source2012": ["1.741"],
        "no_exchange": ["41.83", "1.811"],
        "no_norm2": ["42.68", "1.852", "1.739"], "half_exchange": ["18.42", "1.861", "1.750"],
        "batch256": ["42.27", "1.841"], "finetune": ["1.633"], "pretrain2009": ["1.646"],
        "no_lrn": ["1.822"], "pool2": ["1.758"], "one_gpu": ["1.703"],
    }.items():  # fmt: skip
        text = next(path for path in CONFIGS if path.stem == name).read_text(encoding="utf-8")
        head = text[: text.index("\n\n")]
        assert [word for word in ["log-probability", *words] if word not in head] == [], name
