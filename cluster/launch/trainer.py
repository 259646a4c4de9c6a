"""Trainer: Ray Train starts the workers of a node, and replaces those that die.

Each worker is a replica group of its own in the terms of Ray Train: when one dies, it starts
another in the same bundle of the placement group, and the others keep their processes. When all
die at once, it starts all of them.

Importing this imports Ray Train, which takes seconds: `Workers` does so once a Ray runs. What is
private to Ray Train is imported here only.
"""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.launch.worker import host_worker

UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Callbacks of Ray Train by the name of their class."""


class WorkerTrainer(DataParallelTrainer):
    """Trainer that starts and returns, without three actors of four CPU seconds each.

    One serves Ray Data's datasets; Duet has none. One frees the room of a controller that was
    killed: `Workers` does. One shares an autoscaler between trainings.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ not in UNUSED]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """Start Ray Train's controller as the base class does, and do not wait for its end."""
        arguments["scaling_policy"] = PlacedScalingPolicy(self.scaling_config)
        here = ray.get_runtime_context().get_node_id()
        create = ray.remote(TrainController).options(
            num_cpus=0,
            label_selector={"ray.io/node-id": here},
            runtime_env={"env_vars": get_env_vars_to_propagate()},
        )
        controller = create.remote(**arguments)
        return SimpleNamespace(error=None, controller=controller, end=controller.run.remote())


class PlacedScalingPolicy(FixedScalingPolicy):
    """Starts the workers without asking an autoscaler for their room: Duet has found it."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no actor."""

    def _maybe_send_resource_request(self) -> None:
        pass


class WorkerBackendConfig(BackendConfig):
    """Configuration of `WorkerBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Backend that Ray Train calls when it has started workers."""
        return WorkerBackend


class WorkerBackend(Backend):
    """Backend with replica groups of one worker; `rendezvous` sets up torch.distributed."""

    has_replica_groups = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Prepare the workers that Ray Train has started: all, or one in place of a dead one."""
        worker_group.execute(ignore_interrupts)


def ignore_interrupts() -> None:
    """Ignore the Ctrl-C of a terminal: the driver gets it, too, and has the workers save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_trainer(
    settings: dict[str, Any],
    node: str,
    size: int,
    resources: dict[str, float],
    environment: dict[str, str],
    scratch: str,
) -> Any:
    """Have Ray Train start workers on a node.

    Args:
        settings: argument of `host_worker`.
        node: Ray's id of the node.
        size: number of workers.
        resources: Ray's resources of each worker.
        environment: variables of the workers' processes.
        scratch: folder for Ray Train's own state; only the driver's node reads it.

    Returns:
        An object with Ray Train's `controller`, and a reference to its `end`.
    """
    return WorkerTrainer(
        host_worker,
        train_loop_config=settings,
        backend_config=WorkerBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            placement_strategy="STRICT_PACK",
            label_selector={"ray.io/node-id": node},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=-1),  # Duet's controller counts them
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": environment},
        ),
    ).fit()
