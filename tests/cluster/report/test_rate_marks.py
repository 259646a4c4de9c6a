"""The recipe in a report: a mark for each change of the rates, how far weights move."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.report.curves import draw_curves, draw_updates, list_rate_marks
from cluster.report.page import render_page
from cluster.report.records import read_records
from cluster.report.tables import make_layer_table
from cluster.run.folder import format_toml
from model.architecture import Design
from pipeline.tools.charts import MARGINS, PALETTE, SERIES


def written(run: Path, name: str, rows: list[dict]) -> None:
    (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    steps = [
        {"position": 8 * s, "step": s, "epoch": s / 10, "loss": 2.0, "top1_error": 0.5,
         "lr": 0.01, "img_s": 9.0, "seconds": 1.0, "data_wait": 0.0}
        for s in range(1, 101)
    ]  # fmt: skip
    written(tmp_path, "metrics.jsonl", steps)
    rates = [
        (20, {"lr": 0.001, "lr_bias": 0.002}, 0.001),
        (40, {"lr.conv1": 1e-5, "colour": 0.0}, 0.001),
        (50, {"lr_bias.conv1": 0.0}, 0.001),
        (60, {"drop": 10.0}, 0.0001),
    ]
    written(
        tmp_path,
        "rates.jsonl",
        [{"position": 8 * s, "step": s, "set": what, "lr": lr} for s, what, lr in rates],
    )
    means = {f"{c}.{layer}.{kind}": [0.01, 0.01 * 10**-power, 0.1]
             for layer, power in (("conv1", 2), ("fc6", 4)) for c in "ab"
             for kind in ("weight", "bias")}  # fmt: skip
    written(
        tmp_path,
        "layers.jsonl",
        [{"position": 400, "step": 50, "layers": means},
         {"position": 800, "step": 100, "layers": means}],
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(format_toml(Config(), "abc"))
    return tmp_path


def test_every_change_of_the_weights_rates_is_a_mark(run: Path) -> None:
    assert list_rate_marks(read_records(run)) == [
        (160, "lr 0.001"), (320, "conv1 1e-05, colour 0"), (480, "lr 0.0001")
    ]  # fmt: skip
    assert "conv1 1e-05, colour 0" in draw_curves(read_records(run))[0].svg
    more = [{"position": 8 * s, "step": s, "set": {"lr": 0.1 / s}, "lr": 0.1 / s}
            for s in range(1, 14)]  # fmt: skip
    written(run, "rates.jsonl", more)  # too many for labels
    assert list_rate_marks(read_records(run)) == [(8 * s, "") for s in range(1, 14)]
    (run / "rates.jsonl").unlink()  # a run of before: nothing is seen to change
    assert list_rate_marks(read_records(run)) == []


def test_updates_are_drawn_by_layer_on_powers_of_ten(run: Path) -> None:
    records = read_records(run)
    assert list(records.updates) == ["position", "conv1", "fc6"]
    assert records.updates["conv1"].tolist() == pytest.approx([1e-2, 1e-2])
    chart = draw_updates(records)
    assert chart is not None
    assert chart.title == "Update against weight"
    assert re.findall(">(1e-.)<", chart.svg) == ["1e-4", "1e-3", "1e-2"]
    assert [name for name, _, _ in chart.legend] == ["conv1", "fc6"]
    start = r'<path d="M ([\d.]+) ([\d.]+) [^"]*" style="[^"]*'
    conv1, fc6 = (re.findall(start + re.escape(PALETTE[one]), chart.svg) for one in SERIES[:2])
    right, top, _, bottom = 440 - MARGINS[1], MARGINS[2], MARGINS[0], 250 - MARGINS[3]
    assert [float(y) for _, y in (*conv1, *fc6)] == [top, bottom]
    assert {float(x) for x, _ in (*conv1, *fc6)} == {(MARGINS[0] + right) / 2}
    page = render_page(records)
    assert "Update against weight" in page
    assert "conv1 1e-05, colour 0" in page


def test_damaged_and_missing_means_are_passed_over(run: Path) -> None:
    with (run / "layers.jsonl").open("a") as file:
        file.write('{"position": 808, "step": 101, "layers": {"a.fc6.weight": "x"}}\nnonsense\n')
    updates = read_records(run).updates
    assert len(updates["fc6"]) == len(updates["position"]) == 3
    assert math.isnan(updates["fc6"][2])
    assert draw_updates(read_records(run)) is not None
    (run / "layers.jsonl").unlink()
    assert draw_updates(read_records(run)) is None
    titles = [chart.title for chart in draw_curves(read_records(run))]
    assert titles[-1] == "Waiting for data", "a run of before has no memory"


def test_a_network_of_one_column_has_one_in_its_report(run: Path) -> None:
    (run / "config.toml").write_text(format_toml(Config(design=Design(columns=1)), "abc"))
    records = read_records(run)
    found = make_layer_table(records, 1000)
    assert found is not None
    assert found["both"].parameters == 59_798_312
    assert found["b"] is None
    assert all(row.b is None for row in found["rows"])
    page = render_page(records)
    assert "one column" in page
    assert "column b" not in page
    assert "both columns" not in page
