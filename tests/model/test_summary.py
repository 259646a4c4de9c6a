"""The layer table against the published numbers, and the command that prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import Config
from model.architecture import Design
from model.summary import (
    build_table,
    compute_footprint,
    count_original_crossing,
    main,
    read_design,
    sum_rows,
)

ROOT = Path(__file__).resolve().parents[2]

# Facts of the original (layers-145.cfg): numbers an image that one column sends the other.
CROSSING = {"conv3": 13 * 13 * 128, "fc6": 6 * 6 * 128, "fc7": 2048, "fc8": 2048}
NEURONS = {
    "conv1": 290_400, "conv2": 186_624, "conv3": 64_896, "conv4": 64_896, "conv5": 43_264,
    "fc6": 4096, "fc7": 4096, "fc8": 1000,
}  # fmt: skip


def test_neurons_and_what_crosses_are_the_originals() -> None:
    rows = build_table()
    for row in rows:
        assert 2 * row.neurons == NEURONS[row.layer]
        sent = CROSSING.get(row.layer, 0)
        assert row.crosses_forward == sent + (500 if row.layer == "fc8" else 0)
        assert row.crosses_backward == sent
    sums = sum_rows(rows)
    assert sums.neurons == 659_272
    assert count_original_crossing(rows) * 4 == 468_992
    # Ours: fc8 is cut, so a sends its fc7 and gets the gradient, and both swap 500 logits.
    assert sums.crosses * 4 == 468_992 + 2 * 4 * 2048 + 2 * 4 * 500


def test_the_notes_footprint_formula() -> None:
    assert round(compute_footprint(build_table(), 128) / 2**20) == 876
    assert round(compute_footprint(build_table(), 1) / 2**20) == 238
    assert compute_footprint(build_table(), 128, 2) * 2 == compute_footprint(build_table(), 128)


def test_receptive_fields() -> None:
    """Computed by hand: conv1 11; pool1 19; conv2 51; pool2 67; conv3 99; conv4 131; conv5 163."""
    fields = {row.layer: row.receptive_field for row in build_table()}
    assert [fields[f"conv{n}"] for n in range(1, 6)] == [11, 51, 99, 131, 163]
    assert {fields["fc6"], fields["fc7"], fields["fc8"]} == {224}
    rows = build_table(design=Design(spatial_norm=True))
    later = {row.layer: row.receptive_field for row in rows}
    assert later["conv2"] == 51
    assert later["conv3"] == 99 + 4 * 8  # four more pixels of layer 2, each 8 apart


def test_receptive_fields_of_other_networks() -> None:
    """Four layers: 5 squares of 8; pooling 7, conv2 15, pooling 19, conv3 35: all there is of 28.

    The contrast of layer 1 is over 9x9 pixels and again, 4 apart: 16 * 4 more from there on.
    """
    fields = {row.layer: row.receptive_field for row in build_table(design=Design(net="four"))}
    assert fields == {"conv1": 40, "conv2": 8 * 15, "conv3": 8 * 35, "fc4": 224}
    later = {row.layer: row.receptive_field for row in build_table(design=Design(norm="lcn"))}
    assert later["conv1"] == 11
    assert later["conv2"] == 51 + 16 * 4


def test_a_filter_of_one_pixel_is_applied_once() -> None:
    rows = {row.layer: row for row in build_table(10, Design(net="local11", image_size=32))}
    assert [rows[name].weights for name in ("local3", "local4")] == [
        32 * 32 * 9 * 8 * 8, 32 * 16 * 9 * 8 * 8,
    ]  # fmt: skip
    for row in rows.values():
        side = row.output_shape[-1]
        times = side**2 if row.layer.startswith("conv") else 1
        assert row.multiply_adds == row.weights * times


def test_one_column_exchanges_nothing() -> None:
    rows = build_table(design=Design(columns=1))
    assert [row.column for row in rows] == ["a"] * 8
    assert sum_rows(rows).crosses == count_original_crossing(rows) == 0


@pytest.mark.parametrize(
    "name", ["paper", "one_gpu", "no_conv5", "narrow", "four", "conv6", "norm_batch"]
)
def test_the_command_prints_a_table_of_any_config(name, capsys) -> None:
    main([str(ROOT / "cluster" / "config" / "presets" / f"{name}.toml"), "--batch-size", "128"])
    shown = capsys.readouterr().out
    assert "multiply-adds" in shown
    assert max(map(len, shown.splitlines()[:20])) <= 180
    wanted = {
        "paper": ["60,965,224", "724,406,816", "659,272", "468,992", "876 MiB", "11/4/0+3"],
        "one_gpu": ["59,798,312", "256x6x6"],
        "four": ["picture/8", "3x28x28", "5/1/2", "64x3x3", "656,328"],
        "conv6": ["61,555,304", "128x6x6", "conv6"],
        "norm_batch": ["60,965,928"],
        "no_conv5": ["60,301,288"],
        "narrow": ["width 0.25"],
    }[name]
    assert [words for words in wanted if words not in shown] == []
    assert ("exchanges" in shown) == (name not in ("one_gpu", "four"))


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float8", 1)])
def test_json_is_one_object_with_the_same_sums(dtype, size, capsys) -> None:
    main(
        [
            str(ROOT / "cluster" / "config" / "presets" / "paper.toml"),
            "--json",
            "--dtype",
            dtype,
        ]
    )
    told = json.loads(capsys.readouterr().out)
    assert told["totals"]["parameters"] == 60_965_224
    assert told["original_crossing_bytes_an_image"] == 468_992 // 4 * size
    conv1 = told["rows"][0]
    assert conv1["activation_bytes"] == 145_200 * 128 * size
    assert conv1["optimiser_bytes"] == 4 * 17_472


@pytest.mark.parametrize(
    "name", ["narrow", "narrow.toml", "configs/narrow.toml", "cluster/config/presets/narrow.toml"]
)
def test_the_name_of_a_preset_stands_for_it(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_design(Path(name)).width == 0.25
    with pytest.raises(ValueError, match="cannot be read"):
        read_design(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("widht = 1.0", ["'widht'", "did you mean 'width'?"]),
        ("nrom = 'none'", ["'nrom'", "did you mean 'norm'?"]),
        ("pool = '4/2'", ["pool is '4/2'", "'3/2', '2/2'"]),
        ("width = 'big'", ["width"]),
        ("width = ", ["is not TOML"]),
        (None, ["cannot be read"]),
    ],
)
def test_wrong_configs_get_one_line(tmp_path, capsys, text, words) -> None:
    path = tmp_path / "some.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        main([str(path)])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert [word for word in ["some.toml", *words] if word not in told] == []


def test_the_module_runs_without_torch() -> None:
    program = (
        "import sys, runpy; sys.argv = ['model.summary', 'paper', '--json']\n"
        "runpy.run_module('model.summary', run_name='__main__', alter_sys=True)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["neurons"] == 659_272


def test_a_setting_of_the_trainer_is_no_typo_of_one_of_the_network(tmp_path) -> None:
    names = Config().to_settings().keys() - vars(Design()).keys()
    path = tmp_path / "c.toml"
    path.write_text("".join(f"{name} = 1\n" for name in sorted(names)), encoding="utf-8")
    assert read_design(path) == Design()
