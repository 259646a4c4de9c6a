"""The controller with groups of workers that only say how they end: where a run starts again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.config import Config
from cluster.launch import controller
from cluster.launch.controller import STOPPED, Controller
from cluster.launch.failure import Failure, WorkerGpu, describe_failure
from cluster.launch.placement import Node, Placement, WorkerMemory
from cluster.run.console import RunConsole
from cluster.run.events import Ended, Event, Failed, Finished, Placed, Started, Worker
from cluster.run.folder import ATTEMPTS
from pipeline.tools.errors import DuetError

MEMORY = WorkerMemory(parameters=2**30, image=30 * 10**6)
Script = Callable[["FakeGroup"], Iterator[Event | None]]


class FakeGroup(controller.WorkerGroup):
    """Workers that do what a script yields, in place of a Ray's."""

    def __init__(self, script: Script, placement: Placement) -> None:
        self.placement, self._script = placement, script
        self.started = self.ended = self.finished = False
        self.failure, self.seconds, self._begun = Failure(), {}, 0.0
        self.is_stopping = False
        self.channel = SimpleNamespace(request_stop=self._stop)  # type: ignore[assignment]

    def _stop(self) -> None:
        self.is_stopping = True

    def events(self) -> Iterator[Event | None]:
        for event in self._script(self):
            if event is not None:
                self._note(event)
            yield event


def begin(group: FakeGroup, step: int = 0) -> Iterator[Event | None]:
    """Start on every node of the placement."""
    nodes, size = group.placement.nodes, group.placement.size
    workers = (
        Worker(rank, rank // size, "ab"[rank % size], node, None) for rank, node in enumerate(nodes)
    )
    yield Placed(tuple(workers))
    yield Started(step=step, total=9, place="")


def finish(group: FakeGroup) -> Iterator[Event | None]:
    yield from begin(group)
    yield Finished(9)


def save_when_asked(group: FakeGroup) -> Iterator[Event | None]:
    """Train until a stop is requested; a run that nobody stops would never end."""
    yield from begin(group)
    for _ in range(100):
        if group.is_stopping:
            yield Ended(5)
            return
        yield None
    pytest.fail("nobody asks the workers to stop")


def fail_on_m(group: FakeGroup) -> Iterator[Event | None]:
    """Fail on node m by an error of its GPU, and finish on any other."""
    if "m" not in group.placement.nodes:
        yield from finish(group)
        return
    try:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    except RuntimeError as error:
        gpu = WorkerGpu(name="GPU 1", node="m", node_id="m", images=8, memory=MEMORY)
        yield describe_failure(error, "replica 0, column b", gpu)


class FakeCluster:
    """Nodes of two GPUs each, which a script may take away and add; and where workers start."""

    def __init__(self, run: Path, nodes: str, script: Script | list[Script]) -> None:
        self.run, self.nodes, self.starts = run, nodes, list[str]()
        self._scripts = script if isinstance(script, list) else None
        self._script = None if isinstance(script, list) else script

    def start(self, *arguments: object) -> FakeGroup:
        placement = arguments[-1]
        assert isinstance(placement, Placement)
        self.starts.append("".join(placement.nodes))
        script = self._scripts.pop(0) if self._scripts else self._script
        assert script is not None
        return FakeGroup(script, placement)

    def list_nodes(self, mine: object = None) -> list[Node]:
        return [Node(id=name, name=name, cpus=4, gpus=2) for name in self.nodes]

    def control(self, **settings: object) -> Controller:
        config = Config.from_settings({"max_failures": 1, **settings})
        return Controller(config, "data", self.run, RunConsole(), str)

    def rows(self) -> list[tuple[str, str]]:
        """Event and reason of every row of RUN/attempts.jsonl."""
        lines = (self.run / ATTEMPTS).read_text().splitlines()
        return [(row["event"], row.get("why", "")) for row in map(json.loads, lines)]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCluster]:
    """Make a cluster for the controller, which never waits."""

    def make(nodes: str, script: Script | list[Script]) -> FakeCluster:
        made = FakeCluster(tmp_path, nodes, script)
        monkeypatch.setattr(controller, "WorkerGroup", made.start)
        monkeypatch.setattr(controller, "list_nodes", made.list_nodes)
        return made

    monkeypatch.setattr(controller, "find_reachable", lambda: set("mno"))
    monkeypatch.setattr(controller, "find_draining_nodes", frozenset)
    monkeypatch.setattr(controller, "has_gpus", lambda: True)
    for name in ("ROOM_EVERY", "NODES_EVERY", "GROW_AFTER"):
        monkeypatch.setattr(controller, name, 0.0)
    return make


def test_after_the_failure_of_a_gpu_the_run_goes_on_elsewhere(cluster, capsys):
    on = cluster("mn", fail_on_m)
    on.control().train()
    assert on.starts == ["mm", "nn"]
    assert "GPU 1 of node m failed (CUDA error: unspecified launch failure); starting again" in (
        capsys.readouterr().out
    )


def test_without_another_node_it_is_tried_there_again_and_fails_with_the_gpus_name(cluster):
    on = cluster("m", fail_on_m)
    with pytest.raises(DuetError, match=r"column b: GPU 1 of node m failed .*error\.log") as caught:
        on.control().train()
    assert caught.value.exit_code == 1
    assert on.starts == ["mm"] * 2


def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_there_is_room_again(cluster, capsys):
    def lose_n(group: FakeGroup) -> Iterator[Event | None]:
        yield from begin(group)
        on.nodes = "m"
        yield Failed("node n is gone", "", "replica 1, column a", 1, False)

    def gain_o(group: FakeGroup) -> Iterator[Event | None]:
        on.nodes = "mo"
        yield from save_when_asked(group)

    on = cluster("mn", [lose_n, gain_o, finish])
    on.control(replicas="1:2").train()
    assert on.starts == ["mmnn", "mm", "mmoo"]
    shown = capsys.readouterr().out
    assert "there is room for 2 replicas: saving, then starting again" in shown
    ends = [why for event, why in on.rows() if event == "end"]
    assert ends[1:] == ["there is room for 2 replicas", "finished"]
    assert "node n is gone" in ends[0]


def test_a_run_of_a_fixed_size_does_not_grow(cluster):
    def gain(group: FakeGroup) -> Iterator[Event | None]:
        yield from begin(group)
        on.nodes = "mno"
        yield from [None] * 5
        assert not group.is_stopping
        yield Finished(9)

    on = cluster("mn", gain)
    on.control(replicas=2).train()
    assert on.starts == ["mmnn"]


def test_a_run_leaves_a_node_that_is_about_to_go(cluster, monkeypatch):
    def drain_m(group: FakeGroup) -> Iterator[Event | None]:
        monkeypatch.setattr(controller, "find_draining_nodes", lambda: {"m"})
        monkeypatch.setattr(controller, "get_node_name", str.upper)
        yield from save_when_asked(group)
        on.nodes = "n"

    on = cluster("mn", [drain_m, finish])
    on.control().train()
    assert on.starts == ["mm", "nn"]
    assert ("end", "node M is about to go") in on.rows()


def test_too_many_failures_without_a_new_checkpoint_end_a_run(cluster):
    def die(group: FakeGroup) -> Iterator[Event | None]:
        yield from begin(group)
        yield Failed("it died", "", "replica 0, column a", 1, False)

    on = cluster("m", die)
    with pytest.raises(DuetError, match="it died"):
        on.control(max_failures=2).train()
    assert on.starts == ["mm"] * 3


def test_progress_from_memory_is_progress(cluster):
    """A run that starts further on each time has no checkpoint, and does not fail."""

    def die_at(step: int) -> Script:
        def die(group: FakeGroup) -> Iterator[Event | None]:
            yield from begin(group, step)
            yield Failed("it died", "", "replica 0, column a", 1, False)

        return die

    on = cluster("m", [die_at(0), die_at(3), die_at(5), finish])
    on.control(max_failures=1).train()
    assert on.starts == ["mm"] * 4


def test_ctrl_c_has_the_workers_save_and_ends_the_run(cluster, capsys):
    def interrupt(group: FakeGroup) -> Iterator[Event | None]:
        yield from begin(group)
        os.kill(os.getpid(), signal.SIGINT)
        for event in save_when_asked(group):
            if not isinstance(event, Placed | Started):
                yield event

    on = cluster("m", interrupt)
    with pytest.raises(KeyboardInterrupt):
        on.control().train()
    assert on.starts == ["mm"]
    assert "stopping: saving first" in capsys.readouterr().out
    assert on.rows()[-1] == ("end", STOPPED)


def test_ctrl_c_before_there_is_anything_to_save_ends_a_run_at_once(cluster):
    def interrupt(group: FakeGroup) -> Iterator[Event | None]:
        os.kill(os.getpid(), signal.SIGINT)
        yield None
        pytest.fail("it goes on")

    on = cluster("m", interrupt)
    with pytest.raises(KeyboardInterrupt):
        on.control().train()
    assert on.rows()[-1] == ("end", STOPPED)
