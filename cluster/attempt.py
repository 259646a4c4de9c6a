"""One start of the workers by Ray Train, and what they tell until they are done."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from cluster.config import Config
from cluster.failure import Failure
from cluster.launch.channel import Channel
from cluster.launch.placement import Plan
from cluster.launch.worker import FAKE_GPUS, Job, run_worker
from cluster.run.events import Ended, Event, Failed, Finished, Placed, Started

LOOK = 0.2
"""Seconds between looks for what the workers tell."""
FORWARDED = ("OMP_WAIT_POLICY", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", FAKE_GPUS)
"""Variables that workers need before torch is loaded there, or that Ray does not hand on."""


class Attempt:
    """Workers under way: `events()` until they end, then the other attributes say how."""

    def __init__(
        self, config: Config, data: str, run: Any, plan: Plan, *, measure: bool = False
    ) -> None:
        self.plan = plan
        self.started = self.ended = self.finished = False
        """Whether they have begun; have saved and ended as they were asked to; have done it all."""
        self.failure = Failure()
        """Why it failed, if it did; and the table of workers, when they are placed."""
        self._channel = Channel()
        job = Job(
            config=config, data=data, run=run, plan=plan, driver=self._channel.address,
            measure=measure,
        )  # fmt: skip
        # A thread: fit() would take Ctrl-C to itself, and this one is busy with the screen.
        self._thread = threading.Thread(target=self._fit, args=(job,), daemon=True)
        self._thread.start()

    def _fit(self, job: Job) -> None:
        # Ray Train's own notes; it reads them on the driver's node only.
        scratch = tempfile.mkdtemp(prefix="duet-train-")
        try:
            trainer(job, scratch).fit()
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
            time.sleep(LOOK)

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


def trainer(job: Job, scratch: str) -> Any:
    """The Ray Train run of a job."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from cluster.loopback import LoopbackConfig

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
