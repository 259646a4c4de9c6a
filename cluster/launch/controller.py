"""Controller: starts the workers of a run, watches them, and restarts them until the last step.

    while there are steps to make:
        place as many replicas as fit          (placement.place_workers)
        start their workers                    (WorkerGroup)
        watch them until they end: finished, failed, or stopped, because the user wants it, a node
        is being drained, or there is room for more replicas

Workers that are asked to stop save a checkpoint first. Every start and end is a row of
RUN/attempts.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.checkpoint.storage import find_last_step
from cluster.config import Config
from cluster.launch.channel import Channel
from cluster.launch.failure import Failure
from cluster.launch.placement import (
    Node,
    NoRoom,
    Placement,
    describe_holders,
    describe_layout,
    find_draining_nodes,
    get_node_name,
    has_gpus,
    list_nodes,
    place_run,
    uses_gpus,
)
from cluster.launch.session import is_attached, make_session_folder
from cluster.launch.worker import FAKE_GPUS, WorkerJob, run_worker
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
from pipeline.tools.errors import DuetError, handle_end

EVENTS_EVERY = 0.2
"""Seconds between reads of the workers' events."""
NODES_EVERY = 2.0
"""Seconds between reads of the cluster's nodes while training."""
ROOM_EVERY = 0.5
"""Seconds between attempts to place the workers."""
RELEASE_TIMEOUT = 15.0
"""Seconds that Ray may take to release the resources of workers that have ended."""
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
FORWARDED = (
    "OMP_WAIT_POLICY", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", FAKE_GPUS, *ABORT_ONLY,
)  # fmt: skip
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
            DuetError: the run failed more than `max_failures` times with no new checkpoint.
            KeyboardInterrupt: the user ended it.
        """
        failures, begun = 0, self._last_step()
        placement = self._place_first()
        if layout := describe_layout(self._config, placement):
            self._screen.say(layout)
        with count_interrupts() as interrupts:
            while True:
                group = self._run_group(placement, interrupts)
                if group.finished:
                    return
                if interrupts():
                    raise KeyboardInterrupt
                if group.has_failed:
                    step, event = self._last_step(), group.failure.event
                    if event is not None and event.broken_node:
                        self._broken.add(event.broken_node)
                    failures, begun = (failures + 1 if step == begun else 1), step
                    if failures > self._config.max_failures or group.failure.is_final:
                        raise group.failure.build_error(self._run, self._read_output())
                    self._screen.say(f"{group.failure.why}; starting again from step {step}")
                placement = self._wait_for_room(group.placement, interrupts)

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
        group = WorkerGroup(self._config, self._data, self._run, placement)
        request = StopRequest(group, self._screen)
        try:
            for event in group.events():
                self._handle(event, group)
                if interrupts():
                    request.stop_for_user()
                elif group.started and (why := self._find_reason(group.placement, request)):
                    request.stop_to_restart(why)
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
                "start", step=event.step, total=event.total, replicas=group.placement.replicas,
                workers=workers,
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
        if not request.is_time_to_look():
            return ""
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

    def _wait_for_room(self, before: Placement, interrupts: Callable[[], int]) -> Placement:
        """Place the next start, with the room there is once the last one's resources are free.

        Args:
            before: placement of the last start.
            interrupts: returns how often the user has asked to stop.

        Raises:
            NoRoom: there is none for longer than `node_wait` seconds.
            KeyboardInterrupt: the user does not want to wait.
        """
        start, said = time.monotonic(), 0.0
        timeout = max(RELEASE_TIMEOUT, self._config.node_wait)
        while True:
            waited = time.monotonic() - start
            try:
                placement = self._place(filter_reachable(list_nodes()))
                if waited > RELEASE_TIMEOUT:
                    return placement
                freed = filter_reachable(list_nodes(before))
                if placement.replicas >= self._count_replicas(freed):
                    return placement
            except NoRoom as error:
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
    """Workers started once by Ray Train: `events()` until they end; attributes say how they did."""

    def __init__(
        self, config: Config, data: str, run: Any, placement: Placement, *, measure: bool = False
    ) -> None:
        self.placement = placement
        self.started = self.ended = self.finished = False
        """They began to train; stopped on request; made the last step."""
        self.failure = Failure()
        """Causes of a failure, if they failed; has the worker table once they are placed."""
        self.channel = Channel()
        job = WorkerJob(
            config=config, data=data, run=run, placement=placement, driver=self.channel.address,
            identity=RunIdentity() if measure else read_identity(run), measure=measure,
        )  # fmt: skip
        # A thread: fit() would handle Ctrl-C itself, and this thread prints events.
        self._thread = threading.Thread(target=self._fit, args=(job,), daemon=True)
        self._thread.start()

    def _fit(self, job: WorkerJob) -> None:
        # Storage of Ray Train's own state; only the driver's node reads it.
        try:
            with make_session_folder() as scratch:
                create_trainer(job, str(scratch)).fit()
        except BaseException as error:
            self.failure.raised = error

    def events(self) -> Iterator[Event | None]:
        """Yield the workers' events until they have ended, and None after each read."""
        while True:
            ending = not self._thread.is_alive()
            for event in self.channel.take():
                self._note(event)
                yield event
            if ending:
                return
            yield None
            time.sleep(EVENTS_EVERY)

    def _note(self, event: Event) -> None:
        match event:
            case Placed(workers):
                self.failure.workers = workers
            case Started():
                self.started = True
            case Ended():
                self.ended = True
            case Finished():
                self.finished = True
            case Failed():
                self.failure.event = self.failure.event or event

    @property
    def has_failed(self) -> bool:
        """True if a worker or Ray Train has failed."""
        return self.failure.event is not None or self.failure.raised is not None


def create_trainer(job: WorkerJob, scratch: str) -> Any:
    """Create the Ray Train trainer of a job."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    placement = job.placement
    resources: dict[str, float] = {"CPU": placement.cpus}
    if placement.gpus:
        resources["GPU"] = placement.gpus
    cuda = placement.gpus and not os.environ.get(FAKE_GPUS)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    from cluster.launch.rendezvous import LoopbackTrainer, RendezvousConfig

    trainer = DataParallelTrainer if is_attached() else LoopbackTrainer
    return trainer(
        run_worker,
        train_loop_config={"job": job},
        backend_config=RendezvousConfig(backend, job.config.collective_timeout, job.driver),
        scaling_config=ScalingConfig(
            num_workers=len(placement.nodes),
            use_gpu=bool(placement.gpus),
            resources_per_worker=resources,
            placement_strategy="STRICT_PACK" if len(set(placement.nodes)) == 1 else "PACK",
            label_selector=[{"ray.io/node-id": node} for node in placement.nodes],
        ),
        run_config=RunConfig(
            name="train",
            storage_path=scratch,
            # Duet's controller restarts the workers, after it has looked where there is room.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": build_environment()},
        ),
    )


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


def filter_reachable(nodes: list[Node]) -> list[Node]:
    """Drop nodes that do not answer: Ray takes some seconds to notice that one is gone."""
    import ray

    nodes_of_ray = {node["NodeID"]: node for node in ray.nodes()}
    found = []
    for node in nodes:
        with suppress(OSError, KeyError):
            has = nodes_of_ray[node.id]
            address = (has["NodeManagerAddress"], has["NodeManagerPort"])
            socket.create_connection(address, timeout=2).close()
            found.append(node)
    return found
