"""The command of the third door, from the outside."""

from __future__ import annotations

import json
import re
import sys
from html import unescape

import pytest

from pipeline.dataset.manifest import identity, version_folder
from pipeline.throughput.__main__ import main
from pipeline.throughput.model import MEANING, UNSTEADY
from pipeline.throughput.report import load_report, write_page
from pipeline.throughput.stages import Setting, open_parts
from pipeline.throughput.stream_rate import measure_rate
from pipeline.tools.errors import DuetError, UsageError
from tests.helpers.processes import call_command
from tests.helpers.versions import append_samples

COMMAND = [sys.executable, "-m", "pipeline.throughput"]
QUICK = ("--batch-size", 8, "--seconds", 0.1)


def call(*arguments):
    return call_command([*COMMAND, *arguments])


@pytest.fixture(scope="module")
def examined(tiny_data, tmp_path_factory):
    """The folder of an examination of the tiny set, and its JSON."""
    out = tmp_path_factory.mktemp("examined")
    done = call(tiny_data, *QUICK, "--out", out, "--img-s", 1e9, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_every_stage_is_measured_against_a_limit(examined):
    _, table, _ = examined
    rows = {row["name"]: row for row in table["stages"]}
    assert {"storage, page cache", "checksum", "feed", "decode", "normalise", "hand-over"} <= set(
        rows
    )
    for name in ("storage, page cache", "checksum", "decode", "normalise"):
        row = rows[name]
        assert row["share"] == pytest.approx(row["img_s"] / row["limit_img_s"], rel=1e-3)
        assert row["share"] <= 1
        assert row["img_s"] > 100
        assert row["bytes_s"] > 0
        assert row["against"]
    # No stage alone is slower than all of them together (by more than noise).
    assert min(row["img_s"] for row in rows.values()) > 0.5 * table["whole"]["img_s"]


def test_the_verdict_names_the_bound_the_next_one_and_the_trainer(examined):
    _, table, text = examined
    first, second = table["bounds"][0], table["bounds"][1]
    assert first[1] <= second[1]
    assert f"{first[1]:,.0f} img/s" in table["verdict"]
    assert "would stand still 100% of the time" in table["verdict"]
    assert "what could be" in text
    names = [one["name"] for one in table["remedies"]]
    assert sorted(names) == [
        "batch", "block shuffle", "cache", "hardware decoder", "prefetch depth", "raw encoding",
        "threads",
    ]  # fmt: skip
    gains = [one["gain"] or 0 for one in table["remedies"]]
    assert gains == sorted(gains, reverse=True)


def test_the_page_needs_nothing_else_and_shows_all_of_it(examined):
    out, table, _ = examined
    page = (out / "throughput.html").read_text()
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", page)
    for row in (*table["stages"][:-1], table["whole"]):
        assert row["name"] in page
    assert page.count("<svg") == 2
    assert json.loads((out / "throughput.json").read_text())["whole"] == table["whole"]


def test_the_page_has_one_headline_and_three_points(examined, tmp_path):
    _, table, _ = examined
    first, second = table["bounds"][:2]
    remedy = {"name": "threads", "change": "2 -> 3", "img_s": 200.0, "gain": 2.0, "note": "x"}
    for sure, note in ((True, "x"), (False, f"x; {UNSTEADY}"), (False, "no more than noise")):
        given = {**table, "remedies": [remedy | {"sure": sure, "note": note}], "state": "From <s>,"}
        write_page(tmp_path / "x.html", given)
        page = (tmp_path / "x.html").read_text(encoding="utf-8")
        head = page[page.index("<header>") : page.index("</header>")]
        assert f"{table['img_s']:,.0f} <small>img/s, limited by {MEANING[first[0]]}" in unescape(
            head
        )
        assert "From &lt;s&gt;: " in head
        points = re.findall("<li[^>]*>.*?</li>", head, re.DOTALL)
        assert len(points) == 3
        assert f"{second[1]:,.0f} img/s" in points[0]
        assert "threads, 2 -&gt; 3" in points[1]
        assert ('class="unsure"' in points[1]) == (not sure)
        assert ("not steady, so it is no promise" in points[1]) == (UNSTEADY in note)
        assert "µs of a core" in points[2]
        assert ('<tr class="unsure">' in page) == (not sure)
        assert page.count("<summary>") == 4
    write_page(tmp_path / "x.html", {**table, "remedies": []})
    assert "none of the settings would change it" in (tmp_path / "x.html").read_text()


def test_a_comparison_tells_noise_from_a_regression(
    examined, tiny_data, tmp_path, monkeypatch, capsys
):
    def no_room(*_):
        raise OSError

    monkeypatch.setattr("pipeline.throughput.stream_rate.measure_raw", no_room)
    out, table, _ = examined
    table = json.loads((out / "throughput.json").read_text())
    table["whole"]["img_s"] *= 100
    old = tmp_path / "old.json"
    old.write_text(json.dumps(table))
    arguments = [tiny_data, *QUICK, "--out", tmp_path, "--compare", old]
    with pytest.raises(DuetError, match=f"the stream is slower than in {old}") as regression:
        main([str(argument) for argument in arguments])
    assert regression.value.exit_code == 1
    assert "the whole stream: " in capsys.readouterr().err
    assert (tmp_path / "throughput.json").is_file()


def test_bad_input_is_one_line(tiny_data, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    for arguments, text in (
        ((), "name a data set"),
        ((tmp_path,), "has no manifest.json"),
        ((tiny_data, "--threads", 0), "--threads 0 is out of range; give 1 or more"),
        ((tiny_data, "--threads", 5000), "threads is 5000; it must be from 0 to 1024"),
        ((tiny_data, "--out", tmp_path / "none"), "is no folder"),
        ((tiny_data, "--compare", tmp_path / "no.json"), "is no report"),
        ((tiny_data, "--compare", tmp_path / "none.json"), "cannot be read"),
        ((tiny_data, "--reader", "native"), "goes with --rate"),
        ((tiny_data, "--split", "test"), "no split 'test'"),
        (("--plan",), "--plan needs --img-s"),
        ((tiny_data, "--rate", "--tune"), "--rate and --tune exclude each other"),
        ((tiny_data, "--rate", "--compare", "x.json"), "not with --rate"),
        ((tiny_data, "--measured", "x.json"), "--measured goes with --plan only"),
        ((tiny_data, "--ledger", tmp_path / "l"), "--ledger goes with --rate only"),
        (("--plan", "--img-s", 5, "--images", "-1"), "--images -1 is out of range"),
        (("--plan", "--img-s", "-3"), "--img-s is -3.0; it must be above 0"),
    ):
        with pytest.raises(UsageError) as refused:
            main([str(argument) for argument in arguments])
        assert text in str(refused.value)
        assert "\n" not in str(refused.value)
    done = call(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")


def test_planning_needs_no_data_set(tmp_path, examined, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--plan", "--gpus", "16", "--img-s", "20000", "--store", "s3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {one["source"] for one in answer["figures"]} == {"given", "assumed"}
    out, table, _ = examined
    monkeypatch.chdir(out)
    assert main(["--plan", "--gpus", "16", "--img-s", "20000", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    figures = {one["name"]: one for one in answer["figures"]}
    assert figures["bytes of an image"]["source"] == "measured"
    assert figures["images in an epoch"]["value"] == table["data"]["pictures"]


def test_a_plan_takes_a_report_it_finds_only_if_it_is_of_this_machine_and_data(
    tmp_path, examined, data, monkeypatch, capsys
):
    out, table, _ = examined
    where = table["data"]["where"]
    monkeypatch.chdir(tmp_path)
    plan = ["--plan", "--img-s", "20000", "--json"]

    def put(part: str, **changes: object) -> None:
        found = json.loads((out / "throughput.json").read_text())
        found[part] |= changes
        (tmp_path / "throughput.json").write_text(json.dumps(found))

    put("data")
    for words in ([], [where], [str(data)]):  # a copy is the same data set
        assert main([*plan, *words]) == 0
        assert f"from throughput.json: {where} on " in capsys.readouterr().err
    for part, changes, words, text in (
        ("machine", {"processor": "Z80"}, [], "processor Z80"),
        ("machine", {"cores": 999}, [where], "cores 999"),
        ("machine", {"gpu": "H200"}, [where], "gpu H200, and this one has none"),
        ("data", {"sha256": "ab" * 32}, [], "another data set than"),
        ("data", {"sha256": "ab" * 32}, [where], "another data set than"),
        ("data", {"where": "/nowhere"}, [], "/nowhere, which cannot be looked at"),
        ("data", {"where": "s3://key:secret@bucket/set"}, [], "which cannot be looked at"),
    ):
        put(part, **changes)
        with pytest.raises(UsageError, match=text) as refused:
            main([*plan, *words])
        assert "use it all the same by --measured throughput.json" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "secret" not in str(refused.value)
        assert main([*plan, "--measured", "throughput.json"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("data", {}), ("data", []), ("machine", None), ("whole", {"img_s": 0}), ("stages", 3),
        ("stages", [{}]), ("stages", [3]), ("setting", "x"), ("version", 7), ("version", []),
    ],
)  # fmt: skip
def test_a_report_with_something_else_in_it_is_one_line(examined, tmp_path, part, value):
    table = json.loads((examined[0] / "throughput.json").read_text()) | {part: value}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(table))
    with pytest.raises(UsageError, match=r"old\.json is (no report|of version)"):
        load_report(path)


@pytest.mark.parametrize("reader", ["stream", "native"])
def test_both_readers_are_measured(tiny_data, reader):
    setting = Setting(data=str(tiny_data), batch_size=8, threads=1)
    rates = measure_rate(setting, reader=reader, windows=3, batches=2)
    assert len(rates) == 3
    assert min(rates) > 1  # img/s: anything slower than that is a stall


def test_the_rate_alone_is_one_object(tiny_data, tmp_path):
    small = ["--windows", 2, "--batches", 2, "--batch-size", 8]
    done = call(tiny_data, "--rate", "--json", *small, "--ledger", tmp_path / "ledger")
    facts = json.loads(done.stdout)
    assert facts["img_s"] > 0
    assert "img/s (windows" in done.stderr
    assert list((tmp_path / "ledger").iterdir())


def test_an_older_version_is_measured(data, more_data, tmp_path, monkeypatch, capsys):
    append_samples(data, more_data)
    monkeypatch.chdir(tmp_path)
    assert main([str(data), "--data-version", "1", *map(str, QUICK), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = identity(data / version_folder(1))
    assert found["data"]["sha256"] == first != identity(data)
    assert found["data"]["pictures"] == 48
    assert main(["--plan", "--img-s", "20000"]) == 0  # the report is of the set as it is
    rate = [str(data), "--data-version", "1", "--rate", "--reader", "native", "--batches", "1"]
    assert main([*rate, "--windows", "2", "--batch-size", "8", "--json"]) == 0
    setting = Setting(data=str(data), version=first, batch_size=8)
    with open_parts(setting) as parts:
        assert parts.dataset.folder == data / version_folder(1)
    with pytest.raises(UsageError, match="--data-version one is no version; give its number"):
        main([str(data), "--data-version", "one"])


def test_dalis_reader_reads_no_store():
    with pytest.raises(UsageError, match="native reads local shards only, not s3://"):
        measure_rate(Setting(data="s3://bucket/set"), reader="native", windows=1, batches=1)


def test_verify_refuses_an_address_in_one_line():
    command = [sys.executable, "-m", "pipeline.verify", "https://host/set"]
    done = call_command(command)
    assert done.returncode == 2
    assert done.stderr == (
        "error: verify reads local folders, and https://host/set is an address\n"
    )
