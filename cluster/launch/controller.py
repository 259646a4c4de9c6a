"""A run kept going: workers placed, watched, and started again until the last step is made.

    while there are steps to make:
        find room for as many replicas as fit          (topology.plan)
        start their workers                            (attempt.Attempt)
        watch until they end: done, failed, or asked to end, because the user wants it, a node is
        about to go, or there is room for more

Whoever is asked to end saves first. Every start and end is a row of RUN/attempts.jsonl.

Why an attempt failed: who went, who complained, and what the user is told.

One start of the workers by Ray Train, and what they tell until they are done.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.launch.channel import Channel
from cluster.launch.placement import (
    Node,
    NoRoom,
    Placement,
    find_draining_nodes,
    get_node_name,
    list_nodes,
    place_workers,
    uses_gpus,
)
from cluster.launch.worker import FAKE_GPUS, WorkerJob, run_worker
from cluster.run.console import RunConsole
from cluster.run.events import Ended, Event, Failed, Finished, Placed, Started, Worker
from cluster.run.folder import ATTEMPTS, ERRORS, read_last_attempt, read_last_step
from cluster.run.sync import DRIVER_FILES, open_mirror
from pipeline.tools.errors import DuetError

DEATHS = ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError", "ActorDiedError")
"""What Ray Train calls a worker that is gone; one that raised an error comes as that error."""


@dataclass
class Failure:
    """What is known of it."""

    workers: tuple[Worker, ...] = ()
    """In job order; empty if they were not placed yet."""
    told: Failed | None = None
    """What the first worker that gave up has told."""
    raised: BaseException | None = None
    """What Ray Train has made of it."""

    @property
    def deaths(self) -> list[str]:
        """The workers that went without a word."""
        errors = getattr(self.raised, "worker_failures", {})
        gone = [rank for rank, error in errors.items() if type(error).__name__ in DEATHS]
        return [self._name(rank) for rank in sorted(gone)]

    def _name(self, rank: int) -> str:
        for worker in self.workers:
            if worker.rank == rank:
                columns = f"column{'s' if ' ' in worker.column else ''} {worker.column}"
                return f"replica {worker.replica}, {columns} (node {worker.node})"
        return f"rank {rank}"

    @property
    def final(self) -> bool:
        """Whether the same would happen again."""
        return self.told is not None and self.told.final

    @property
    def why(self) -> str:
        """The cause in a line, not what it led to: others miss the one that has died."""
        if self.told is not None and (self.told.final or not self.deaths):
            return f"{self.told.worker}: {self.told.text}"
        if self.deaths:
            others = f" and {len(self.deaths) - 1} more" if len(self.deaths) > 1 else ""
            return f"the worker of {self.deaths[0]}{others} died: killed, or out of memory"
        # Ray's own errors begin with lines that only announce the next.
        told = [line.strip() for line in str(self.raised).splitlines() if line.strip()]
        lines = [line for line in told if not line.endswith(":")]
        return (lines or [repr(self.raised)])[0].split(". ")[0]

    def error(self, run: Path, aside: str = "") -> DuetError:
        """Return the error to leave with; RUN/error.log gets the whole story.

        Args:
            run: folder of the run.
            aside: what Ray has said meanwhile, and nobody was shown.
        """
        trace = [self.told.trace] if self.told else []
        if not self.final:
            trace += [str(self.raised), aside]
        text, log = self.why, run / ERRORS
        try:
            body = "\n".join([time.strftime("%F %T"), text, *trace]) + "\n"
            log.write_text(body, encoding="utf-8")
            text = f"{text} (traceback in {os.path.relpath(log)})"
        except OSError:
            pass  # the disk may be what is wrong
        error = DuetError(text)
        if self.told is not None and (self.final or not self.deaths):
            error.exit_code = self.told.exit_code
        return error


POLL = 0.2
"""Seconds between looks for what the workers tell."""
FORWARDED = ("OMP_WAIT_POLICY", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", FAKE_GPUS)
"""Variables that workers need before torch is loaded there, or that Ray does not hand on."""


class WorkerGroup:
    """Workers under way: `events()` until they end, then the other attributes say how."""

    def __init__(
        self, config: Config, data: str, run: Any, plan: Placement, *, measure: bool = False
    ) -> None:
        self.plan = plan
        self.started = self.ended = self.finished = False
        """Whether they have begun; have saved and ended as they were asked to; have done it all."""
        self.failure = Failure()
        """Why it failed, if it did; and the table of workers, when they are placed."""
        self._channel = Channel()
        job = WorkerJob(
            config=config, data=data, run=run, plan=plan, driver=self._channel.address,
            measure=measure,
        )  # fmt: skip
        # A thread: fit() would take Ctrl-C to itself, and this one is busy with the screen.
        self._thread = threading.Thread(target=self._fit, args=(job,), daemon=True)
        self._thread.start()

    def _fit(self, job: WorkerJob) -> None:
        # Ray Train's own notes; it reads them on the driver's node only.
        scratch = tempfile.mkdtemp(prefix="duet-train-")
        try:
            create_trainer(job, scratch).fit()
        except BaseException as error:
            self.failure.raised = error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def ask_to_end(self) -> None:
        """Have the workers save after the step they are at, and end."""
        self._channel.ask_to_end()

    def events(self) -> Iterator[Event | None]:
        """What the workers tell, until they have ended; None now and then, when it is nothing."""
        while True:
            ending = not self._thread.is_alive()
            for event in self._channel.take():
                self._note(event)
                yield event
            if ending:
                return
            yield None
            time.sleep(POLL)

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
            case Failed() if self.failure.told is None:
                self.failure.told = event
            case _:
                pass

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return self.failure.told is not None or self.failure.raised is not None


def create_trainer(job: WorkerJob, scratch: str) -> Any:
    """The Ray Train run of a job."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from cluster.launch.worker import LoopbackConfig

    nodes = job.plan.nodes
    resources: dict[str, float] = {"CPU": job.plan.cpus}
    if job.plan.gpus:
        resources["GPU"] = job.plan.gpus
    cuda = job.plan.gpus and not os.environ.get(FAKE_GPUS)
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=(TorchConfig if "RAY_ADDRESS" in os.environ else LoopbackConfig)(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout_s=job.config.collective_timeout,
        ),
        scaling_config=ScalingConfig(
            num_workers=len(nodes),
            use_gpu=bool(job.plan.gpus),
            resources_per_worker=resources,
            placement_strategy="STRICT_PACK" if len(set(nodes)) == 1 else "PACK",
            label_selector=[{"ray.io/node-id": node} for node in nodes],
        ),
        run_config=RunConfig(
            name="train",
            storage_path=scratch,
            # The supervisor starts again, after it has looked where there is room now.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={
                "env_vars": {name: os.environ[name] for name in FORWARDED if name in os.environ}
            },
        ),
    )


LOOK = 2.0
"""Seconds between looks at the cluster while training."""
SETTLE = 15.0
"""Seconds for which a cluster may need to notice what has ended."""
GROW_AFTER = 10.0
"""Seconds after a start before the run is stopped for the sake of more replicas."""
GRACE = 120.0
"""Seconds that workers have to save when the user wants the run to end."""
STOPPED = "stopped"
"""Why an attempt ended that the user wanted to end."""
TELL_EVERY = 30.0
"""Seconds between lines about a wait."""


class Controller:
    """Keeps one run going; needs a Ray (`ray_session.session`)."""

    def __init__(
        self, config: Config, data: str, run: Path, screen: RunConsole,
        reached: Callable[[], int], aside: Callable[[], str],
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            config: the settings.
            data: folder or address of the data set.
            run: folder of the run.
            screen: gets lines and events.
            reached: step of the newest checkpoint.
            aside: what Ray has said so far.
        """
        self._config, self._data, self._run, self._screen = config, data, run, screen
        self._reached, self._aside = reached, aside
        # Decided once: a run that has lost its GPUs must not creep on on CPUs.
        self._gpu = uses_gpus(config)
        self._mirror = open_mirror(run, config.store)
        self._number = read_last_attempt(run)

    def train(self) -> None:
        """Train to the last step.

        Raises:
            NoRoom: the cluster has none, now or for longer than `node_wait`.
            DuetError: the run failed, `max_failures` times with no new checkpoint between.
            KeyboardInterrupt: the user ended it.
        """
        failures, begun = 0, self._step()
        room = self._first_room()
        with count_interrupts() as end:
            while True:
                attempt = self._attempt(room, end)
                if attempt.finished:
                    return
                if end():
                    raise KeyboardInterrupt
                if attempt.failed:
                    step = self._step()
                    failures, begun = (failures + 1 if step == begun else 1), step
                    if failures > self._config.max_failures or attempt.failure.final:
                        raise attempt.failure.error(self._run, self._aside())
                    self._screen.say(f"{attempt.failure.why}; starting again from step {step}")
                room = self._room(attempt.plan, end)

    def _first_room(self) -> Placement:
        """Find room at once or not at all.

        Only where the run has been under way before, what it held may be about to be free.
        """
        start = time.monotonic()
        while True:
            try:
                return self._plan(list_nodes())
            except NoRoom:
                if self._number == 0 or time.monotonic() - start > SETTLE:
                    raise
            time.sleep(0.5)

    def _attempt(self, room: Placement, end: Callable[[], int]) -> WorkerGroup:
        """Start the workers, and stay until they have ended."""
        self._number += 1
        attempt = WorkerGroup(self._config, self._data, self._run, room)
        asked = StopRequest(attempt, self._screen)
        try:
            for event in attempt.events():
                self._tell(event, attempt)
                if end():
                    asked.by_user()
                elif attempt.started and (why := self._reason(attempt.plan, asked)):
                    asked.to_end(why)
        except KeyboardInterrupt:
            asked.why = STOPPED
            raise
        finally:
            why = "finished" if attempt.finished else asked.why or attempt.failure.why
            self._note("end", step=self._step(), why=why, code=int(not attempt.finished))
        return attempt

    def _tell(self, event: Event | None, attempt: WorkerGroup) -> None:
        """Show what a worker tells, and note a start."""
        if isinstance(event, Placed):
            self._screen.table(event.workers)
        if isinstance(event, Started):
            workers = [asdict(worker) for worker in attempt.failure.workers]
            replicas = attempt.plan.replicas
            self._note(
                "start", step=event.step, total=event.total, replicas=replicas, workers=workers
            )
        if event is not None:
            self._screen.show(event)

    def _step(self) -> int:
        """Step of the newest checkpoint; what it was before, while its disk or store is away."""
        try:
            reached = self._reached()
        except (OSError, DuetError):
            reached = 0
        return max(reached, read_last_step(self._run))

    def _reason(self, now: Placement, asked: StopRequest) -> str:
        """Why the workers should start anew elsewhere; empty if they should not."""
        if not asked.looks():
            return ""
        if leaving := find_draining_nodes() & set(now.nodes):
            return f"node {get_node_name(min(leaving))} is about to go"
        if time.monotonic() - asked.since < GROW_AFTER:
            return ""
        try:
            more = self._plan(list_nodes(now)).replicas
        except NoRoom:
            return ""
        return f"there is room for {more} replicas" if more > now.replicas else ""

    def _plan(self, nodes: list[Node]) -> Placement:
        config = self._config
        return place_workers(nodes, sizes=config.replica_sizes, size=config.size, gpu=self._gpu)

    def _room(self, before: Placement, end: Callable[[], int]) -> Placement:
        """Find room for the next start: as much as there will be when the last one is cleared away.

        Raises:
            NoRoom: there is none for longer than `node_wait` seconds.
            KeyboardInterrupt: the user does not want to wait.
        """
        start, told = time.monotonic(), 0.0
        while True:
            waited = time.monotonic() - start
            try:
                room = self._plan(filter_reachable(list_nodes()))
                if waited > SETTLE or room.replicas >= self._expected(before):
                    return room
            except NoRoom as error:
                if waited > max(SETTLE, self._config.node_wait):
                    raise
                if waited > SETTLE and waited - told > TELL_EVERY:
                    told = waited
                    left = self._config.node_wait - waited
                    self._screen.say(f"waiting {left:,.0f} s more for nodes: {error}")
            if end():
                raise KeyboardInterrupt
            time.sleep(0.5)

    def _expected(self, before: Placement) -> int:
        """Replicas that fit when what the last start held is free again."""
        try:
            return self._plan(filter_reachable(list_nodes(before))).replicas
        except NoRoom:
            return 0

    def _note(self, event: str, **more: Any) -> None:
        row = {"time": round(time.time(), 3), "event": event, "attempt": self._number, **more}
        try:
            with (self._run / ATTEMPTS).open("ab") as file:
                file.write((json.dumps(row) + "\n").encode())
            if self._mirror is not None:
                self._mirror.push_whole(DRIVER_FILES)
        except (OSError, DuetError) as error:
            self._screen.say(f"warning: {self._run / ATTEMPTS} cannot be written ({error})")


class StopRequest:
    """Whether, since when and why the workers of an attempt were asked to end."""

    def __init__(self, attempt: WorkerGroup, screen: RunConsole) -> None:
        self._attempt, self._screen = attempt, screen
        self.since = time.monotonic()
        """When the attempt was begun."""
        self.why = ""
        self._looked = self.since
        self._deadline: float | None = None

    def looks(self) -> bool:
        """Whether it is time to look at the cluster again."""
        if self.why or time.monotonic() - self._looked < LOOK:
            return False
        self._looked = time.monotonic()
        return True

    def to_end(self, why: str) -> None:
        """Have the workers save and end."""
        self.why = why
        self._screen.say(f"{why}: saving, then starting again")
        self._attempt.ask_to_end()

    def by_user(self) -> None:
        """The same because the user wants it, and give up on those that do not.

        Raises:
            KeyboardInterrupt: nothing would be lost (any more), or they take too long.
        """
        if not self._attempt.started or self._attempt.ended:
            raise KeyboardInterrupt
        if self._deadline is None:
            self._deadline = time.monotonic() + GRACE
            self.why = self.why or STOPPED
            self._screen.say("stopping: saving first; once more ends it at once")
            self._attempt.ask_to_end()
        if time.monotonic() > self._deadline:
            raise KeyboardInterrupt


@contextmanager
def count_interrupts() -> Iterator[Callable[[], int]]:
    """Count Ctrl-C and SIGTERM instead of ending at the first; the second raises.

    Yields:
        says how many there were.
    """
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def filter_reachable(nodes: list[Node]) -> list[Node]:
    """Leave out nodes that do not answer: Ray takes some seconds to notice that one is gone."""
    import ray

    addresses = {
        node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()
    }
    found = []
    for node in nodes:
        try:
            socket.create_connection(addresses[node.id], timeout=2).close()
        except (OSError, KeyError):
            continue
        found.append(node)
    return found
