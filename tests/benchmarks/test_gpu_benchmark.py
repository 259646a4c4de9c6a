"""`benchmarks/gpu`: its search, its arithmetic, its sets, and a run of all its steps on the CPU."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(FOLDER))

from parts import clock, copies, damage, lanes, machine, pixels, search, table  # noqa: E402
from parts.lanes import Setting  # noqa: E402
from parts.record import Record  # noqa: E402

from tests.helpers.processes import run_command  # noqa: E402

START = Setting(threads=4, load=0.5, prefetch=2, batch=128)
AXES = {"load": (0.0, 0.5, 1.0), "threads": (2, 4, 8), "batch": (128, 256)}


@pytest.fixture(scope="module")
def script():
    """The entry point, under a name that is not that of another module."""
    spec = importlib.util.spec_from_file_location("gpu_stream", FOLDER / "stream.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_stream"] = module
    spec.loader.exec_module(module)
    return module


def test_the_search_finds_a_peak_that_one_axis_alone_hides():
    # Eight threads pay only with a load of 0, which with four threads is worse than 0.5.
    def rate(setting: Setting) -> float:
        asked.append(setting)
        base = {2: 10, 4: 20, 8: 15 if setting.load else 40}[setting.threads]
        return base - 4 * abs(setting.load - 0.5) + setting.batch / 128

    asked: list[Setting] = []
    best = search.climb(replace(START, threads=8), AXES, rate, lambda: True)
    assert best == Setting(threads=8, load=0.0, prefetch=2, batch=256)
    assert len(asked) == len(set(asked))


def test_the_search_ends_with_the_time_and_passes_over_what_does_not_work():
    rates = {0.5: 7.0, 0.0: 0.0, 1.0: 9.0}
    left = iter([True, True, False])
    best = search.climb(
        START, {"load": (0.0, 1.0), "batch": (64,)}, lambda s: rates[s.load], lambda: next(left)
    )
    assert best == replace(START, load=1.0)


def test_differences_are_counted_in_grey_levels():
    wanted = torch.zeros(4, 3, 16, 16, dtype=torch.float16)
    found = wanted.clone()
    found[1, 0, 0, :2] = torch.tensor([6.0, -2.0])
    row = pixels.measure_difference(found, wanted)
    assert (row["samples"], row["differing"]) == (4, 1)
    assert (row["max"], row["mean"], row["bias"]) == (6.0, round(8 / 3072, 4), round(4 / 3072, 4))
    assert row["quantiles"]["0.99"] == 0
    assert row["quantiles"]["0.9999"] == np.quantile(  # NumPy's own, no interpolation
        (found - wanted).abs().float().numpy(), 0.9999, method="inverted_cdf"
    )
    assert pixels.is_within_bounds(row)
    assert not pixels.is_within_bounds(pixels.measure_difference(wanted + 1, wanted))


def test_a_repeated_set_holds_the_same_images_again(tiny_data, tmp_path):
    data = copies.repeat_data(tiny_data, tmp_path / "more", 100)
    assert Manifest.load(data).splits["train"].samples == 144
    first, again = copies.read_samples(tiny_data, 48), copies.read_samples(data, 144)
    assert all(np.array_equal(a, b) for a, b in zip(3 * first, again, strict=True))
    batches = lanes.native(data, "cpu", replace(START, threads=1, batch=8))
    assert next(batches).shape == (8, 3, 224, 224)
    batches.close()
    assert copies.repeat_data(tiny_data, tmp_path / "same", 48) == tiny_data


def test_a_raw_set_holds_what_pillow_decodes(tiny_data, tmp_path):
    data = copies.make_raw(tiny_data, tmp_path / "raw")
    jpegs = copies.read_samples(tiny_data, 48)
    wanted = torch.stack(
        [torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg.tobytes())))) for jpeg in jpegs]
    ).permute(0, 3, 1, 2)
    with Stream(data, batch_size=48, once=True, crop="whole") as stream:
        found = next(stream).images + torch.tensor(stream.channel_mean)[:, None, None]
    assert (found - wanted).abs().max() < 1e-3


def test_one_edited_image_reaches_the_decoder(tiny_data, tmp_path):
    edit = damage.EDITS["second half missing"]
    data = copies.damage_sample(tiny_data, tmp_path / "cut", 20, 7, edit)
    with Stream(data, batch_size=20, once=True) as stream:
        next(stream)
        assert list(stream.damaged) == [7]


def test_a_process_that_does_not_end_is_ended_and_told(tiny_data, monkeypatch):
    monkeypatch.setattr(damage, "SECONDS", 0.1)
    (row,) = damage.try_damage(tiny_data, "cpu", [0.0])
    assert (row["load"], row["case"], row["exit_code"]) == (0.0, "the process itself", -9)


def test_a_window_counts_what_comes_after_the_warm_up(monkeypatch):
    def batches():
        while True:
            now[0] += 0.01
            yield None

    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    row = clock.measure_window(batches(), replace(START, batch=32), 1.0, None)
    assert row["img_s"] == pytest.approx(3200, rel=0.02)


def test_a_lane_that_fails_leaves_a_row(tiny_data):
    row = clock.measure_once(lambda setting: (_ for _ in ()), START, 0.1, None)
    assert "img_s" not in row
    assert row["error"].startswith("RuntimeError") or row["error"].startswith("StopIteration")


def test_a_run_that_is_cut_off_has_said_so(tmp_path):
    machine = {"gpu": "NVIDIA H100", "date": "today", "cpu": "x"}
    record = Record(tmp_path, machine, "command", table.markdown)
    record.add("sweep", {"lane": "ours", "error": "out of memory"} | vars(START))
    record.add("sweep", {"lane": "ours", "img_s": 31234.5, "cores": 9.5} | vars(START))
    assert len(json.loads(record.path.read_text())["sweep"]) == 2
    page = record.path.with_suffix(".md").read_text()
    assert record.path.name.endswith("-nvidia-h100.json")
    assert "Cut off" in page
    assert "| ours | 4 | 0.5 | 2 | 128 | **31,234** | 9.5 |" in page
    record.put("finished", True)
    assert "Cut off" not in record.path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_every_step_runs_on_a_cpu(tiny_data, tmp_path):
    flags = "--device cpu --minutes 0.05 --seconds 0.05 --rounds 1 --samples 48 --checked 24"
    small = "--threads 1 --batch 8"
    done = run_command(
        [sys.executable, FOLDER / "stream.py", tiny_data, *flags.split(), *small.split(),
         "--out", tmp_path, "--skip", "damage"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["finished"]
    assert all(row["differing"] == 0 for row in found["pixels"])
    assert {row["set"] for row in found["pixels"]} == {"jpeg", "raw"}
    assert found["sweep"][0]["img_s"] > 0
    assert [len(rows) for rows in found["turns"].values()] == [1, 1]


def test_on_a_gpu_each_load_is_judged(script, tiny_data, tmp_path, monkeypatch):
    # There is none here: the pixels are those of the CPU, and one load is told to differ.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    compare = pixels.compare

    def told(data, device, setting, samples, host):
        rows = compare(data, device, setting, samples, host)
        rows[2]["differing"] = 3 if setting.load in (0.65, 1.0) else 0
        return rows

    monkeypatch.setattr(pixels, "compare", told)
    options = script.Options(
        data=tiny_data, device="cpu", samples=48, checked=8, threads=1, batch=8, rounds=1,
        seconds=0.02, minutes=0.1,
    )  # fmt: skip
    record = Record(tmp_path / "out", machine.facts("cpu"), "", table.markdown)
    bench = script.Bench(options, record, tmp_path)
    bench._gauge = machine.Gauge()
    bench.pixels()
    bench.turns()
    bench.exact()
    with monkeypatch.context() as broken:
        broken.setattr(damage, "try_damage", lambda *_: 1 / 0)
        bench.take("damage")
    assert record.found["goals"].pop() == {
        "goal": "step damage went to its end",
        "found": "ZeroDivisionError: division by zero",
        "met": False,
        "check": True,
    }
    goals = {goal["goal"]: goal["met"] for goal in record.found["goals"]}
    assert goals.pop("at least 30,000 img/s") is False
    assert goals.pop("at least 0.95 of DALI's reader") in (True, False)
    assert goals == {
        "jpeg pixels, load 0: those of the CPU": True,
        "jpeg pixels, load 1: those of the CPU": True,
        "jpeg pixels, load 0.65: those of the CPU": True,
        "jpeg pixels, load 0: the same every time": True,
        "jpeg pixels, load 1: the same every time": False,
    }
    assert set(record.found["exact"]) == {"load 0", "load 1", "load 0.65"}
    assert "| load 0 |" in table.markdown(record.found)
