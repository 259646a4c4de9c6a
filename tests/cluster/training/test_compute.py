from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cluster.training import precision
from cluster.training.precision import autocast, compute_dtype

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


FAULTS = """
import resource, sys
from cluster.training.precision import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import torch
for round in range(20):
    if round == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is set here")
def test_kept_memory_is_not_fetched_again_from_the_kernel():
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # 16 tensors of 80 MB have 312,500 pages. In one run of four the heap grows once more, by a
    # whole tensor, when a small object comes to lie behind it; not in five runs one after another.
    # Huge pages make the default cheaper on some machines, never free.
    runs = []
    while len(runs) < 5 and min(runs, default=200) >= 200:
        runs.append(faults("keep"))
    assert min(runs) < 200
    assert min(runs) < faults("default")
