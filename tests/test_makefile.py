"""Commands of `make install`: torch and DALI of one CUDA, also where another was installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.training_processes import REPOSITORY

CU126 = "--index-url https://download.pytorch.org/whl/cu126 torch"


def dry_run(venv: Path, *words: str) -> str:
    """Return the commands of `make install`, or its message."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CUDA", "VENV")
    }
    done = subprocess.run(
        ["make", "-n", "install", f"VENV={venv}", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "has", "lacks"),
    [
        ((), ["constraints.txt  torch\n", "'.[cuda13]'"], ["--index-url", "uninstall"]),
        (("CUDA=13",), ["constraints.txt  torch\n", "'.[cuda13]'"], ["--index-url", "uninstall"]),
        (("CUDA=12",), [CU126, "'.[cuda12]'"], ["uninstall"]),
        (("CUDA=12", "TORCH_INDEX=https://mirror/x"), ["--index-url https://mirror/x torch"],
         ["download.pytorch.org"]),
        (("CUDA=11",), ["CUDA=11: torch and DALI have builds for CUDA 12 and 13"], ["pip install"]),
    ],
)  # fmt: skip
def test_torch_and_dali_are_of_the_same_cuda(words, has, lacks, tmp_path):
    told = dry_run(tmp_path, *words)
    assert [text for text in has if text not in told] == []
    assert [text for text in lacks if text in told] == []


def test_another_cuda_replaces_both_and_stays(tmp_path):
    for name in (".made", ".installed"):
        (tmp_path / name).touch()
    assert "pip" not in dry_run(tmp_path)
    told = dry_run(tmp_path, "CUDA=12")
    assert "uninstall -qq -y torch nvidia-dali-cuda130 nvidia-dali-cuda120" in told
    assert told.index("uninstall") < told.index(CU126) < told.index("'.[cuda12]'")
    assert f"touch {tmp_path}/.cuda12" in told
    (tmp_path / ".cuda12").touch()  # as that command would
    assert "pip" not in dry_run(tmp_path)
    assert "pip" not in dry_run(tmp_path, "CUDA=12")
    back = dry_run(tmp_path, "CUDA=13")
    assert back.index("uninstall") < back.index("constraints.txt  torch\n")
    assert "--index-url" not in back
    assert f"rm -f {tmp_path}/.cuda12" in back
