"""Values and times of a device, on the host."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from model.timing import MOST_SPANS, HostCopy, Stopwatch, sum_seconds
from tests.helpers.fake_cuda import FakeDevice

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class DeviceTensor(torch.Tensor):
    """CPU tensor that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_values_of_a_cpu_are_read_as_they_are() -> None:
    assert HostCopy(torch.tensor([1.5, 0.25], requires_grad=True)).read() == [1.5, 0.25]


def test_values_of_a_gpu_wait_for_the_work_before_the_copy_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, calls = FakeDevice(), list[str]()
    plain_empty, plain_copy = torch.empty, torch.Tensor.copy_

    def empty(*size: Any, pin_memory: bool = False, **settings: Any) -> torch.Tensor:
        calls.append("pinned" if pin_memory else "pageable")
        return plain_empty(*size, **settings)

    def copy(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        calls.append("launched" if non_blocking else "waited")
        return plain_copy(self, other.as_subclass(torch.Tensor))

    monkeypatch.setattr(torch.cuda, "Event", gpu.make_event)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    values = torch.tensor([1.5, 0.25]).as_subclass(DeviceTensor)
    gpu.launch(1.0)
    on_host = HostCopy(values)
    gpu.launch(10.0)
    assert calls == ["pinned", "launched"]
    assert gpu.waits == 0
    assert on_host.read() == [1.5, 0.25]
    assert (gpu.waits, gpu.now) == (1, 2.0)


def test_a_stopwatch_sums_its_blocks_and_starts_anew() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.running(CPU):
            time.sleep(0.01)
        time.sleep(0.02)
    assert 0.02 <= sum_seconds(watch.take()) < 0.04
    assert sum_seconds(watch.take()) == 0.0


def test_a_stopwatch_that_nobody_reads_does_not_grow() -> None:
    watch = Stopwatch()
    for _ in range(MOST_SPANS + 5):
        with watch.running(CPU):
            pass
    assert len(watch.take()) == MOST_SPANS


def test_a_span_on_a_gpu_begins_when_the_work_before_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, watch = FakeDevice(), Stopwatch()
    monkeypatch.setattr(torch.cuda, "Event", gpu.make_event)
    gpu.launch(5.0)
    with watch.running(CUDA):
        gpu.now += 2.0  # hidden behind that work
    with watch.running(CUDA):
        gpu.launch(0.5)
    gpu.synchronize()
    assert sum_seconds(watch.take()) == pytest.approx(0.5)


@pytest.mark.gpu
def test_values_and_times_of_a_real_gpu() -> None:
    watch, x = Stopwatch(), torch.ones(2048, 2048, device="cuda")
    with watch.running(CUDA):
        values = (x @ x)[0, :2]
    on_host = HostCopy(values)
    assert on_host.read() == [2048.0, 2048.0]
    assert 0 < sum_seconds(watch.take()) < 10
