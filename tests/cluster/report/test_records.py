"""The files of a run are read back, whatever state they are in."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.report.records import read_records, read_series
from pipeline.tools.errors import UsageError


def row(step: int, **more: float) -> str:
    return json.dumps({"position": 128 * step, "step": step, "loss": 1 / step, **more}) + "\n"


def test_columns_and_missing_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row(1, lr=0.01) + row(2) + row(3, lr=0.001))
    series = read_series(path, ("loss", "lr"))
    assert len(series) == 3
    assert series["position"].tolist() == [128, 256, 384]
    np.testing.assert_array_equal(series["lr"], [0.01, np.nan, 0.001])
    assert series.last("loss") == pytest.approx(1 / 3)
    assert series.unreadable == 0


@pytest.mark.parametrize(
    "damage",
    [
        '{"position": 384, "st',  # half written
        '{"step": 3, "loss": 1.0}\n',  # no position
        '{"position": "far", "step": 3}\n',
        '{"position": NaN, "step": 3}\n',
        "[1, 2]\n",
        "17\n",
        "\x00\x00\n",
        "\n",
    ],
)
def test_damaged_line_is_counted_and_left_out(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row(1) + row(2) + damage)
    series = read_series(path, ("loss",))
    assert series["step"].tolist() == [1, 2]
    assert series.unreadable == 1


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row(1).encode() + b"\xff\xfe\n" + row(2).encode())
    assert read_series(path, ("loss",)).unreadable == 1


def test_overtaken_rows_are_dropped_and_the_restart_is_known(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = "".join(row(step, lr=1) for step in range(1, 8))
    again = "".join(row(step, lr=2) for step in range(5, 10))
    path.write_text(first + again)
    series = read_series(path, ("lr",))
    assert series["step"].tolist() == list(range(1, 10))
    assert series["lr"].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert series.restarts == ((7, 4),)


def test_restart_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row(1) + row(2) + row(1))
    series = read_series(path, ())
    assert series["step"].tolist() == [1]
    assert series.restarts == ((2, 0),)


def test_missing_file_is_no_rows(tmp_path: Path) -> None:
    assert len(read_series(tmp_path / "none.jsonl", ("loss",))) == 0


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run \(config\.toml is missing\)"):
        read_records(tmp_path)


def test_damaged_tables_are_noted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(1))
    (tmp_path / "config.toml").write_text("width = = 1")
    (tmp_path / "machine.json").write_text("[]")
    (tmp_path / "evaluation-1.json").write_text('{"top1_error": "good"}')
    (tmp_path / "evaluation-10.json").write_text('{"top1_error": 0.25}')
    records = read_records(tmp_path)
    assert records.config == {}
    assert records.machine == {}
    assert records.evaluations == {10: {"top1_error": 0.25}}
    assert [note.split()[0] for note in records.notes] == [
        "evaluation-1.json",
        "config.toml",
        "machine.json",
    ]
