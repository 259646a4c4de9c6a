"""The workers of a run from start to start: who is kept, who is replaced, and by whom."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cluster.launch import workers
from cluster.launch.gpus import has_driver
from cluster.launch.placement import Placement, WorkerLocation
from cluster.launch.workers import Workers, describe_members


class FakeActor:
    """A process that has started at once."""

    def __init__(self, node: str, gpu: int | None) -> None:
        self.node, self.gpu, self.is_dead, self.process = node, gpu, False, 1
        self.warm = (WorkerLocation(node, node.upper(), gpu), 1)

    def has_ended(self) -> bool:
        return self.is_dead


class FakeWorkers(Workers):
    """Workers without a Ray; lists what was started and ended."""

    def __init__(self, spares: int) -> None:
        super().__init__(spares, {})
        self.log: list[str] = []

    def _start(self, seat: Any) -> Any:
        self.log.append(f"start {seat.node}")
        return FakeActor(seat.node, 3 if seat.resources[1] else None)

    def _start_spare(self, node: str) -> Any:
        self.log.append(f"spare {node}")
        return FakeActor(node, None)

    def _end(self, actor: Any, node: str) -> None:
        self.log.append(f"end {node}")

    def _leave(self, seat: Any) -> None:
        if seat.actor is not None:
            self._end(seat.actor, seat.node)
        self.log.append(f"leave {seat.node}")

    def take(self) -> list[str]:
        log, self.log = self.log, []
        return log


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], FakeWorkers]:
    monkeypatch.setattr(workers, "_reserve", lambda node, resources: None)
    monkeypatch.setattr(workers, "is_warm", lambda actor: True)
    return FakeWorkers


def place(nodes: str, gpus: int = 0) -> Placement:
    return Placement(nodes=tuple(nodes), cpus=1, gpus=gpus, size=1)


def test_who_lives_is_kept_and_a_spare_takes_the_place_of_the_dead(make):
    crew = make(1)
    crew.place(place("mm"))
    assert crew.take() == ["start m", "start m"]
    crew.tend_spares(1.0)
    assert crew.take() == []  # the start is not slowed
    crew.tend_spares(60.0)
    assert crew.take() == ["spare m"]
    (spare,) = crew._spares["m"]
    first = crew._seats[0].actor
    crew.drop(1)
    crew.place(place("mm"))
    assert crew.take() == ["end m"]
    assert [seat.actor for seat in crew._seats] == [first, spare]
    crew.drop(0)
    crew.place(place("mm"))
    assert crew.take() == ["end m", "start m"]  # there is no other


def test_a_spare_that_has_died_is_replaced_and_not_taken(make):
    crew = make(1)
    crew.place(place("m"))
    crew.tend_spares(60.0)
    crew._spares["m"][0].is_dead = True
    crew.tend_spares(62.0)
    assert crew.take() == ["start m", "spare m", "spare m"]
    crew._spares["m"][0].is_dead = True
    crew.drop(0)
    crew.place(place("m"))
    assert crew.take() == ["end m", "end m", "start m"]


def test_another_placement_keeps_the_workers_of_the_nodes_that_stay(make):
    crew = make(1)
    crew.place(place("mmnn"))
    crew.tend_spares(60.0)
    kept = [seat.actor for seat in crew._seats[2:]]
    crew.take()
    crew.place(place("nnoo"))  # node m is lost
    assert crew.take() == ["end m", "leave m", "end m", "leave m", "end m", "start o", "start o"]
    assert [seat.actor for seat in crew._seats[:2]] == kept
    crew.place(Placement(nodes=("n",), cpus=2, gpus=0, size=1))  # a worker keeps its cores
    assert crew.take().count("leave n") == 2
    crew.close()
    assert crew.take() == ["end n", "leave n"]  # that was the spare


def test_a_spare_takes_over_the_gpu_of_the_seat(make):
    crew = make(1)
    crew.place(place("m", gpus=1))
    crew._seats[0].location = crew._seats[0].actor.warm[0]  # as `train` notes it
    crew.tend_spares(60.0)
    crew.drop(0)
    crew.place(place("m", gpus=1))
    assert crew.take() == ["start m", "spare m", "end m"]
    assert crew._seats[0].location.gpu == 3


def test_a_worker_sees_the_gpus_of_all_workers_of_its_node():
    places = [("m", 10), ("m", 2), ("n", 0), ("n", "GPU-f3"), ("o", None)]
    located = [WorkerLocation(node, node, gpu) for node, gpu in places]
    members = describe_members(located)
    assert [one.visible for one in members] == ["2,10", "2,10", "0,GPU-f3", "0,GPU-f3", ""]
    assert [(one.rank, one.size, one.gpu) for one in members[:2]] == [(0, 5, 10), (1, 5, 2)]


def test_the_driver_imports_no_torch():
    """Five CPU seconds less before the first step."""
    code = (
        "import sys, cluster.launch.controller\n"
        "from cluster.launch.gpus import count_gpus, has_driver\n"
        "count = None if has_driver() else count_gpus('auto')\n"
        "print(count, 'torch' in sys.modules, 'ray.train' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(None if has_driver() else 0), "False", "False"]
