from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.training import precision
from cluster.training.precision import autocast, compute_dtype, prepare_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "amx", "dtype"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(wanted, amx, dtype, monkeypatch):
    monkeypatch.setattr(precision, "_has_amx", lambda: amx)
    assert compute_dtype(wanted, CPU) == dtype


def test_autocast_with_float32_changes_nothing():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    with autocast(torch.float32, CPU):
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a @ b).dtype == torch.float32
    with autocast(torch.bfloat16, CPU):
        assert (a @ b).dtype == torch.bfloat16


FLAGS = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
)


@pytest.fixture
def flags() -> Iterator[Callable[[], list[bool]]]:
    """A function that reads torch's settings of a GPU, which are as they were afterwards."""
    before = [getattr(owner, name) for owner, name in FLAGS]
    yield lambda: [getattr(owner, name) for owner, name in FLAGS]
    for (owner, name), value in zip(FLAGS, before, strict=True):
        setattr(owner, name, value)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_on_a_gpu_is_rounded_to_tf32_only_where_asked(tf32, flags, monkeypatch):
    monkeypatch.setattr(precision, "keep_memory", pytest.fail)  # no large tensors in host memory
    for owner, name in FLAGS:
        setattr(owner, name, not tf32)
    prepare_device(torch.device("cuda"), torch.get_num_threads(), tf32)
    assert flags() == [tf32, tf32, True]


def test_a_network_on_a_cpu_keeps_its_memory_and_its_share_of_the_cores(monkeypatch):
    called = []
    monkeypatch.setattr(precision, "keep_memory", lambda: called.append("memory"))
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    prepare_device(CPU, 3)
    assert called == [3, "memory"]


FAULTS = """
import resource, sys
from cluster.training.precision import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import torch
for round in range(30):
    if round == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(9_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is set here")
def test_kept_memory_is_not_fetched_again_from_the_kernel():
    def faults(mode: str) -> int:
        # In a process from its beginning: the heap of a forked one has another history.
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # Up to round ten the heap still grows, where a small object came to lie behind a freed tensor.
    # 15 tensors of 36 MB, of which malloc keeps none by itself, have 131,836 pages. Huge pages make
    # the default cheaper on some machines, never free.
    kept = faults("keep")
    assert kept < 200
    assert kept < faults("default")
