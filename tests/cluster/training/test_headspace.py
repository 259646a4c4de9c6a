"""`cluster.train --measure` below Ray: where a step's time goes."""

from __future__ import annotations

import json
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cluster.launch.measurement import format_measurement, split_step
from cluster.mesh import ProcessMesh, create_mesh
from cluster.run.events import Measured
from cluster.train import parse_command
from cluster.training import profiler
from pipeline.stream.shard_reader import ShardReader
from pipeline.throughput import stream_rate
from pipeline.tools.errors import UsageError
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import CONFIG


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    shorten(monkeypatch.setattr)


def shorten(put) -> None:
    """Measure for less time, and pack no raw images (test_command.py does)."""
    put(profiler, "SECONDS", 0.6)
    examine = profiler.examine
    put(profiler, "examine", lambda *a, **k: examine(*a, seconds=0.05, **k))
    put(stream_rate, "measure_raw", raise_no_room)
    put(profiler, "create_meter", lambda _: (SteadyMeter(), "host"))


class SteadyMeter(nullcontext):
    watts = 50.0


def raise_no_room(*_):
    raise OSError


def measure_with(config, data, mesh) -> dict:
    told = []
    profiler.measure(config, str(data), mesh, told.append)
    (event,) = told
    assert isinstance(event, Measured)
    return event.found


@pytest.mark.slow
def test_the_parts_of_a_step_add_up_and_a_slow_disk_is_found(tiny_data, monkeypatch):
    read = ShardReader.read

    def slow(self, ids, buffer=None):
        time.sleep(delay)
        self._reading += delay
        return read(self, ids, buffer)

    # Settings that would end in a loss that is no number, or go with another schedule only.
    wild = replace(
        CONFIG, lr=1e30, schedule="manual", changes=("1 lr 0.1",), layer_rates=("conv1=0",)
    )
    fast = measure_with(wild, tiny_data, ProcessMesh())
    # Slow beside what this machine computes, even if others keep it much busier than just now.
    delay = max(0.6, 10 * fast["step"]["wall"])
    examined = SimpleNamespace(to_table=lambda: fast["report"])
    monkeypatch.setattr(profiler, "examine", lambda *_, **__: examined)
    monkeypatch.setattr(ShardReader, "read", slow)
    late = measure_with(CONFIG, tiny_data, ProcessMesh())
    for found in (fast, late):
        assert found["step"]["accounted"] == pytest.approx(1, abs=0.03)
        assert sum(split_step(found).values()) == pytest.approx(found["step"]["wall"], rel=0.03)
        assert found["replayed"]["parts"]["wait_storage"] == 0
        assert found["joules_per_image"] == pytest.approx(50 / found["img_s"])
        json.dumps(found)  # travels, and is written
    assert late["step"]["parts"]["wait_storage"] > 0.5 * late["step"]["wall"]
    assert late["stall"] > 0.5
    assert late["stall"] == pytest.approx(1 - late["au"])
    assert fast["au"] > late["au"]
    assert fast["stream_img_s"] > 3 * late["stream_img_s"]
    assert late["stream_img_s"] < 8 / delay * 1.1
    text = "\n".join(format_measurement(late | {"steady": True}))
    assert "waiting for storage" in text
    assert f"stall {late['stall']:.1%}" in text
    assert late["steady"]


def test_rates_are_told_for_the_job_or_a_worker_and_wild_turns_give_no_verdict():
    found = {
        "workers": 2, "img_s": 261.0, "replayed_img_s": 302.0, "stream_img_s": 2077.0,
        "step": {"wall": 0.2, "parts": dict.fromkeys(profiler.PARTS, 0.03), "accounted": 0.9},
        "replayed": {"parts": {"compute": 0.03}}, "au": 0.87, "stall": 0.13,
        "spread": (0.85, 0.88), "steady": True, "others": 0.0,
        "watts": None, "joules_per_image": None,
        "report": {"verdict": "One worker of 2, alone: X", "setting": {"device": "cpu"}},
    }  # fmt: skip
    text = format_measurement(found)
    assert text[0] == "a step takes 200.0 ms (the job of 2 workers: 261 img/s):"
    assert "the job on batches that lie ready: 302 img/s" in "\n".join(text)
    assert "the job's stream alone: 2,077 img/s, 6.9 times" in "\n".join(text)
    assert text[-1] == "One worker of 2, alone: X"
    assert "energy" not in "\n".join(text)
    for device, source in (("cpu", "the CPU's counter"), ("gpu", "the driver's power reading")):
        report = {"verdict": "X", "setting": {"device": device}}
        power = {"watts": 522.0, "joules_per_image": 2.0, "report": report}
        line = f"energy of an image: 2 J (522 W at 261 img/s, by {source})"
        assert line in format_measurement(found | power)
    wild = "\n".join(format_measurement(found | {"spread": (0.78, 2.56), "steady": False}))
    assert "no verdict: steps on batches that lie ready took 78% to 256%" in wild
    for word in ("utilisation", "stall", "times what", "One worker"):
        assert word not in wild


def test_a_gpus_power_is_the_mean_of_the_readings_within_turns(monkeypatch):
    started, answers = threading.Event(), iter([300.0, 500.0, None])
    short = profiler.GpuMeter(lambda: 300.0)
    with short:  # a reading would be of the second before the turn
        pass
    assert short.watts is None
    monkeypatch.setattr(profiler, "LAG", 0)
    monkeypatch.setattr(profiler, "EVERY", 0)

    def read() -> float | None:
        watts = next(answers, 900.0)
        if watts in (None, 900.0):
            started.set()
        if watts == 900.0:
            time.sleep(0.05)  # ends after the turn
        return watts

    meter = profiler.GpuMeter(read)
    for _ in range(2):
        started.clear()
        with meter:
            assert started.wait(10)
    assert meter.watts == 400.0


def test_the_cpus_power_is_the_counters_joules_over_the_seconds_of_turns(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 12.0, 20.0, 99.0])
    monkeypatch.setattr(profiler, "time", SimpleNamespace(perf_counter=clock.__next__))
    top = 10**9
    readings = iter([
        [(0, top), (5, top)], [(60_000_000, top), (40_000_005, top)],  # 100 J in 2 s
        [(top - 10**8, top), (0, top)], [(10**8, top), (0, top)],  # one starts again: 200 J in 2 s
        [(0, top), (0, top)], [],  # not counted
    ])  # fmt: skip
    meter = profiler.CpuMeter(readings.__next__)
    assert meter.watts is None
    for _ in range(3):
        with meter:
            pass
    assert meter.watts == 75.0


def test_a_jobs_power_counts_a_meter_once_and_none_if_one_is_missing():
    def sum_of(*workers):
        return profiler.sum_power([SimpleNamespace(watts=w, meter=m) for w, m in workers])

    assert sum_of((300.0, "GPU a"), (200.0, "GPU b")) == 500.0
    assert sum_of((80.0, "host"), (80.0, "host"), (70.0, "other")) == 150.0
    assert sum_of((300.0, "GPU a"), (None, "GPU b")) is None


def run_rank(rank: int, folder: Path, data: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shorten(setattr)
    mesh = create_mesh([(0, 1)], torch.device("cpu"), cores=1)
    events = []
    profiler.measure(replace(CONFIG, batch_size=16), str(data), mesh, events.append)
    assert len(events) == (1 if mesh.is_leader else 0)
    if mesh.is_leader:
        (folder / "found.json").write_text(json.dumps(events[0].found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_pair_measures_its_exchange(tiny_data, tmp_path):
    run_ranks(run_rank, (tmp_path, tiny_data), 2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["workers"] == len(found["each"]) == 2
    assert found["watts"] == 50.0  # of the host that both are on
    assert found["each"][0]["exchange_bytes"] > 0
    row = next(one for one in found["report"]["stages"] if one["name"] == "pair exchange")
    assert row["img_s"] > 0
    assert row["bytes_s"] / row["img_s"] == pytest.approx(
        found["each"][0]["exchange_bytes"] / 16, rel=0.01
    )
    assert found["report"]["setting"]["batch_size"] == 8  # a worker's half
    assert found["report"]["verdict"].startswith("One worker of 2, alone: ")
    assert found["report"]["needed"] == pytest.approx(found["replayed_img_s"] / 2, rel=1e-3)
    # A step of this net is so short that the vote on whether to end is some percent of it.
    assert 0.85 < found["step"]["accounted"] <= 1.001
    assert sum(split_step(found).values()) == pytest.approx(found["step"]["wall"], rel=0.03)


def test_a_tuning_file_is_between_the_config_and_the_flags(tmp_path):
    config, tuning = tmp_path / "c.toml", tmp_path / "tuning.toml"
    config.write_text("threads = 1\nprefetch = 2\nwidth = 0.5\n")
    tuning.write_text("# found\nthreads = 3\nprefetch = 4\n")
    words = [str(config), "--data", "d", "--run", "r", "--tuning", str(tuning)]
    settings = parse_command(words).settings
    assert (settings.threads, settings.prefetch, settings.design.width) == (3, 4, 0.5)
    assert parse_command([*words, "--threads", "5"]).settings.threads == 5
    tuning.write_text("treads = 3\n")
    with pytest.raises(UsageError, match=r"tuning.toml: no setting 'treads'; did you mean"):
        parse_command(words)
    with pytest.raises(UsageError, match="prefetch is 0; it must be from 1 to 1000"):
        parse_command([*words[:5], "--prefetch", "0"])
    with pytest.raises(UsageError, match=r"hw_decoder_load is 2.0; it must be from 0 to 1"):
        parse_command([*words[:5], "--hw-decoder-load", "2"])


def test_the_energy_of_each_cpu_package_is_read_or_of_none(tmp_path):
    assert profiler.read_cpu_energy(tmp_path / "none") == []
    for zone, *texts in (
        ("intel-rapl:0", "package-0", "100", "900"),
        ("intel-rapl:0:0", "core", "60", "900"),
        ("intel-rapl:1", "package-1", "200", "900"),
        ("intel-rapl:2", "psys", "500", "900"),
        ("intel-rapl-mmio:0", "package-0", "100", "900"),
    ):
        (tmp_path / zone).mkdir()
        for file, text in zip(("name", "energy_uj", "max_energy_range_uj"), texts, strict=True):
            (tmp_path / zone / file).write_text(text)
    assert profiler.read_cpu_energy(tmp_path) == [(100, 900), (200, 900)]
    (tmp_path / "intel-rapl:1/energy_uj").unlink()  # as a file that only root may read
    assert profiler.read_cpu_energy(tmp_path) == []
