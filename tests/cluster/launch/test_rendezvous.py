"""Workers of one machine: what Ray Train starts for them."""

from __future__ import annotations

from ray.train.torch import TorchTrainer

from cluster.launch.rendezvous import UNUSED, LoopbackConfig, LoopbackTrainer


def test_a_trainer_of_this_machine_starts_no_helper_that_it_does_not_use():
    """Fails where a release of Ray Train has other names for them: then they would start again."""
    common, own = (
        [type(one).__name__ for one in kind(print, torch_config=LoopbackConfig())
         ._create_default_callbacks()]
        for kind in (TorchTrainer, LoopbackTrainer)
    )  # fmt: skip
    assert set(UNUSED) <= set(common)
    assert own == [name for name in common if name not in UNUSED]
    assert "BackendSetupCallback" in own
