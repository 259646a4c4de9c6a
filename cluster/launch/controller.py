"""Controller: starts the workers of a run, watches them, and restarts them until the last step.

    while there are steps to make:
        place as many replicas as fit          (placement.place_workers)
        start their workers                    (WorkerGroup; Workers keeps those that live)
        watch them until they end: finished, failed, or stopped, because the user wants it, a node
        is being drained, or there is room for more replicas

Workers that are asked to stop save a checkpoint first. Every start and end is a row of
RUN/attempts.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.checkpoint.storage import find_last_step
from cluster.config import Config
from cluster.launch.failure import Failure
from cluster.launch.placement import (
    Node,
    NoRoom,
    Placement,
    describe_holders,
    describe_layout,
    find_draining_nodes,
    find_lost_nodes,
    find_reachable,
    get_node_name,
    has_gpus,
    list_nodes,
    place_run,
    uses_gpus,
)
from cluster.launch.rendezvous import describe_start, meet
from cluster.launch.worker import FAKE_GPUS, WorkerJob
from cluster.launch.workers import Workers
from cluster.run.console import RunConsole
from cluster.run.events import Ended, Event, Failed, Finished, Placed, Started
from cluster.run.folder import (
    ATTEMPTS,
    RunIdentity,
    read_identity,
    read_last_attempt,
    read_last_step,
)
from cluster.run.sync import DRIVER_FILES, open_mirror
from pipeline.tools.errors import DuetError, SetupError, handle_end

EVENTS_EVERY = 0.2
"""Seconds between reads of the workers' events."""
GATHER_EVERY = 0.1
"""Seconds between looks for workers that are ready."""
NODES_EVERY = 2.0
"""Seconds between reads of the cluster's nodes while training."""
ROOM_EVERY = 0.5
"""Seconds between attempts to place the workers."""
RELEASE_TIMEOUT = 15.0
"""Seconds that Ray may take to release the resources of workers that have ended."""
START_TIMEOUT = 180.0
"""Seconds that workers have to start, and to import what they need."""
GRACE = 5.0
"""Seconds that workers have to notice that another has died: their next collective call fails."""
LATE_GRACE = 1.0
"""The same after a worker has waited for another in vain: whoever lives has done so, too."""
GROW_AFTER = 10.0
"""Seconds after a start before the run is stopped to add replicas."""
STOP_TIMEOUT = 120.0
"""Seconds that workers have to save a checkpoint when the user stops the run."""
SAY_EVERY = 30.0
"""Seconds between lines about a wait for nodes."""
STOPPED = "stopped"
"""Reason, in RUN/attempts.jsonl, of an end that the user wanted."""
ABORT_ONLY = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
"""NCCL's watchdog shall abort an operation that takes too long, and not also end the process, which
then names the worker that is late (torch: ErrorHandlingMode in ProcessGroupNCCL.hpp)."""
FORWARDED = ("OMP_WAIT_POLICY", FAKE_GPUS, *ABORT_ONLY)
"""Variables that workers need before they load torch, or that Ray does not forward."""


class Controller:
    """Keeps one run going; needs a Ray (`cluster.launch.session.ray_session`)."""

    def __init__(
        self,
        config: Config,
        data: str,
        run: Path,
        screen: RunConsole,
        read_output: Callable[[], str],
    ) -> None:
        """Prepare a run.

        Args:
            config: settings of the run.
            data: folder or address of the data set.
            run: run folder.
            screen: prints lines and events.
            read_output: returns what Ray has printed so far.
        """
        self._config, self._data, self._run, self._screen = config, data, run, screen
        self._read_output = read_output
        # Decided once: a run that has lost its GPUs must not continue slowly on CPUs.
        self._gpu = uses_gpus(config, has_gpus())
        self._mirror = open_mirror(run, config.store)
        self._number = read_last_attempt(run)
        self._broken: set[str] = set()
        """Ray's ids of the nodes where a GPU has failed."""

    def train(self) -> None:
        """Train to the last step.

        Raises:
            NoRoom: the cluster has none, now or for longer than `node_wait`.
            DuetError: the run failed more than `max_failures` times in a row at the same step.
            KeyboardInterrupt: the user ended it.
        """
        failures, begun = 0, self._last_step()
        placement = self._place_first()
        if layout := describe_layout(self._config, placement):
            self._screen.say(layout)
        spares = Workers(self._config.spares, build_environment())
        with spares as self._workers, count_interrupts() as interrupts:
            while True:
                group = self._run_group(placement, interrupts)
                if group.finished:
                    return
                if interrupts():
                    raise KeyboardInterrupt
                if group.has_failed:
                    # A start from memory is progress, too.
                    step, event = max(self._last_step(), group.step), group.failure.event
                    if event is not None and event.broken_node:
                        self._broken.add(event.broken_node)
                    failures, begun = (failures + 1 if step == begun else 1), step
                    if failures > self._config.max_failures or group.failure.is_final:
                        raise group.failure.build_error(self._run, self._read_output())
                    self._screen.say(f"{group.failure.why}; starting again")
                placement = self._wait_for_room(interrupts)

    def _place_first(self) -> Placement:
        """Place the first start, with the room there is now.

        Waits only if the run was started before: its resources may not be released yet.

        Raises:
            NoRoom: there is none.
        """
        start = time.monotonic()
        while True:
            try:
                return self._place(list_nodes())
            except NoRoom as error:
                if self._number == 0 or time.monotonic() - start > RELEASE_TIMEOUT:
                    raise name_holders(error) from None
            time.sleep(ROOM_EVERY)

    def _run_group(self, placement: Placement, interrupts: Callable[[], int]) -> WorkerGroup:
        """Start the workers and handle their events until they have ended."""
        self._number += 1
        group = WorkerGroup(self._config, self._data, self._run, self._workers, placement)
        request = StopRequest(group, self._screen)
        try:
            for event in group.events():
                self._handle(event, group)
                if interrupts():
                    request.stop_for_user()
                elif group.started and request.is_time_to_look():
                    if why := self._find_reason(group.placement, request):
                        request.stop_to_restart(why)
                    else:
                        self._workers.tend_spares(time.monotonic() - request.since)
        except KeyboardInterrupt:
            request.why = STOPPED
            raise
        finally:
            why = "finished" if group.finished else request.why or group.failure.why
            self._note("end", step=self._last_step(), why=why, code=int(not group.finished))
        return group

    def _handle(self, event: Event | None, group: WorkerGroup) -> None:
        """Print an event of a worker, and record a start."""
        if isinstance(event, Placed):
            self._screen.table(event.workers)
        if isinstance(event, Started):
            workers = [asdict(worker) for worker in group.failure.workers]
            self._note(
                "start", step=event.step, saved=event.saved, total=event.total,
                replicas=group.placement.replicas, workers=workers,
                nodes=group.placement.nodes, seconds=group.seconds,
            )  # fmt: skip
        if event is not None:
            self._screen.show(event)

    def _last_step(self) -> int:
        """Return the step of the newest checkpoint; the last known one if its disk is away."""
        try:
            step = find_last_step(self._run, self._config.store)
        except (OSError, DuetError):
            step = 0
        return max(step, read_last_step(self._run))

    def _find_reason(self, now: Placement, request: StopRequest) -> str:
        """Return why the workers should restart elsewhere; empty if they should not."""
        if leaving := find_draining_nodes() & set(now.nodes):
            return f"node {get_node_name(min(leaving))} is about to go"
        if time.monotonic() - request.since < GROW_AFTER:
            return ""
        more = self._count_replicas(list_nodes(now))
        return f"there is room for {more} replicas" if more > now.replicas else ""

    def _place(self, nodes: list[Node]) -> Placement:
        """Place the workers, on nodes where no GPU has failed, if those have room."""
        sound = [node for node in nodes if node.id not in self._broken]
        if len(sound) < len(nodes):
            with suppress(NoRoom):
                return place_run(self._config, sound, self._gpu)
        return place_run(self._config, nodes, self._gpu)

    def _wait_for_room(self, interrupts: Callable[[], int]) -> Placement:
        """Place the next start; the seats of the workers count as free.

        Raises:
            NoRoom: there is none for longer than `node_wait` seconds.
            KeyboardInterrupt: the user does not want to wait.
        """
        start, said = time.monotonic(), 0.0
        timeout = max(RELEASE_TIMEOUT, self._config.node_wait)
        while True:
            try:
                reachable = find_reachable()
                nodes = list_nodes(self._workers.placement)
                return self._place([node for node in nodes if node.id in reachable])
            except NoRoom as error:
                waited = time.monotonic() - start
                if waited > timeout:
                    raise name_holders(error) from None
                if waited > RELEASE_TIMEOUT and waited - said > SAY_EVERY:
                    said, left = waited, self._config.node_wait - waited
                    why = name_holders(error)
                    self._screen.say(f"waiting {left:,.0f} s more for nodes: {why}")
            if interrupts():
                raise KeyboardInterrupt
            time.sleep(ROOM_EVERY)

    def _count_replicas(self, nodes: list[Node]) -> int:
        """Return the replicas that fit; 0: there is no room."""
        try:
            return self._place(nodes).replicas
        except NoRoom:
            return 0

    def _note(self, event: str, **more: Any) -> None:
        """Add a row to RUN/attempts.jsonl."""
        row = {"time": round(time.time(), 3), "event": event, "attempt": self._number, **more}
        try:
            with (self._run / ATTEMPTS).open("ab") as file:
                file.write((json.dumps(row) + "\n").encode())
            if self._mirror is not None:
                self._mirror.push_whole(DRIVER_FILES)
        except (OSError, DuetError) as error:
            self._screen.say(f"warning: {self._run / ATTEMPTS} cannot be written ({error})")


class StopRequest:
    """Request to a group of workers to stop: whether it was made, when and why."""

    def __init__(self, group: WorkerGroup, screen: RunConsole) -> None:
        self._group, self._screen = group, screen
        self.since = time.monotonic()
        """Time of the group's start."""
        self.why = ""
        self._looked = self.since
        self._deadline: float | None = None

    def is_time_to_look(self) -> bool:
        """Return whether the cluster should be examined again."""
        if self.why or time.monotonic() - self._looked < NODES_EVERY:
            return False
        self._looked = time.monotonic()
        return True

    def stop_to_restart(self, why: str) -> None:
        """Have the workers save a checkpoint and end."""
        self.why = why
        self._screen.say(f"{why}: saving, then starting again")
        self._group.channel.request_stop()

    def stop_for_user(self) -> None:
        """Have the workers save a checkpoint and end; call it repeatedly until they have.

        Raises:
            KeyboardInterrupt: there is nothing to save (any more), or they take too long.
        """
        if not self._group.started or self._group.ended:
            raise KeyboardInterrupt
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_TIMEOUT
            self.why = self.why or STOPPED
            self._screen.say("stopping: saving first; once more ends it at once")
            self._group.channel.request_stop()
        if time.monotonic() > self._deadline:
            raise KeyboardInterrupt


class WorkerGroup:
    """One start of a run's workers: `events()` until they end; attributes say how they did."""

    step = 0
    """Step from which they began."""

    def __init__(
        self, config: Config, data: str, run: Any, workers: Workers, placement: Placement,
        *, measure: bool = False,
    ) -> None:  # fmt: skip
        self.placement = placement
        self.started = self.ended = self.finished = False
        """They began to train; stopped on request; made the last step."""
        self.failure = Failure()
        """Causes of a failure, if they failed; has the worker table once they are placed."""
        self.channel = workers.open_channel()
        self.seconds: dict[str, float] = {}
        """Seconds of each stage of the start."""
        self._workers, self._begun = workers, time.monotonic()
        self._job = WorkerJob(
            config=config, data=data, run=run, placement=placement, driver=self.channel.address,
            identity=RunIdentity() if measure else read_identity(run), measure=measure,
        )  # fmt: skip

    def events(self) -> Iterator[Event | None]:
        """Yield the workers' events until they have ended, and None after each read."""
        from ray.exceptions import RayError

        try:
            yield from self._train()
        except RayError as error:  # some may have met, and some not
            self.failure.raised = error
            self._drop_all()
        yield from self._take()

    def _train(self) -> Iterator[Event | None]:
        """Start the workers and wait for their ends."""
        from ray.exceptions import RayTaskError

        self._workers.place(self.placement)
        yield from self._gather()
        if self.failure.raised:
            return
        self._note_stage("workers")
        timeout = self._job.config.collective_timeout
        size = len(self._workers)
        try:
            meet(self._workers.execute, size, choose_backend(self.placement), timeout)
        except (ConnectionError, RayTaskError) as error:
            self.failure.event = describe_start(error)
            self._drop_all()
            return
        yield from self._watch(self._workers.train(self._job))

    def _gather(self) -> Iterator[Event | None]:
        """Wait until each seat has a worker, but no longer than `START_TIMEOUT`."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self._workers.gather():
            error = self._workers.error
            if error or time.monotonic() > deadline:
                late = SetupError(
                    f"workers did not start in {START_TIMEOUT:g} s; look at what their nodes do "
                    "(duet doctor), and give the same command again"
                )
                self.failure.raised = error or late
                self._workers.end()
                return
            yield from self._take()
            yield None
            time.sleep(GATHER_EVERY)

    def _watch(self, running: dict[Any, int]) -> Iterator[Event | None]:
        """Wait for the ends of all workers; after a failure, a little for those that live on."""
        import ray
        from ray.exceptions import RayError

        failed: float | None = None
        while running:
            for reference in ray.wait(list(running), timeout=EVENTS_EVERY)[0]:
                rank = running.pop(reference)
                try:
                    is_well = ray.get(reference)
                except RayError as error:
                    is_well = False
                    self._lose(rank, error)
                if is_well is None:
                    running[self._workers.wait(rank)] = rank
                elif not is_well:
                    failed = failed or time.monotonic()
            yield from self._take()
            yield None
            if failed is not None and running:
                self._drop_stuck(running, time.monotonic() - failed)

    def _drop_stuck(self, running: dict[Any, int], seconds: float) -> None:
        """End the workers that do not notice the failure of another: frozen, or on a dead node."""
        is_late = self.failure.event is not None and self.failure.event.late
        over = seconds > (LATE_GRACE if is_late else GRACE)
        reachable = find_reachable() if not over else set()
        for reference, rank in list(running.items()):
            if over or self._workers.get_node(rank) not in reachable:
                del running[reference]
                self._workers.drop(rank)

    def _lose(self, rank: int, error: Exception) -> None:
        """Note that a worker has died, or has failed on its own, and end it."""
        from ray.exceptions import RayActorError

        if isinstance(error, RayActorError):
            self.failure.dead.add(rank)
            self.failure.gone |= find_lost_nodes(self.placement)
        self.failure.raised = self.failure.raised or error
        self._workers.drop(rank)

    def _drop_all(self) -> None:
        """End all workers; their seats are kept."""
        for rank in range(len(self._workers)):
            self._workers.drop(rank)

    def _take(self) -> Iterator[Event]:
        for event in self.channel.take():
            self._note(event)
            yield event

    def _note_stage(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._begun = round(now - self._begun, 2), now

    def _note(self, event: Event) -> None:
        match event:
            case Placed(workers):
                self._note_stage("meet")
                self.failure.workers = workers
            case Started():
                self._note_stage("load")
                self.started, self.step = True, event.step
            case Ended():
                self.ended = True
            case Finished():
                self.finished = True
            case Failed():
                self.failure.event = self.failure.event or event

    @property
    def has_failed(self) -> bool:
        """True if a worker has failed, or Ray."""
        failure = self.failure
        return failure.event is not None or failure.raised is not None or bool(failure.dead)


def choose_backend(placement: Placement) -> str:
    """Return the backend of torch.distributed."""
    has_cuda = placement.gpus and not os.environ.get(FAKE_GPUS)
    return "cpu:gloo,cuda:nccl" if has_cuda else "gloo"


def build_environment() -> dict[str, str]:
    """Return the variables of the workers; the user's own values win."""
    return ABORT_ONLY | {name: os.environ[name] for name in FORWARDED if name in os.environ}


@contextmanager
def count_interrupts() -> Iterator[Callable[[], int]]:
    """Count Ctrl-C, SIGTERM and SIGHUP instead of ending at the first; the second raises.

    Yields:
        function that returns how many there were.
    """
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = {signal.SIGINT: signal.signal(signal.SIGINT, note), **handle_end(note)}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def name_holders(error: NoRoom) -> NoRoom:
    """Return the error with the jobs that hold the room, if there are any."""
    holders = describe_holders()
    return NoRoom(f"{error}; in use are {holders}") if holders else error
