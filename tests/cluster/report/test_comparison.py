"""Runs side by side, and a run beside its preset: what differs, is missing, is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.config import Config, load_settings
from cluster.report.comparison import MOST_RUNS
from cluster.report.page import main
from cluster.report.settings import describe_settings, list_differences, read_expected
from cluster.run.folder import format_toml
from pipeline.tools.charts import pick_series
from pipeline.tools.errors import UsageError
from tests.cluster.report.test_report import Page, metrics


def begin(run: Path, data: str = "ab", steps: int = 60, **settings: object) -> Path:
    """Make a run of some steps, without a validation."""
    run.mkdir()
    (run / "config.toml").write_text(format_toml(Config.from_settings(settings), data))
    if steps:
        metrics(run, steps)
    return run


def compare(*runs: Path, out: Path) -> Page:
    assert main([*map(str, runs), "--out", str(out)]) == 0
    return Page(out)


def test_runs_differ_in_what_the_page_shows(tmp_path: Path, capsys) -> None:
    first = begin(tmp_path / "first", lr=0.01)
    second = begin(tmp_path / "second <i>", lr=0.02, steps=30)
    for run, error in ((first, 0.25), (second, 0.125)):
        row = {"views": 10, "samples": 800, "step": 60, "top1_error": error, "top5_error": 0.0}
        (run / "evaluation-10.json").write_text(json.dumps(row))
    page = compare(first, second, out=tmp_path / "x.html")
    assert capsys.readouterr().out == f"{tmp_path / 'x.html'}\n"
    assert re.findall(r'class="n best">([^<]*)', page.source) == ["12.5"], "the lower error only"
    table = page.source[page.source.index("Settings that differ</h2>") :]
    table = table[table.index("<tbody>") : table.index("</tbody>")]
    assert re.findall(r'row">([^<]*)', table) == ["lr"]
    assert re.findall("<td>([^<]*)", table) == ["0.01", "0.02"]
    assert "second <i>" in page.text
    assert "second <i>" not in page.source
    titles = [words for level, words in page.headings if level == 3]
    assert "Training loss" in titles
    assert "Validation loss" not in titles, "neither has any"
    assert "not trained on the same data set" not in page.text


def test_a_run_has_its_color_everywhere_and_a_missing_curve_is_said(tmp_path: Path) -> None:
    runs = [begin(tmp_path / name, steps=60 if name != "c" else 0) for name in "abc"]
    page = compare(*runs, out=tmp_path / "x.html")
    for chart in re.findall(r'<figure class="chart">.*?</figure>', page.source, re.DOTALL):
        legend = dict(re.findall(r"--k:([^\"]*)\">(\w)", chart))
        assert legend == {"var(--s1)": "A", "var(--s2)": "B"}
        assert chart.count("stroke: var(--s1)") == chart.count("stroke: var(--s2)") > 0
        assert "Not recorded: C." in chart
    badges = re.findall(r'class="badge" style="--k:([^"]*)">(\w)', page.source)
    assert set(badges) == {("var(--s1)", "A"), ("var(--s2)", "B"), ("var(--s3)", "C")}
    assert "no step is recorded yet" in page.text
    assert len({pick_series(number) for number in range(MOST_RUNS)}) == MOST_RUNS


def test_runs_of_different_data_sets_are_compared_with_a_warning(tmp_path: Path) -> None:
    runs = [begin(tmp_path / data, data) for data in ("ab", "cd")]
    assert "not trained on the same data set" in compare(*runs, out=tmp_path / "x.html").text


def test_bad_comparisons_are_one_line(tmp_path: Path, monkeypatch) -> None:
    run = begin(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for words, text in (
        ([], "no RUN is named"),
        (["run", "./run"], "run is named twice"),
        (["run", str(run)], "is named twice, as run too"),
        (["run", "nowhere"], "nowhere holds no run"),
        ([str(number) for number in range(MOST_RUNS + 1)], f"compares {MOST_RUNS} at most"),
    ):
        with pytest.raises(UsageError, match=text) as refused:
            main(words)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.html"))
    begin(tmp_path / "other")
    assert main(["run", "other"]) == 0
    assert (tmp_path / "comparison.html").is_file()


def test_settings_that_differ_from_the_preset_come_first() -> None:
    preset = load_settings(Path("demo"))
    config = Config.from_settings({**preset, "lr": 0.5})
    table = {**config.to_settings(), "layer_rates": [], "config": "demo", "command": "x"}
    found = describe_settings(table)
    assert [(row.name, row.values) for row in found.changed] == [
        ("lr", ("0.5", f"{preset['lr']:g}"))
    ]
    assert "command" not in {row.name for row in found.rest}
    assert "epochs" not in {row.name for row in found.rest}, "steps decide"
    assert "top-1" in found.expected
    assert (found.base, found.note) == ("demo", "")
    gone = describe_settings({"width": 0.25, "config": "gone.toml"})
    assert [row.values for row in gone.changed] == [("0.25", "1")]
    assert "gone.toml, with which the run began, cannot be read here" in gone.note
    assert "does not say which CONFIG" in describe_settings({"width": 1.0}).note


def test_what_a_preset_expects_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        "# A network.\n#\n#   expected  8 % error,\n#             on a CPU.\n#   source    me\n"
    )
    assert read_expected(path) == "8 % error, on a CPU."
    path.write_text("width = 1.0\n")
    assert read_expected(path) == ""


def test_settings_of_runs_are_told_apart_by_their_text() -> None:
    rows = list_differences([{"lr": 0.01, "seed": 1, "run_id": "a"}, {"lr": 0.010, "new": True}])
    assert {row.name: row.values for row in rows} == {
        "seed": ("1", "not a setting then"), "new": ("not a setting then", "yes"),
    }  # fmt: skip
