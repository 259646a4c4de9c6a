"""The harness of the benchmarks: what changed beyond noise, missing results, the page of files."""

from __future__ import annotations

import copy
import json
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import build  # noqa: E402
import order  # noqa: E402
import run as harness_run  # noqa: E402
from builders import BUILDERS  # noqa: E402
from harness import page, report  # noqa: E402
from harness.comparison import compare, list_obstacles  # noqa: E402
from harness.memory import MemoryPeak  # noqa: E402
from harness.rounds import order_round, take_turns  # noqa: E402

from pipeline.tools.errors import SetupError, UsageError  # noqa: E402

MACHINE = {
    "cpu": "some CPU", "cores": 2, "features": ["avx2"], "memory_gib": 8.0, "python": "3",
    "torch": "2", "dali": "2.4", "load_at_start": 0.0, "other_cores": 0.0,
}  # fmt: skip


def results(other_cores: float = 0.0, **figures: Any) -> dict[str, Any]:
    """Return a file of results with figures: rounds, or rounds, unit and what is better."""
    rows = {
        name: dict(zip(("rounds", "unit", "better"), one, strict=True))
        if isinstance(one, tuple)
        else {"rounds": one, "unit": "img/s", "better": "higher"}
        for name, one in figures.items()
    }
    return {
        "benchmark": "step",
        "date": "2026-12-01",
        "command": "python benchmarks/step.py",
        "settings": {"rounds": 5},
        "machine": MACHINE | {"other_cores": other_cores},
        "figures": rows,
        "missing": {},
        "tables": {"step": {"head": ["a", "b"], "rows": [["x", "1"]], "title": "", "notes": []}},
    }


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    return {change.figure.name: change.verdict for change in compare(old, new)}


def test_a_difference_within_three_errors_or_three_percent_is_none():
    old = results(steady=[100, 100, 100], wide=[60, 100, 140], faster=[100, 101, 102])
    new = results(steady=[97.5] * 3, wide=[80, 130, 160], faster=[120, 121, 122])
    assert verdicts(old, new) == {"steady": "same", "wide": "same", "faster": "better"}
    slower = results(steady=[96.0] * 3)
    assert verdicts(old, slower) == {"steady": "worse"}


def test_less_time_is_better():
    old, new = (results(wait=(rounds, "s", "lower")) for rounds in ([2.0] * 3, [1.0] * 3))
    assert verdicts(old, new) == {"wait": "better"}
    assert verdicts(new, old) == {"wait": "worse"}


def test_one_round_tells_nothing_and_a_busy_machine_only_ratios():
    old = results(once=[100.0], rate=[100.0] * 3, ratio=([1.0] * 3, "x", "higher"))
    new = results(once=[50.0], rate=[50.0] * 3, ratio=([2.0] * 3, "x", "higher"), other_cores=1.4)
    assert verdicts(old, new) == {
        "once": "cannot be told from fewer than 3 rounds",
        "rate": "cannot be told on a busy machine",
        "ratio": "better",
    }


def test_equal_runs_seldom_look_changed():
    """Two runs of 5 rounds with the same normal noise of 5 %: 3 errors are passed in few."""
    draw = random.Random(1)
    pairs = [
        [results(rate=[draw.gauss(100, 5) for _ in range(5)]) for _ in range(2)] for _ in range(400)
    ]
    changed = sum(verdicts(*pair)["rate"] != "same" for pair in pairs)
    assert changed < 0.15 * len(pairs)
    moved = [results(rate=[draw.gauss(150, 5) for _ in range(5)]) for _ in range(400)]
    seen = [verdicts(pair[0], new)["rate"] for pair, new in zip(pairs, moved, strict=True)]
    assert seen.count("better") > 0.9 * len(pairs)


def test_other_settings_or_another_machine_are_not_compared():
    new = results()
    assert list_obstacles(results(), new) == []
    other = copy.deepcopy(new)
    other["settings"]["rounds"] = 7
    other["machine"]["cpu"] = "another"
    assert list_obstacles(other, new) == ["rounds: 7 -> 5", "cpu: another -> some CPU"]
    assert "carried over" in list_obstacles(new | {"machine": "two cores"}, new)[0]


def test_a_busy_machine_says_by_how_much():
    assert report.describe_load(MACHINE | {"other_cores": 0.2}) == ""
    line = report.describe_load(MACHINE | {"other_cores": 1.44})
    assert line == "the machine is busy: 1.4 other cores on average of 2"
    busy = results(other_cores=1.44)
    assert line in page.format_table(busy, busy["tables"]["step"])


def test_the_page_is_that_of_its_files():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = page.read_tables(BENCHMARKS / "results")
    assert page.fill_page(text, tables) == text
    outside = page.PLACE.sub("", text).split("## ")
    # The meaning of the words of a table is prose; every table of figures has its place.
    left = [part.splitlines()[0] for part in outside if "\n|---" in part or "\n| ---" in part]
    assert left == ["Resume: what breaks in which loader"]
    carried = [json.loads(path.read_text("utf-8")) for path in (BENCHMARKS / "results").iterdir()]
    assert all(found["date"] and found["tables"] for found in carried)


def test_a_page_is_written_between_its_markers(tmp_path):
    out = tmp_path / "results"
    harness_run.save(out / "step.json", results())
    place = "before\n<!-- table: step -->\nold\n<!-- end of table -->\nafter\n"
    (tmp_path / "page.md").write_text(place)
    page.write_page(tmp_path / "page.md", out)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n<!-- table: step -->\n2026-12-01, some CPU, 2 cores (avx2)")
    assert "| a | b |\n| --- | --- |\n| x | 1 |\n<!-- end of table -->\nafter\n" in text
    assert "old" not in text
    for wrong, named in (("nothing", "add them"), (place.replace("step", "st"), "a place for st,")):
        with pytest.raises(UsageError, match=named):
            page.fill_page(wrong, page.read_tables(out))
    harness_run.save(out / "again.json", results())
    with pytest.raises(UsageError, match="as another file"):
        page.read_tables(out)
    (out / "again.json").write_text("{}")
    with pytest.raises(UsageError, match=r"again.json lacks benchmark, command"):
        page.read_tables(out)


def test_every_script_is_in_the_table_once():
    """`scaling` computes; `nets` is shared."""
    there = {path.stem for path in BENCHMARKS.glob("*.py")} - {"run", "scaling", "nets"}
    scripts = {one.script or name for name, one in harness_run.BENCHMARKS.items()}
    assert scripts == there
    quick = harness_run.choose(harness_run.RunOptions(quick=True))
    assert "goodput" not in quick
    assert "step" in quick
    with pytest.raises(UsageError, match="goodput has no short form"):
        harness_run.choose(harness_run.RunOptions(names=("goodput",), quick=True))
    with pytest.raises(UsageError, match="swift: no such benchmark; there are loaders"):
        harness_run.choose(harness_run.RunOptions(names=("swift",)))


def test_a_benchmark_that_breaks_is_a_row_and_its_last_results_stay(tmp_path, monkeypatch, capsys):
    found = {"step": results(duet=[100.0, 101, 102]), "pair": None}

    def run_script(name: str, words: list[str], timeout: float) -> harness_run.Outcome:
        if found[name] is None:
            return harness_run.Outcome(1.0, None, ["error: out of memory"])
        return harness_run.Outcome(1.0, found[name], ["torchvision: no torchvision"])

    monkeypatch.setattr(harness_run, "run_script", run_script)
    options = harness_run.RunOptions(names=("step", "pair"), out=tmp_path, quick=True)
    (tmp_path / "pair-quick.json").write_text("last")
    assert harness_run.run_all(options) == 1
    said = capsys.readouterr().out
    assert "no results: error: out of memory" in said
    assert "torchvision: no torchvision" in said
    assert "no earlier results to compare with" in said
    assert (tmp_path / "pair-quick.json").read_text() == "last"
    found["step"] = results(duet=[80.0, 81, 82], other=[1.0] * 3)
    harness_run.run_all(options)
    said = capsys.readouterr().out
    assert "duet: 101 img/s -> 81 img/s (-19.8%, noise 3.0%): worse" in said
    assert "0 of 1 figures as on 2026-12-01" in said


def test_a_script_that_fails_gives_the_last_line_that_it_printed():
    broken = harness_run.run_script("metadata", ["--samples", "5"], 60)
    assert broken.found is None
    assert broken.lines == ["error: --samples 5 is not one shard of 10000"]


def test_a_quick_benchmark_from_end_to_end(tmp_path, capsys, monkeypatch):
    options = harness_run.RunOptions(names=("plan",), out=tmp_path)
    small = harness_run.Benchmark(title="small", arguments="--images 20000")
    monkeypatch.setitem(harness_run.BENCHMARKS, "plan", small)
    assert harness_run.run_all(options) == 0
    found = page.read_results(tmp_path / "plan.json")
    assert found["settings"] == {"images": 20000.0}
    assert found["command"] == "python benchmarks/plan.py --images 20000"
    assert found["figures"]["planning"]["rounds"][0] > 0
    assert found["machine"]["memory_gib"] > 0
    assert found["tables"]["plan"]["rows"][0][0] == "20,000 listed"
    assert "plan (small)" in capsys.readouterr().out


def test_ways_take_turns_and_every_second_round_is_reversed():
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert take_turns(ways, 2, warm_up=1) == {"a": [4, 5], "b": [3, 6]}
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert order_round({"x": 1, "y": 2}, 1) == ["y", "x"]


def test_a_peak_is_the_greatest_reading():
    readings, done = iter([1, 5, 2]), threading.Event()

    def read() -> int:
        if (found := next(readings, None)) is None:
            done.set()
        return found or 0

    with MemoryPeak(read, every=0.001) as peak:
        assert done.wait(10)
    assert peak.bytes == 5


def test_a_way_of_packing_that_breaks_is_a_row_and_ratios_are_within_rounds(tmp_path, monkeypatch):
    """Ours takes 2 s, then 4 s; the plain way twice as long; litData breaks in its first turn."""
    seconds = {"ours": iter((1, 1, 3, 5)), "plain": iter((1, 1, 5, 9))}

    def run_turn(row: Any, images: Any, out: Path) -> Any:
        if row.name == "litdata":
            raise SetupError("litdata failed: no room")
        return build.Turn(float(next(seconds[row.name])), 1.0 if images.count == 1 else 3.0)

    monkeypatch.setattr(build, "run_turn", run_turn)
    monkeypatch.setattr(
        build, "link_images", lambda images, folder, repeat: build.ImageSet(folder, folder, repeat)
    )
    options = build.BuildOptions(images=tmp_path, rounds=2, repeat=5)
    rows = [build.BuilderRow(name, BUILDERS[name], 2) for name in ("ours", "plain", "litdata")]
    found = build.collect_facts(rows, build.measure(rows, options, tmp_path), options)
    assert found["ways"]["litdata"]["missing"] == "litdata failed: no room"
    assert found["ways"]["plain"]["ours_over_it"] == [2.0, 2.0]
    table = build.make_table(found)
    assert [row[0] for row in table.rows] == ["**pipeline.build_shards**", BUILDERS["plain"].title]
    assert table.rows[1][5:] == ("2.00x", "500.00", "1.00x")
    assert len(table.head) == len(table.rows[0])


def test_openings_are_shown_by_medians_and_kept_by_rounds():
    openings = [order.Opening(1.0, 2.0, 10**6), order.Opening(3.0, 7.0, 3 * 10**6)]
    parts = [order.Parts(0.1, 0.2, 0.3, 0.4)]
    tables = order.make_tables({}, {"20,000": {"full": openings, "parts": parts}}, {})
    assert tables["order-openings"].rows == [("20,000", "full", "2.00", "4.50", "2")]
    assert tables["order-openings"].notes == [
        "20,000, full shuffle, each part alone: manifest 0.10 s, shards 0.20 s, index 0.30 s, "
        "order 0.40 s."
    ]


def test_a_way_of_packing_that_is_not_installed_is_a_row_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    rows = {row.name: row for row in build.select_builders(build.BuildOptions(images=tmp_path))}
    for name in ("litdata", "hf", "img2dataset", "opencv"):
        builder = rows[name].builder
        assert rows[name].missing == f"not installed (pip install {builder.library})"
        assert (ROOT / "benchmarks" / "builders" / f"{builder.program}.py").is_file()
    assert not rows["ours"].missing
    assert not rows["plain"].missing
