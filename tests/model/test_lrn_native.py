"""Compilation of the kernels: once, cached, done without; on lesser processors, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model.norm import (
    describe_backend,
    local_response_norm,
    native,
    norm_pool,
    spatial_response_norm,
)
from tests.helpers.lrn import by_hand, maps
from tests.helpers.processes import run_command

FAST = ("-std=gnu11", "-O0", "-march=native")
"""Flags with which the kernels compile in half a second instead of six."""
COUNT = (
    "import re\nfrom pathlib import Path\nmaps = Path('/proc/self/maps').read_text()\n"
    "found = set(re.findall(r'/\\S*/lib(?:gomp|iomp5|omp)[-.]\\S*', maps))\n"
    "print('OpenMP libraries:', len(found))"
)
"""Counts the OpenMP libraries that a process has loaded."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, nothing loaded yet, and a compiler that is in a hurry."""
    if not native.prepare_kernels(torch.empty(0)):
        pytest.skip(native.describe())
    monkeypatch.setattr(native, "FLAGS", FAST)
    monkeypatch.setattr(native, "FLAGS_X86", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load_kernels.cache_clear()
    yield tmp_path / "duet"
    native._load_kernels.cache_clear()


def works() -> bool:
    """Check the normalization against the formula; True if compiled kernels computed it."""
    x = maps(2, 96, 5, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(local_response_norm(x, 2), by_hand(x, 2), rtol=1e-12, atol=1e-12)
    return native.prepare_kernels(x)


def said_elsewhere(script: str, run: Callable[..., Any] = run_command) -> str:
    """Run a script in a process of its own, which prints no warning, and return its output."""
    flags = f"native.FLAGS, native.FLAGS_X86 = {native.FLAGS}, {native.FLAGS_X86}"
    script = f"from model.norm import describe_backend, native\n{flags}\n{script}"
    done = run([sys.executable, "-c", script])
    assert done.stderr == ""
    return done.stdout


def test_they_are_compiled_once_in_silence_and_bring_no_openmp(
    cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert works()
    assert describe_backend().startswith("kernels compiled by")
    (kept,) = cache.iterdir()  # and nothing half-made
    made = kept.stat().st_mtime_ns
    # A new process only reads them.
    never = "def never(*arguments): raise AssertionError('compiled again')\n"
    python = partial(subprocess.run, capture_output=True, text=True, check=True)  # no DALI in it
    said = said_elsewhere(
        f"{never}native._compile = never\nprint(describe_backend())\n{COUNT}", python
    )
    assert said.startswith("kernels compiled by")
    assert kept.stat().st_mtime_ns == made
    assert capfd.readouterr() == ("", "")
    # Counted there and not here: scipy, which other tests import, brings another one along.
    assert said.endswith("\nOpenMP libraries: 1\n")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/cc", r"no C compiler \(/nowhere/cc\)"),
        ("false", "CalledProcessError|returned non-zero"),
    ],
)
def test_without_a_compiler_torch_does_it(
    cache: Path, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert not works()
    assert describe_backend().startswith("torch operations")
    assert re.search(reason, describe_backend())


def test_a_compiler_that_fails_is_quoted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo "cc 1.0"\n'
        'echo "kernels.c:1: error: no such file: math.h" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert not works()
    assert "says: kernels.c:1: error: no such file: math.h" in describe_backend()


def test_the_user_can_do_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_KERNELS", "torch")
    assert not works()
    assert describe_backend().endswith("DUET_KERNELS=torch")


def test_a_damaged_file_is_made_anew(cache: Path) -> None:
    assert works()
    (kept,) = cache.iterdir()
    whole = kept.stat().st_size
    kept.unlink()  # not overwritten: this process runs it
    kept.write_bytes(b"\x7fELF, but not for long")
    assert said_elsewhere("print(describe_backend())").startswith("kernels compiled by")
    assert kept.stat().st_size == whole


def test_a_folder_that_others_can_write_to_is_not_trusted(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert works()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("flags", [("-march=x86-64-v2",), ("-march=x86-64-v3",)])
def test_lesser_processors_get_the_same_numbers(
    flags: tuple[str, ...], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("not an x86")
    x = maps(4, 96, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)

    def results() -> list[torch.Tensor]:
        found = []
        runs = (
            partial(local_response_norm, columns=2, relu=True),
            partial(norm_pool, columns=2, relu=True),
            spatial_response_norm,
        )
        for run in runs:
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
            assert leaf.grad is not None
            found += [y.detach(), leaf.grad]
        return found

    best = results()  # of the library that all other tests use
    request.getfixturevalue("cache")
    monkeypatch.setattr(native, "FLAGS", ("-std=gnu11", "-O2", *flags))
    for ours, theirs in zip(results(), best, strict=True):
        assert not native.describe().startswith("torch")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # of up to 400


def test_a_full_disk_is_no_harm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.os, "fsync", no_room)
    assert works()
    assert list(cache.iterdir()) == []
