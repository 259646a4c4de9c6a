"""Workers of one machine: what Ray Train starts for them.

The tests import Ray Train, as that takes four seconds, in each process that collects them.
"""

from __future__ import annotations

import subprocess
import sys

from cluster.launch.gpus import has_driver


def test_a_trainer_of_this_machine_starts_no_helper_that_it_does_not_use():
    """Fails where a release of Ray Train has other names for them: then they would start again."""
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.launch.rendezvous import UNUSED, LoopbackConfig, LoopbackTrainer

    common, own = (
        [type(one).__name__ for one in trainer._create_default_callbacks()]
        for trainer in (
            TorchTrainer(print, torch_config=TorchConfig()),
            LoopbackTrainer(print, backend_config=LoopbackConfig()),
        )
    )
    assert set(UNUSED) <= set(common)
    assert own == [name for name in common if name not in UNUSED]
    assert "BackendSetupCallback" in own


def test_workers_of_this_machine_are_placed_without_an_autoscaler(monkeypatch):
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision
    from ray.train.v2.api.config import ScalingConfig

    from cluster.launch.rendezvous import LoopbackConfig, LoopbackScalingPolicy, LoopbackTrainer

    given = {}
    monkeypatch.setattr(
        LoopbackTrainer.__mro__[1], "_initialize_and_run_controller",
        lambda self, **arguments: given.update(arguments),
    )  # fmt: skip
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    trainer = LoopbackTrainer(print, backend_config=LoopbackConfig(), scaling_config=scaling)
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

    from cluster.launch.rendezvous import LoopbackBackend

    theirs = TorchConfig().backend_cls
    assert LoopbackBackend.share_cuda_visible_devices is theirs.share_cuda_visible_devices


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
