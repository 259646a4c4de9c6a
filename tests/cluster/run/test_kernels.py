"""The kernels that a run keeps over time: when, how exactly, and what a resume leaves of them."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest

from cluster.mesh import ProcessMesh
from cluster.run.folder import KERNELS, Mark
from cluster.run.kernels import copy_first_kernels, encode_kernels, is_snapshot_step, read_kernels
from cluster.run.metrics import MetricsLog
from model.alexnet import AlexNet
from model.architecture import Design

NET = AlexNet(classes=4, width=0.0625, seed=5)


def write(run: Path, steps: range, resumed_from: int = 0) -> None:
    with MetricsLog(run, ProcessMesh(), pytest.fail, samples=40, step=resumed_from) as log:
        for step in steps:
            if is_snapshot_step(step, 100):
                log.kernels(Mark(step=step, position=8 * step), [copy_first_kernels(NET)])


def test_kept_after_powers_of_two_and_the_last_step():
    assert [step for step in range(1, 1001) if is_snapshot_step(step, 1000)] == [
        1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000,
    ]  # fmt: skip
    assert sum(is_snapshot_step(step, 900_000) for step in range(1, 900_001)) == 21


def test_what_is_read_back_is_conv1_to_half_precision(tmp_path):
    write(tmp_path, range(1, 2))
    (moment,) = read_kernels(tmp_path / KERNELS)
    state = NET.column_state()
    assert sorted(moment.columns) == ["a", "b"]
    for column, weights in moment.columns.items():
        exact = state[f"{column}.conv1.weight"].numpy()
        assert weights.dtype == np.float32
        assert weights.shape == exact.shape
        np.testing.assert_allclose(weights, exact, rtol=2**-11, atol=2**-25)


def test_a_run_that_goes_back_loses_the_later_ones_and_makes_them_again(tmp_path):
    write(tmp_path, range(1, 20))
    whole = (tmp_path / KERNELS).read_bytes()
    write(tmp_path, range(6, 6), resumed_from=5)
    assert [one.step for one in read_kernels(tmp_path / KERNELS)] == [1, 2, 4]
    write(tmp_path, range(6, 20), resumed_from=5)
    assert (tmp_path / KERNELS).read_bytes() == whole


def test_two_processes_write_what_one_with_both_columns_does():
    both = copy_first_kernels(NET)
    parts = [{"a": both["a"]}, {"b": both["b"]}]
    assert encode_kernels(parts) == encode_kernels([both])


def test_of_a_table_of_layers_they_are_those_of_conv1_alone():
    first = {"name": "conv1", "maps": 2, "kernel": 5, "stride": 4}
    later = {"name": "preconv1", "maps": 2, "kernel": 3, "reads": "picture"}
    last = {"name": "fc2", "kind": "fc", "reads": "both"}

    def copied(*rows):
        net = AlexNet(classes=4, design=Design.from_settings({"layers": rows, "image_size": 32}))
        return {name: kernels.shape for name, kernels in copy_first_kernels(net).items()}

    both = copied(first, {"name": "fc1", "kind": "fc", "maps": 2}, later,
                  {"name": "fc3", "kind": "fc", "maps": 2, "adds": ["fc1"]}, last)  # fmt: skip
    assert both == {"a": (2, 3, 5, 5), "b": (2, 3, 5, 5)}
    local = {"name": "conv1", "maps": 2, "kernel": 3, "pad": 1, "kind": "local"}
    assert copied(first | {"name": "img1"}, local, last) == {}


def test_damaged_rows_are_left_out_and_the_later_of_two_counts(tmp_path):
    write(tmp_path, range(1, 3))
    path = tmp_path / KERNELS
    first, second = path.read_text().splitlines()
    bad = json.loads(first)
    bad["columns"]["a"]["float16"] = "!!"
    short = json.loads(second)
    short["columns"]["a"]["shape"][0] += 1
    nan = json.loads(second)
    count = math.prod(nan["columns"]["b"]["shape"])
    nan["columns"]["b"]["float16"] = base64.b64encode(b"\x00\x7e" * count).decode()
    rows = [first, json.dumps(bad), json.dumps(short), json.dumps(nan), "[]", "{", first, second]
    path.write_text("\n".join(rows) + "\n")
    assert [one.step for one in read_kernels(path)] == [1, 2]
    path.write_text("\n".join([first, second, first]) + "\n")
    assert [one.step for one in read_kernels(path)] == [1]
    assert read_kernels(tmp_path / "none") == []
    assert read_kernels(tmp_path) == []  # cannot be read
