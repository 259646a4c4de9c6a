"""Rows of a training: timed without what is no training, and published."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.mesh import CPU, ProcessMesh
from cluster.run.folder import Mark
from cluster.run.jsonl import WAITS
from cluster.run.metrics import METRICS, MetricsLog
from model.exchange import Traffic
from model.schedule import Rates
from model.timing import Stopwatch
from pipeline.stream.timing import WaitTimes
from tests.helpers.fake_cuda import FakeDevice

MARK = Mark(step=1, position=8)
RATES = Rates(0.1, 0.2)
CUDA = torch.device("cuda")
VALUES = torch.tensor([1.5, 0.25, 0.0])


def take_all(spans: list) -> list:
    taken = spans.copy()
    spans.clear()
    return taken


def slow_validation() -> dict[str, float]:
    time.sleep(0.3)
    return {"loss": 1.0, "top1_error": 0.25, "top5_error": 0.0}


def test_time_for_validation_and_checkpoints_is_not_time_of_a_step(tmp_path):
    with MetricsLog(tmp_path, ProcessMesh(), lambda event: None, samples=40, step=0) as log:
        for step in (1, 2):
            with log.waiting(WaitTimes()):
                time.sleep(0.02)
            time.sleep(0.02)
            log.step(
                Mark(step=step, position=8 * step),
                Config(),
                Rates(0.1, 0.2),
                torch.tensor([1.5, 0.25, 0.0]),
            )
            with log.paused():
                time.sleep(0.3)
            log.validation(Mark(step=step, position=8 * step), slow_validation)
    first, second = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    for row in (first, second):
        assert 0.04 <= row["seconds"] < 0.3
        assert 0.1 < row["data_wait"] < 0.9
        assert 1e7 < row["memory"] < 1e11  # a process that has loaded torch
    assert (second["loss"], second["top1_error"], second["epoch"]) == (1.5, 0.25, 0.4)
    assert (second["lr"], second["lr_bias"], second["position"]) == (0.1, 0.2, 16)


def test_only_the_leader_writes(tmp_path):
    mesh = ProcessMesh(replica=1, replicas=2)
    with MetricsLog(tmp_path, mesh, pytest.fail, samples=40, step=0) as log:
        log.step(
            Mark(step=1, position=8), Config(), Rates(0.1, 0.2), torch.tensor([1.5, 0.25, 0.0])
        )
        assert log.validation(Mark(step=1, position=8), slow_validation) == 0.25
    assert list(tmp_path.iterdir()) == []


def test_a_step_says_what_training_stood_still_for(tmp_path):
    traffic = {"conv3": Traffic(forward=10), "fc6": Traffic(backward=5)}
    waits: list[tuple[float, float]] = [(0.0, 0.5), (1.0, 1.25)]
    link: Any = SimpleNamespace(
        traffic=traffic, waits=SimpleNamespace(take=lambda: take_all(waits))
    )
    with MetricsLog(tmp_path, ProcessMesh(), lambda event: None, samples=40, step=0) as log:
        for _ in range(2):
            with log.waiting(WaitTimes()):
                time.sleep(0.05)
            time.sleep(0.05)
            log.step(MARK, Config(), RATES, VALUES, link)
            waits.append((2.0, 3.0))
            traffic["fc6"].forward += 7
            with log.saving():
                time.sleep(0.1)
            with log.paused():  # what crosses in a validation is not the next step's
                waits.append((3.0, 103.0))
                traffic["conv3"].forward += 1000
    first, second = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert (first["exchange"], second["exchange"]) == (0.75, 1.0)
    assert (first["exchange_bytes"], second["exchange_bytes"]) == (15, 7)
    assert first["saving"] == 0
    assert second["saving"] >= 0.1
    assert first["stall"] == first["data_wait"]
    # Of a step of two sleeps one is a wait, whatever a busy machine adds to either.
    assert 0.049 < first["stall"] * first["seconds"] < first["seconds"] - 0.049
    stood = second["data_wait"] * second["seconds"] + second["saving"]
    assert second["stall"] == pytest.approx(
        stood / (second["seconds"] + second["saving"]), abs=0.01
    )


def test_numbers_are_published_until_somebody_cannot_take_them(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.run.metrics.PUBLISH_EVERY", 0.0)
    told: list = []
    got: list = []

    def broken(step: int, numbers: object) -> None:
        raise ConnectionError("nobody there")

    mesh = ProcessMesh(replica=1, replicas=2)  # every process publishes its own
    publish = (broken, lambda step, numbers: got.append((step, dict(numbers))))
    with MetricsLog(tmp_path, mesh, told.append, samples=40, step=0, publish=publish) as log:
        for step in (1, 2):
            log.step(Mark(step=step, position=8 * step), Config(), RATES, VALUES)
    assert [step for step, _ in got] == [1, 2]
    assert got[0][1]["loss"] == 1.5
    assert [event.text for event in told] == [
        "numbers are published no more (ConnectionError: nobody there)"
    ]


def test_the_last_numbers_are_published_however_short_the_run(tmp_path):
    got: list = []
    publish = [lambda step, numbers: got.append((step, dict(numbers)))]
    with MetricsLog(
        tmp_path, ProcessMesh(), lambda event: None, samples=40, step=0, publish=publish
    ) as log:
        for step, loss in ((1, 1.0), (2, 2.0)):
            values = torch.tensor([loss, 0.25, 3.0])
            log.step(Mark(step=step, position=8 * step), Config(steps=70), RATES, values)
    ((step, numbers),) = got
    assert (step, numbers["loss"], numbers["replaced"], numbers["total"]) == (2, 1.5, 6, 70)


def test_waiting_is_told_apart_and_computing_is_without_the_other_column(tmp_path, monkeypatch):
    now = 100.0
    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr("cluster.run.metrics.time", clock)
    monkeypatch.setattr("model.timing.time", clock)
    link: Any = SimpleNamespace(traffic={"conv3": Traffic()}, waits=Stopwatch())
    waits = WaitTimes()
    with MetricsLog(tmp_path, ProcessMesh(), lambda event: None, samples=40, step=0) as log:
        with log.waiting(waits):
            waits.fetch, waits.storage, waits.checksum, waits.feed, waits.decode = (
                0.01, 0.02, 0.003, 0.004, 0.03,
            )  # fmt: skip
            now += 0.1
        with log.computing():
            now += 0.01
            with link.waits.running(CPU):
                now += 0.04
            with log.reducing.running(CPU):
                now += 0.02
        log.step(MARK, Config(), RATES, VALUES, link)
    row = json.loads((tmp_path / METRICS).read_text())
    causes = [row[name] for name in WAITS]
    assert causes == pytest.approx([0.03, 0.007, 0.03, 0.033])
    assert sum(causes) == pytest.approx(row["data_wait"] * row["seconds"], rel=0.001)
    assert (row["compute"], row["exchange"], row["reduce"]) == (0.01, 0.04, 0.02)
    assert row["seconds"] == 0.17


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A GPU with clocks that the test sets."""
    device = FakeDevice()
    monkeypatch.setattr(torch.cuda, "Event", device.make_event)
    clock = SimpleNamespace(perf_counter=lambda: device.now, monotonic=lambda: device.now)
    monkeypatch.setattr("cluster.run.metrics.time", clock)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000, 10_000))
    return device


@pytest.mark.parametrize(
    ("decoding", "stalled"), [(0.0, 0.0), (0.004, 0.0), (0.014, 0.008)],
    ids=["ready", "in time for the GPU", "too late"],
)  # fmt: skip
def test_a_gpu_waits_for_data_only_when_it_has_nothing_to_compute(tmp_path, gpu, decoding, stalled):
    """A step takes the GPU 10 ms; the host launches it in 1 and runs ahead."""
    link: Any = SimpleNamespace(traffic={}, waits=Stopwatch())
    mesh, waits = ProcessMesh(device=CUDA), WaitTimes()
    with MetricsLog(tmp_path, mesh, lambda event: None, samples=40, step=0) as log:
        for step in (1, 2, 3):
            with log.waiting(waits):
                gpu.now += decoding
                waits.decode += decoding
            with log.computing():
                gpu.now += 0.001
                gpu.launch(0.004)
                with link.waits.running(CUDA):
                    gpu.launch(0.002)
                gpu.launch(0.004)
                if step > 1:  # as the loop does: the forward pass of this step follows that row
                    gpu.now = max(gpu.now, gpu.busy_until - 0.006)
                    log.flush()
            log.step(Mark(step=step, position=8 * step), Config(), RATES, VALUES, link)
        gpu.synchronize()
    row = json.loads((tmp_path / METRICS).read_text().splitlines()[-1])
    assert row["compute"] == pytest.approx(0.009 if stalled else 0.008, abs=1e-5)  # 1 ms to launch
    assert row["exchange"] == pytest.approx(0.002, abs=1e-5)
    assert row["seconds"] == pytest.approx(0.019 if stalled else 0.010, abs=1e-5)
    assert row["data_wait"] * row["seconds"] == pytest.approx(stalled, abs=2e-6)
    assert {name: row[name] for name in WAITS} == dict.fromkeys(WAITS, 0.0) | {
        "wait_decode": pytest.approx(stalled, abs=1e-5)
    }


def test_a_row_is_no_sooner_than_the_gpu_has_computed_its_step(tmp_path, gpu):
    log = MetricsLog(tmp_path, ProcessMesh(device=CUDA), lambda event: None, samples=40, step=0)
    with log.waiting(WaitTimes()):
        pass
    with log.computing():
        gpu.launch(1.0)
    log.step(MARK, Config(), RATES, VALUES)
    with pytest.raises(RuntimeError, match="not ready"):
        log.flush()
    gpu.synchronize()
    log.flush()
    row = json.loads((tmp_path / METRICS).read_text())
    assert (row["compute"], row["memory"]) == (1.0, 4_000), "all that is in use on the GPU"
