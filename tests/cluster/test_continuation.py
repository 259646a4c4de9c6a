"""Settings that may differ when a run is resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import CHANGEABLE, Config
from cluster.run.folder import find_conflicts
from model.architecture import Design

OTHER = {
    "width": 0.5, "seed": 1, "batch_size": 256, "epochs": 9.0, "steps": 201, "lr": 0.1,
    "bias_factor": 1.0, "lr_drop": 10.0, "lr_drops": 2, "bias_drop": 5.0, "bias_drops": 3,
    "momentum": 0.5, "weight_decay": 0.1, "shuffle": "block", "window": 8,
    "colour": 0.0, "dtype": "bfloat16", "columns": 1, "norm": "none", "relu_first": False,
    "spatial_norm": True, "pool": "2/2", "activation": "tanh", "without": "conv4",
    "lr_power": 1.0, "warmup": 5.0, "warmup_lr": 0.001, "layer_decays": ("fc8=0",), "lars": 0.001,
    "norm_layers": ("conv2=none",), "lrn_k": 1.0, "lrn_size": 9, "lrn_alpha": 5e-4,
    "lrn_beta": 0.5, "lrn_across": True, "bottleneck": 8, "communication": False,
    "middle_std": 0.01, "net": "four", "conv6": True, "dropout": False,
    "init": "runs/other", "init_layers": "conv", "augment": False,
    "schedule": "manual", "rate_scaling": "sqrt", "changes": ("1 colour 0",), "patience": 9,
    "plateau_biases": False, "plateau_drops": 1, "plateau_factor": 2.0, "plateau_threshold": 0.1,
    "layer_rates": ("conv1=0",), "colour_divide": True, "mean": "image",
    "layers": ({"name": "conv1", "maps": 48, "kernel": 11}, {"name": "fc2", "kind": "fc"}),
    "exchange_dtype": "bfloat16", "hw_decoder_load": 0.5, "image_size": 32, "exact": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "field", [name for name in Config().to_settings() if name not in CHANGEABLE]
)
def test_what_a_run_learns_cannot_change_under_way(field):
    net = "four" if field == "image_size" else "paper"
    warmup = 1.0 if field == "warmup_lr" else 0.0
    old = Config(steps=400, warmup=warmup, design=Design(net=net))
    new = Config.from_settings(old.to_settings() | {field: OTHER[field]})
    found = find_conflicts(old, new, samples=4000)
    if field == "epochs":  # steps decide, so nothing changes
        assert found == []
    elif field == "schedule":  # manual: the length matters no more
        assert found == ["schedule: dexp -> manual"]
    elif field == "steps":
        assert found == ["length in steps: 400 -> 201 (learning rates drop by it)"]
    elif field == "layers":
        row = 'name = "conv1", maps = 48, kernel = 11, reads = "picture"'
        assert found == [f"layers: no row -> {{{row}}}"]
    else:
        assert found == [f"{field}: {old.to_settings()[field]} -> {OTHER[field]}"]


def test_how_a_run_is_carried_out_may_change():
    old = Config()
    free = {
        "replicas": "1:2", "device": "cpu", "cuda_graph": "off", "columns_per_worker": 2,
        "microbatch": 16, "threads": 3, "prefetch": 4, "checkpoint_every": 7, "keep": 9,
        "keep_best": 0, "store": "s3://b/x", "milestones": ("9 top1 50",),
        "validate_every": 0, "statistics_every": 0, "max_failures": 0, "node_wait": 0, "spares": 0,
        "collective_timeout": 10, "strict": True, "ledger": True, "tensorboard": True,
        "wandb": True, "mlflow": True, "data_version": "latest", "cache": "c", "cache_size": "1TB",
    }  # fmt: skip
    assert set(free) == set(CHANGEABLE)
    assert find_conflicts(old, replace(old, **free), samples=4000) == []


def test_plateau_counts_validations():
    old = Config(schedule="plateau")
    found = find_conflicts(old, replace(old, validate_every=7, checkpoint_every=7), samples=4000)
    assert found == ["validate_every: 500 -> 7"]


def test_what_batch_normalisation_sees_at_once_stays_however_many_replicas_there_are():
    old = Config(design=Design(norm="batch"), replicas="1:4")
    assert {old.microbatch_size(count) for count in old.replica_sizes} == {32}
    assert find_conflicts(old, replace(old, replicas="2:4"), samples=4000) == []
    assert find_conflicts(old, replace(old, replicas=4), samples=4000) == []
    for changes in ({"replicas": 1}, {"microbatch": 16}):
        (found,) = find_conflicts(old, replace(old, **changes), samples=4000)
        assert "normalised together: 32 -> " in found
    assert {replace(old, microbatch=64).microbatch_size(count) for count in old.replica_sizes} == {
        32
    }


def test_what_an_exact_sum_takes_at_once_stays_however_many_replicas_there_are():
    old = Config(exact=True, replicas="1:4")
    assert find_conflicts(old, replace(old, replicas=2, microbatch=32), samples=4000) == []
    for changes in ({"replicas": 1}, {"microbatch": 16}):
        (found,) = find_conflicts(old, replace(old, **changes), samples=4000)
        assert found.startswith("images summed together: 32 -> ")
    assert find_conflicts(old, replace(old, exact=False), samples=4000) == ["exact: True -> False"]


def test_the_length_may_change_where_no_rate_depends_on_it():
    old = Config(steps=400, lr_drops=1, bias_drops=1)
    assert find_conflicts(old, replace(old, steps=600), samples=4000) == []
