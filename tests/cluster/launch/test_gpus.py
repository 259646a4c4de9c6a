"""GPUs that torch cannot use are told before Ray is started, with what mends it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.config import Config
from cluster.launch import gpus, worker
from cluster.launch.gpus import GpuState, count_gpus, find_gpu_fault
from cluster.launch.placement import Placement
from cluster.run.console import RunConsole
from cluster.train import start_ray
from pipeline.tools.errors import SetupError

GOOD = GpuState(cuda="13.0", driver="580.65.06", devices=2)
NONE = GpuState(cuda="13.0")
OLD = {
    "driver": "535.104.05",
    "gpu_error": "The NVIDIA driver on your system is too old (found version 12020)",
}
UNNAMED = {"gpu_error": "No CUDA GPUs are available"}


@pytest.fixture
def have(monkeypatch, request):
    """The state of the machine as torch would see it; two GPUs if torch can use them."""
    monkeypatch.setattr(gpus, "has_driver", lambda: True)
    monkeypatch.setattr(gpus, "gather_gpu_state", lambda: request.param)
    count = 0 if request.param.gpu_error or not request.param.cuda else request.param.devices
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return request.param


@pytest.mark.parametrize(
    ("have", "auto", "words"),
    [
        (replace(GOOD, **OLD), None,
         ["CUDA 13.0 needs a driver from 580 on, here is 535.104.05; make install CUDA=12,"]),
        (replace(GOOD, **OLD | {"driver": "470.1"}), None, ["here is 470.1; update the driver,"]),
        (replace(GOOD, cuda=None), None, ["torch is a CPU build", "pip install -c constraints"]),
        (replace(GOOD, cuda=None, driver="535.1"), None, ["a CPU build", "make install CUDA=12,"]),
        (replace(GOOD, **UNNAMED, visible="7"), None,
         ["CUDA_VISIBLE_DEVICES=7 names none of the 2 GPUs; unset CUDA_VISIBLE_DEVICES,"]),
        (replace(GOOD, gpu_error="system not yet initialized"), None,
         ["torch sees no GPU: system not yet initialized; nvidia-smi,"]),
        # These are no accident: auto takes the CPUs.
        (replace(GOOD, **UNNAMED, visible=""), 0, ["CUDA_VISIBLE_DEVICES hides all GPUs; unset"]),
        (replace(GOOD, **UNNAMED, visible="-1"), 0, ["hides all GPUs"]),
        (replace(GOOD, **UNNAMED, devices=0), 0, ["no access to the GPUs; docker run --gpus all"]),
    ],
    indirect=["have"],
)  # fmt: skip
def test_gpus_that_torch_cannot_use_are_told_in_a_line(have, auto, words):
    with pytest.raises(SetupError) as caught:
        count_gpus("gpu")
    told = str(caught.value)
    assert [word for word in words if word not in told] == []
    assert told.endswith(", or use --device cpu")
    assert "\n" not in told
    assert "#" not in told
    assert count_gpus("cpu") == 0
    if auto is not None:
        assert count_gpus("auto") == auto
        return
    with pytest.raises(SetupError) as caught, start_ray(Config(), RunConsole()):
        raise AssertionError("Ray was started")
    assert str(caught.value) == told
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("have", [replace(GOOD, **OLD)], indirect=True)
def test_a_node_whose_torch_sees_no_gpu_is_named_with_the_reason(have, monkeypatch):
    monkeypatch.setattr(worker, "gather_gpu_state", lambda: have)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(worker.FAKE_GPUS, raising=False)
    placement = Placement(nodes=("m",), cpus=1, gpus=1, size=1)
    member = worker.Membership(rank=0, size=1, gpu=0, visible="0")
    words = r"offers GPUs to Ray, but its torch .* here is 535"
    with pytest.raises(SetupError, match=words) as error:
        worker._choose_device(placement, member)
    assert "make install CUDA=12, or use --device cpu" in str(error.value)
    monkeypatch.setenv(worker.FAKE_GPUS, "1")
    assert worker._choose_device(placement, member) == torch.device("cpu")


@pytest.mark.parametrize(
    ("have", "count"),
    [(GOOD, 2), (replace(GOOD, cuda="12.6", driver="535.1"), 2), (NONE, 0), (GpuState(), 0)],
    indirect=["have"],
)
def test_gpus_that_torch_can_use_are_counted_and_none_are_no_fault(have, count):
    assert find_gpu_fault(have) is None
    assert count_gpus("auto") == count_gpus("gpu") == count
