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
from cluster.launch.worker import Registration
from cluster.launch.workers import Workers, _Trainer, describe_members


class FakeChannel:
    """Channel on which a test registers workers."""

    address = None

    def __init__(self) -> None:
        self.registered: list[Registration] = []

    def take_workers(self) -> list[Registration]:
        taken, self.registered = self.registered, []
        return taken


class FakeWorkers(Workers):
    """Workers without a Ray; lists what was started and ended."""

    def __init__(self, spares: int) -> None:
        super().__init__(spares, {})
        self.log: list[str] = []
        self._channel = FakeChannel()  # type: ignore[assignment]

    def _begin(self, node: str, size: int, resources: Any, *, has_spares: bool = False) -> int:
        self.log.append(f"start {node * size}")
        self._count += 1
        self._trainers[self._count] = _Trainer(
            node, f"{node} spares" if has_spares else node, has_spares
        )
        return self._count

    def _end(self, worker: Registration) -> None:
        self.log.append(f"end {worker.process}")

    def execute(self, rank: int, function: Any, *arguments: Any) -> None:
        self.log.append(f"{function.__name__} {rank}")

    def take(self) -> list[str]:
        log, self.log = self.log, []
        return log

    def ready(self, *workers: tuple[int, int, int], gpus: dict[int, int] | None = None) -> bool:
        """Have workers, as (trainer, rank, process), be ready."""
        for trainer, rank, process in workers:
            one = self._trainers.get(trainer)
            where = WorkerLocation(one.node if one else "m", "M", (gpus or {}).get(rank))
            self._channel.registered.append(  # type: ignore[union-attr]
                Registration(
                    trainer=trainer, rank=rank, handle=None, location=where, process=process
                )
            )
        return self.gather()

    def seated(self) -> list[int]:
        return [seat.worker.process if seat.worker else 0 for seat in self._seats]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], FakeWorkers]:
    monkeypatch.setattr(workers, "has_ended", lambda trainer: False)
    monkeypatch.setattr(workers, "end_trainers", lambda trainers: None)
    monkeypatch.setattr(workers, "does_answer", lambda worker: worker.process != 99)
    return FakeWorkers


def place(nodes: str, gpus: int = 0) -> Placement:
    return Placement(nodes=tuple(nodes), cpus=1, gpus=gpus, size=1)


def test_who_lives_is_kept_and_a_spare_takes_the_place_of_the_dead(make):
    crew = make(1)
    crew.place(place("mm"))
    assert not crew.ready((1, 1, 11))
    assert crew.ready((1, 0, 10))
    assert crew.seated() == [10, 11]
    crew.tend_spares(1.0)
    assert crew.take() == ["start mm"]  # the start is not slowed
    crew.tend_spares(60.0)
    crew.tend_spares(62.0)
    assert crew.take() == ["start m"]
    crew.drop(1)
    crew.place(place("mm"))
    assert crew.take() == ["end 11"]
    assert crew.ready((2, 0, 20))
    assert crew.seated() == [10, 20]
    assert crew.ready((1, 1, 12))  # whom Ray Train has started for the dead is the next spare
    assert crew.seated() == [10, 20]
    crew.drop(0)
    assert crew.gather()
    assert crew.seated() == [12, 20]


def test_a_spare_that_has_died_is_not_taken(make):
    crew = make(1)
    crew.place(place("m"))
    crew.ready((1, 0, 10))
    crew.tend_spares(60.0)
    crew.ready((2, 0, 99))
    crew.drop(0)
    assert not crew.gather()
    assert crew.take()[-2:] == ["end 10", "end 99"]
    crew.ready((2, 0, 20), (2, 0, 21))  # Ray Train has replaced it twice
    assert crew.seated() == [21]
    assert not crew._idle


def test_a_worker_that_ray_train_replaces_before_all_have_met_holds_no_seat(make):
    """A replacement that fails has Ray Train end all of a node, and start all of them anew."""
    crew = make(0)
    crew.place(place("mm"))
    assert not crew.ready((1, 0, 10))
    assert crew.seated() == [10, 0]
    assert crew.ready((1, 0, 12), (1, 1, 13))
    assert crew.seated() == [12, 13]
    assert not crew._idle


def test_another_size_of_a_node_ends_its_workers_and_those_of_before_are_not_taken(make):
    crew = make(0)
    crew.place(place("mm"))
    assert crew.ready((1, 0, 10), (1, 1, 11))
    crew.place(place("m"))
    assert crew.take() == ["start mm", "end 10", "end 11", "start m"]
    assert not crew.ready((1, 0, 12))
    assert crew.ready((2, 0, 13))
    crew.place(place("m", gpus=1))  # other resources
    assert crew.take() == ["end 13", "start m"]
    assert crew.ready((3, 0, 14))
    crew.end()
    assert crew.take() == ["end 14"]


def test_the_workers_of_other_nodes_live_on_when_one_is_lost_or_comes(make):
    crew = make(1)
    crew.place(place("mmn"))
    assert crew.ready((1, 0, 10), (1, 1, 11), (2, 0, 12))
    crew.tend_spares(60.0)
    assert crew.take() == ["start mm", "start n", "start m", "start n"]
    crew.drop(1)
    assert crew.ready((3, 0, 20), (4, 0, 30))
    crew.drop(2)
    assert crew.gather()
    assert crew.seated() == [10, 20, 30]
    crew.take()
    crew.place(place("omm"))  # n is lost, and with it the spare that sits there
    assert crew.take() == ["end 30", "start o"]
    assert not crew.gather()
    assert crew.seated() == [0, 10, 20]
    assert not crew.ready((2, 0, 13))
    assert crew.ready((5, 0, 15))
    assert crew.seated() == [15, 10, 20]
    assert [one.rank for one in crew._members] == [0, 1, 2]
    assert crew.ready((1, 1, 14))  # trainers of nodes that stay still replace the dead
    crew.tend_spares(60.0)
    assert crew.take() == ["start o"]
    crew.drop(2)
    assert crew.gather()
    assert crew.seated() == [15, 10, 14]


def test_the_workers_of_a_ray_train_that_has_ended_are_started_anew(make, monkeypatch):
    crew = make(0)
    crew.place(place("mn"))
    monkeypatch.setattr(workers, "has_ended", lambda trainer: trainer == "n")
    crew.place(place("mn"))
    assert crew.take() == ["start m", "start n", "start n"]


def test_spares_whose_ray_train_has_ended_leave_the_workers_of_their_node(make, monkeypatch):
    """They were ended too, and with them the state of the last step in their memory."""
    crew = make(2)
    crew.place(place("mm"))
    assert crew.ready((1, 0, 10), (1, 1, 11))
    crew.tend_spares(60.0)
    crew.drop(1)
    assert crew.ready((2, 0, 20), (2, 1, 21))
    assert crew.seated() == [10, 20]
    crew.take()
    ended = ["m spares"]
    monkeypatch.setattr(workers, "has_ended", lambda trainer: trainer in ended)
    crew.place(place("mm"))
    assert crew.take() == ["end 21", "end 20"]
    assert crew.seated() == [10, 0]
    crew.tend_spares(60.0)
    assert crew.take() == ["start mm"]
    assert crew.ready((1, 1, 12))
    assert crew.seated() == [10, 12]


def test_a_ray_train_that_ends_while_its_workers_are_awaited_is_replaced(make, monkeypatch):
    """The start waited three minutes for workers that nobody started."""
    crew = make(0)
    crew.place(place("mn"))
    assert crew.ready((1, 0, 10), (2, 0, 20))
    crew.drop(1)
    ended = ["n"]
    monkeypatch.setattr(workers, "has_ended", lambda trainer: trainer in ended)
    crew.take()
    assert not crew.gather()
    assert crew.take() == ["start n"]
    ended.clear()
    assert not crew.gather()
    assert crew.take() == []
    assert crew.ready((3, 0, 30))
    assert crew.seated() == [10, 30]


def test_a_spare_takes_over_the_gpu_of_the_seat(make):
    crew = make(1)
    crew.place(place("mm", gpus=1))
    crew.ready((1, 0, 10), (1, 1, 11), gpus={0: 2, 1: 3})
    crew.tend_spares(60.0)
    crew.take()
    crew.drop(1)
    assert crew.ready((2, 0, 20))
    assert [one.gpu for one in crew._members] == [2, 3]
    assert crew.take() == ["end 11", "expose_gpus 0", "expose_gpus 1"]
    # All workers have died at once, and Ray has reserved other GPUs for those it starts.
    assert crew.ready((1, 1, 12), gpus={1: 4})
    assert crew.take()[0] == "end 20"
    assert [one.gpu for one in crew._members] == [2, 4]
    assert crew.seated() == [10, 12]


def test_a_worker_sees_the_gpus_of_all_workers_of_its_node():
    places = [("m", 10), ("m", 2), ("n", 0), ("n", "GPU-f3"), ("o", None)]
    located = [WorkerLocation(node, node, gpu) for node, gpu in places]
    members = describe_members(located)
    assert [one.visible for one in members] == ["2,10", "2,10", "0,GPU-f3", "0,GPU-f3", ""]
    assert [(one.rank, one.size, one.gpu) for one in members[:2]] == [(0, 5, 10), (1, 5, 2)]


def test_the_driver_imports_no_torch():
    """Five CPU seconds less before the first step."""
    code = (
        "import sys, cluster.launch.controller, cluster.train\n"
        "from cluster.launch.gpus import count_gpus, has_driver\n"
        "count = None if has_driver() else count_gpus('auto')\n"
        "print(count, 'torch' in sys.modules, 'ray.train' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(None if has_driver() else 0), "False", "False"]
