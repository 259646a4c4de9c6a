"""Process group of the workers: what Ray Train starts for them, and what keeps them from meeting.

The tests import Ray Train, as that takes four seconds, in each process that collects them.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cluster.launch.gpus import has_driver


def test_a_trainer_of_this_machine_starts_no_helper_that_it_does_not_use():
    """Fails where a release of Ray Train has other names for them: then they would start again."""
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.launch.rendezvous import UNUSED, LoopbackTrainer, RendezvousConfig

    common, own = (
        [type(one).__name__ for one in trainer._create_default_callbacks()]
        for trainer in (
            TorchTrainer(print, torch_config=TorchConfig()),
            LoopbackTrainer(print, backend_config=RendezvousConfig()),
        )
    )
    assert set(UNUSED) <= set(common)
    assert own == [name for name in common if name not in UNUSED]
    assert "BackendSetupCallback" in own


def test_workers_of_this_machine_are_placed_without_an_autoscaler(monkeypatch):
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision
    from ray.train.v2.api.config import ScalingConfig

    from cluster.launch.rendezvous import (
        LoopbackScalingPolicy,
        LoopbackTrainer,
        RendezvousConfig,
    )

    given = {}
    monkeypatch.setattr(
        LoopbackTrainer.__mro__[1], "_initialize_and_run_controller",
        lambda self, **arguments: given.update(arguments),
    )  # fmt: skip
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    trainer = LoopbackTrainer(print, backend_config=RendezvousConfig(), scaling_config=scaling)
    trainer._initialize_and_run_controller(scaling_policy=None, callbacks=[])
    policy = given["scaling_policy"]
    assert isinstance(policy, LoopbackScalingPolicy)
    own = {name for name in vars(LoopbackScalingPolicy) if callable(getattr(policy, name))}
    assert own >= {"after_controller_start", "_maybe_send_resource_request"}
    assert [name for name in own if not hasattr(FixedScalingPolicy, name)] == []
    policy.after_controller_start(None)
    decision = policy.make_decision_for_non_running_worker_group()
    assert decision == ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1})
    policy.before_controller_abort()  # there is nothing to cancel


def test_the_backend_shares_gpus_as_that_of_ray_does():
    from ray.train.torch import TorchConfig

    from cluster.launch.rendezvous import RendezvousBackend

    theirs = TorchConfig().backend_cls
    assert RendezvousBackend.share_cuda_visible_devices is theirs.share_cuda_visible_devices


def test_the_driver_imports_no_torch():
    """Five CPU seconds less before the first step, twice: the controller is of the same modules."""
    code = (
        "import sys, cluster.launch.controller, cluster.launch.rendezvous\n"
        "from cluster.launch.gpus import count_gpus, has_driver\n"
        "count = None if has_driver() else count_gpus('auto')\n"
        "print(count, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(None if has_driver() else 0), "False"]


class FakeWorkers:
    """Worker group of Ray Train whose workers are this process, as if on nodes of these names."""

    def __init__(self, *nodes: str) -> None:
        self.nodes = nodes
        self.is_aborted = False

    def __len__(self) -> int:
        return len(self.nodes)

    def execute(self, work, *arguments):
        from cluster.launch.rendezvous import Endpoint

        return [Endpoint(name, name, "127.0.0.1") for name in self.nodes]

    def execute_single_async(self, rank, work, *arguments):
        return work(*arguments)

    def abort(self) -> None:
        self.is_aborted = True


def test_workers_whose_nodes_do_not_reach_each_other_are_ended_and_the_cause_is_told(monkeypatch):
    import ray

    from cluster.launch import rendezvous

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(ray, "get", lambda answers: answers)
        monkeypatch.setattr(rendezvous, "open_door", lambda *_: nobody.getsockname())
        monkeypatch.setattr(rendezvous, "close_door", lambda: None)
        group, told = FakeWorkers("a", "a", "b"), []
        config = rendezvous.RendezvousConfig(driver=SimpleNamespace(tell_now=told.append))
        with pytest.raises(ConnectionError):
            rendezvous.RendezvousBackend().on_start(group, config)
    assert group.is_aborted
    (failed,) = told
    assert failed.worker == "the workers did not meet"
    assert failed.text.startswith(
        "node a cannot reach node a at 127.0.0.1 (Connection refused), and 3 more such paths; open"
    )
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each node" in failed.text
    assert (failed.exit_code, failed.final) == (3, False)


def test_nodes_that_reach_each_other_are_not_told(monkeypatch):
    import ray

    from cluster.launch import rendezvous

    monkeypatch.setattr(ray, "get", lambda answers: answers)
    doors = []
    for _ in range(2):
        doors.append(rendezvous.open_door("127.0.0.1", 2))
        assert rendezvous.try_doors(doors[-1:]) == [""]
        rendezvous.close_door()
    assert rendezvous.try_doors(doors) == ["Connection refused"] * 2
    for nodes in (("a", "a"), ("a",)):
        group = FakeWorkers(*nodes)
        group.execute_single_async = None  # workers of one node have nothing to try
        rendezvous.check_paths(group, group.execute(None))
