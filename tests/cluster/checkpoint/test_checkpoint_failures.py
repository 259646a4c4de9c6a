"""Disks that are full or gone, and deaths at every moment: a save is whole, or was never there."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.multiprocessing as mp

import cluster.checkpoint.storage as storage
import cluster.checkpoint.writer as writer
from cluster.checkpoint.storage import find_last_step
from cluster.checkpoint.writer import CheckpointManager
from cluster.mesh import ProcessMesh
from cluster.run.folder import CHECKPOINTS
from pipeline.tools.errors import SetupError
from tests.helpers.checkpoints import ABOUT, Run, network, same, steps


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


MOMENTS = ["column a", "column b", "the json", "the rename"]


def failing(monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException) -> None:
    """Have what is written at some moment fail."""
    real = {"save": writer.save_file, "sealed": storage.atomic_write, "rename": Path.rename}

    def fails(*_: object, **__: object) -> NoReturn:
        raise error

    if moment.startswith("column"):
        name = moment.replace(" ", "-")
        monkeypatch.setattr(
            writer,
            "save_file",
            lambda state, path: fails() if name in path.name else real["save"](state, path),
        )
    elif moment == "the json":
        monkeypatch.setattr(storage, "atomic_write", fails)
    else:
        monkeypatch.setattr(Path, "rename", fails)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_a_warning_and_the_next_save_is_made(run, monkeypatch, moment):
    run.save(3, seed=1)
    with monkeypatch.context() as patch:
        failing(patch, moment, OSError(errno.ENOSPC, "No space left on device"))
        run.begin(6, seed=2)
        run.checkpoints.finish()
        (warning,) = run.warnings
        assert "step 6" in warning
        assert "No space left on device" in warning
        assert "the last one is of step 3" in warning
        run.begin(7, seed=2)
        with pytest.raises(SetupError, match=r"step 7 .*No space left.* resumes from step 3"):
            run.checkpoints.finish(must=True)
    assert run.names() == steps(3)
    run.save(9, seed=3)
    assert run.resume()[0].step == 9


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("this process is dead")


def half(state: dict[str, torch.Tensor], path: Path) -> NoReturn:
    REAL(state, path)
    os.truncate(path, 1000)
    die()


REAL = writer.save_file
DEATHS: dict[str, tuple[object, str, object]] = {
    "a column": (writer, "save_file", lambda state, path: half(state, path)),
    "the other": (writer, "save_file", lambda s, p: half(s, p) if "b." in p.name else REAL(s, p)),
    "the json": (storage, "atomic_write", die),
    "the rename": (Path, "rename", die),
    "after it": (storage, "sync_path", die),
    "the removing": (storage.shutil, "rmtree", die),
}


def nursery(folder: Path) -> None:
    """Have a process die at each moment of a save: killed as by `kill -9`."""
    torch.set_num_threads(1)
    for moment, (module, name, action) in DEATHS.items():
        (folder / moment).mkdir()
        if os.fork() == 0:
            run = Run(folder / moment, keep=1)
            run.save(3, seed=1)
            setattr(module, name, action)
            run.save(6, seed=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL, moment


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deaths")
    process = mp.get_context("spawn").Process(target=nursery, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("moment", DEATHS)
def test_a_death_at_any_moment_leaves_a_whole_checkpoint(deaths, moment):
    step = 6 if moment in ("after it", "the removing") else 3
    run = Run(deaths / moment, keep=1)
    assert find_last_step(run.folder, "") == step
    assert len(run.names()) == 2 or moment == "after it"
    mark, state = run.resume()
    assert mark.step == step
    assert same(state, seed=step // 3)
    assert run.warnings == []
    run.save(9, seed=3)
    assert run.names() == steps(9)


def test_a_disk_that_has_gone_is_not_written_to_anew(run):
    run.save(3, seed=1)
    there = run.folder / CHECKPOINTS
    there.rename(run.folder / "away")
    run.begin(6, seed=2)
    run.checkpoints.finish()
    assert "No such file" in run.warnings[0]
    assert not there.exists()
    # Nor does a new start take it for a run that has not begun.
    (run.folder / "attempts.jsonl").write_text('{"attempt": 1, "step": 3}\n{"att')
    run.checkpoints = CheckpointManager(run.folder, ProcessMesh(), ABOUT, run.told.append, keep=1)
    with pytest.raises(SetupError, match=r"holds no checkpoint, but the run had one of step 3"):
        run.checkpoints.resume(*network(seed=99))
    assert not there.exists()
    (run.folder / "away").rename(there)
    run.save(6, seed=2)
    assert run.resume()[0].step == 6


def limited(folder: Path, bytes_: int) -> None:
    """Save with a limit on the size of files, which the kernel enforces."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
    run = Run(folder)
    run.begin(3, seed=1)
    run.checkpoints.finish()
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    run.save(6, seed=2)
    (folder / "told").write_text("\n".join(run.warnings))


def test_what_the_kernel_refuses_is_a_warning(tmp_path):
    process = mp.get_context("spawn").Process(target=limited, args=(tmp_path, 10_000))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "File too large" in (tmp_path / "told").read_text()
    assert Run(tmp_path).resume()[0].step == 6
