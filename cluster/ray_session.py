"""Workers started, watched and restarted by Ray Train, on a Ray of our own or one that is there.

Ray's part ends here: `run_worker` finds its place and calls `worker.train`, which knows no Ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.events import Event, Failed
from cluster.topology import Node, Plan, plan
from pipeline.errors import DuetError, SetupError

REPOSITORY = Path(__file__).resolve().parent.parent
# Our lines are the only ones on the screen, and what Ray starts listens on this machine only.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon an end, good or bad, is noticed
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for loopback only
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
OPENMP = "OMP_WAIT_POLICY"
SCRATCH = ".ray"
"""Folder in RUN for Ray Train's own notes; gone when the run ends."""
COLLECTIVE_TIMEOUT_S = 300
LOST_STARTS = 10
"""Starts of the workers, a minute each, that may find no room before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is sent."""

    config: Config
    data: str
    run: Path
    plan: Plan
    events: Any
    """ray.util.queue.Queue of events."""


@contextmanager
def session(workers: int, ahead: str | None = "ray.train.torch") -> Iterator[None]:
    """Attach to the Ray that RAY_ADDRESS names, or start one for this run and end it after.

    Args:
        workers: processes of the run; an own Ray has room for as many on any machine.
        ahead: module to import while Ray's own processes start.

    Raises:
        SetupError: Ray cannot be started or reached.
    """
    attached = "RAY_ADDRESS" in os.environ
    for name, value in (QUIET if attached else QUIET | OWN).items():
        os.environ.setdefault(name, value)
    import ray

    if ahead is not None:
        threading.Thread(target=importlib.import_module, args=(ahead,), daemon=True).start()
    scratch = None if attached else Path(tempfile.mkdtemp(prefix="duet-"))
    try:
        _start(ray, scratch, workers)
        signal.signal(signal.SIGTERM, _interrupt)  # after Ray has set its own, which aborts
        yield
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _start(ray: Any, scratch: Path | None, workers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if scratch is not None:
        # Inherited by every process of the own Ray: the workers find this repository.
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        options |= {
            "address": "local",
            "num_cpus": max(workers, len(os.sched_getaffinity(0))),
            "include_dashboard": False,
            "_temp_dir": str(scratch),
        }
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a job brings its code itself
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
    try:
        ray.init(**options)
    except Exception as error:  # a bare one where its processes are too slow to start
        where, way_out = "on this machine", "try again when less runs here"
        if scratch is None:
            where = f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
            way_out = "start one, or unset RAY_ADDRESS"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SetupError(f"no Ray {where} ({reason}); {way_out}") from error


def place_workers(config: Config) -> Plan:
    """Decide where the workers of a run go.

    Raises:
        SetupError: the cluster has no room for them; says what is there and what is missing.
    """
    import ray

    nodes = [
        Node(
            id=node["NodeID"],
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    gpu = config.device == "gpu" or (config.device == "auto" and any(node.gpus for node in nodes))
    return plan(nodes, replicas=config.replicas, size=config.size, gpu=gpu)


class Training:
    """A run under way: `events()` until it ends, then `failure` says how."""

    def __init__(self, config: Config, data: str, run: Path, plan: Plan) -> None:
        from ray.util.queue import Queue

        self.failure: BaseException | None = None
        self._queue = Queue(actor_options={"num_cpus": 0})
        self._job = Job(config=config, data=data, run=run, plan=plan, events=self._queue)
        # A thread: fit() would take Ctrl-C to itself, and this one is busy with the screen.
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            trainer(self._job).fit()
        except BaseException as error:
            self.failure = error

    def events(self) -> Iterator[Event]:
        """What the workers tell, until the run has ended."""
        from ray.util.queue import Empty

        while True:
            ending = not self._thread.is_alive()
            try:
                yield self._queue.get(timeout=0.2)
            except Empty:
                if ending:
                    return


def trainer(job: Job) -> Any:
    """The Ray Train run of a job."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    nodes = job.plan.nodes
    resources: dict[str, float] = {"CPU": job.plan.cpus}
    if job.plan.gpus:
        resources["GPU"] = job.plan.gpus
    one_node = len(set(nodes)) == 1
    shutil.rmtree(job.run / SCRATCH, ignore_errors=True)
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if job.plan.gpus else "gloo",
            timeout_s=COLLECTIVE_TIMEOUT_S,
        ),
        scaling_config=ScalingConfig(
            num_workers=len(nodes),
            use_gpu=bool(job.plan.gpus),
            resources_per_worker=resources,
            placement_strategy="STRICT_PACK" if one_node else "PACK",
            label_selector=[{"ray.io/node-id": node} for node in nodes],
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(job.run / SCRATCH),
            failure_config=FailureConfig(
                max_failures=job.config.max_failures, controller_failure_limit=LOST_STARTS
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
            # Needed before torch is loaded there, which is before anything of ours is.
            worker_runtime_env={"env_vars": {OPENMP: os.environ[OPENMP]}},
        ),
    )


def run_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train calls this in every worker: find the place, then train."""
    from cluster.run_folder import write_machine
    from cluster.worker import train

    job: Job = loop_config["job"]
    where = "a worker"
    try:
        place = find_place(job.plan)
        where = str(place)
        if not job.run.is_dir():
            raise SetupError(f"{job.run} is not on every node; name a --run on shared storage")
        if place.leads:
            write_machine(job.run, place.world_size)
        train(job.config, job.data, job.run, place, job.events.actor.put_nowait.remote)
    except Exception as error:
        job.events.put(as_failed(error, where))
        raise


def find_place(plan: Plan) -> Any:
    """This worker's place, from where the workers were really started."""
    import ray
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from cluster.place import take_place
    from cluster.topology import seats

    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    device = get_device() if plan.gpus else torch.device("cpu")
    if plan.gpus:
        torch.cuda.set_device(device)
    return take_place(seats(nodes, plan.size), device, plan.cpus)


def as_failed(error: Exception, where: str) -> Failed:
    """A worker's exception as an event."""
    known = isinstance(error, DuetError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return Failed(
        text=text.strip().splitlines()[0],
        trace="".join(traceback.format_exception(error)),
        worker=where,
        exit_code=error.exit_code if isinstance(error, DuetError) else 1,
        final=known,
    )
