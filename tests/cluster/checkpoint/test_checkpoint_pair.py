"""A pair saves and loads together, each process its own column."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cluster.checkpoint.writer as writer
from cluster.checkpoint.format import choose_checkpoint
from cluster.mesh import ProcessMesh, create_mesh
from cluster.run.folder import CHECKPOINTS
from pipeline.tools.errors import DuetError
from tests.helpers.checkpoints import Run, network, same, steps
from tests.helpers.processes import run_ranks

REAL = writer.save_file


def slow(mesh: ProcessMesh, go: Path) -> None:
    """Have column b not written before there is a file `go`."""

    def write(*words: Any) -> None:
        while not go.exists():
            time.sleep(0.01)
        REAL(*words)

    if mesh.columns == (1,):
        writer.save_file = write


def plain(folder: Path, mesh: ProcessMesh) -> dict[str, Any]:
    """Column b is slow; training goes on meanwhile, and polls as the loop does."""
    run, turns = Run(folder, mesh=mesh), 0
    slow(mesh, folder / "go")
    run.begin(3, seed=1)
    while mesh.reduce_max(run.checkpoints.is_busy)()[0]:
        turns += 1
        if turns == 5:
            (folder / "go").touch()
    run.checkpoints.finish()
    return {"turns": turns, "pending": run.checkpoints.is_pending, "saved": run.saved}


def left_out(folder: Path, mesh: ProcessMesh) -> dict[str, Any]:
    """Column b takes longer than training waits."""
    run = Run(folder, mesh=mesh)
    writer.PATIENCE, writer.BEAT = 0.2, 0.1
    slow(mesh, folder / "go")
    run.begin(3, seed=1)
    run.begin(6, seed=2)
    pending = run.checkpoints.is_pending
    (folder / "go").touch()
    run.checkpoints.finish(must=True)
    return {"pending": pending, "saved": run.saved, "warnings": run.warnings}


def full(folder: Path, mesh: ProcessMesh) -> dict[str, Any]:
    """Column b's disk is full, twice."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run(folder, mesh=mesh)
    run.save(3, seed=1)
    if mesh.columns == (1,):
        writer.save_file = fails
    run.begin(6, seed=2)
    run.checkpoints.finish()
    run.begin(9, seed=3)
    error = ""
    try:
        run.checkpoints.finish(must=True)
    except DuetError as raised:
        error = str(raised)
    writer.save_file = REAL
    run.save(12, seed=4)
    return {"warnings": run.warnings, "error": error, "saved": run.saved}


def resumed(folder: Path, mesh: ProcessMesh) -> dict[str, Any]:
    """Load what one process has saved (the test did)."""
    mark, state = Run(folder, mesh=mesh).resume()
    return {"step": mark.step, "same": same(state, seed=7), "tensors": len(state)}


def apart(folder: Path, mesh: ProcessMesh) -> dict[str, Any]:
    """The processes see different folders of one name."""
    own = folder / str(mesh.rank)
    own.mkdir()
    if mesh.is_leader:
        Run(own).save(3, seed=1)
    dist.barrier()
    try:
        Run(own, mesh=mesh).resume()
    except DuetError as error:
        return {"error": str(error)}
    return {"error": ""}


SCENES: dict[str, Callable[[Path, ProcessMesh], dict[str, Any]]] = {
    scene.__name__: scene for scene in (plain, left_out, full, resumed, apart)
}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = create_mesh([(0, 1)], torch.device("cpu"), cores=1)
    patience, beat, found = writer.PATIENCE, writer.BEAT, {}
    for name, scene in SCENES.items():
        writer.save_file, writer.PATIENCE, writer.BEAT = REAL, patience, beat
        dist.barrier()
        found[name] = scene(folder / name, mesh)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Findings of each of the two processes in a scene."""
    folder = tmp_path_factory.mktemp("pair")
    for name in SCENES:
        (folder / name).mkdir()
    Run(folder / "resumed").save(5, seed=7)
    run_ranks(work, (folder,), 2)
    tables = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

    def of(name: str) -> list[dict[str, Any]]:
        return [{**table[name], "folder": folder / name} for table in tables]

    return of


def test_both_columns_are_written_while_training_goes_on(seen):
    leader, other = seen("plain")
    assert leader["turns"] == other["turns"] >= 5
    assert leader["pending"] is other["pending"] is False
    assert (leader["saved"], other["saved"]) == ([3], [])
    assert choose_checkpoint(leader["folder"], "", pytest.fail).mark.step == 3


def test_one_process_goes_on_from_what_a_pair_saved(seen):
    mark, state = Run(seen("plain")[0]["folder"]).resume()
    assert mark.step == 3
    assert len(state) == 4 * 16
    assert same(state, seed=1)


def test_a_pair_goes_on_from_what_one_process_saved(seen):
    for table in seen("resumed"):
        assert (table["step"], table["same"], table["tensors"]) == (5, True, 2 * 16)


def test_a_slow_column_has_the_next_save_left_out_but_for_the_last(seen):
    leader, other = seen("left_out")
    assert leader["pending"] is other["pending"] is True
    assert leader["saved"] == [3, 6]
    assert "step 6 is skipped" in leader["warnings"][0]
    assert other["warnings"] == []
    assert Run(leader["folder"]).resume()[0].step == 6


def test_a_full_disk_of_one_column_is_told_by_the_leader_and_fails_the_last_save_of_both(seen):
    leader, other = seen("full")
    (warning,) = leader["warnings"]
    assert "replica 0, column b: No space left on device" in warning
    assert leader["error"] == other["error"]
    assert "resumes from step 3" in leader["error"]
    assert leader["saved"] == [3, 12]
    assert sorted(path.name for path in (leader["folder"] / CHECKPOINTS).iterdir()) == steps(3, 12)


def test_nodes_that_do_not_share_the_folder_are_told_so(seen):
    leader, other = seen("apart")
    assert leader["error"] == ""
    assert "column b cannot read" in other["error"]
    assert "have all nodes see the same folder, or give --store" in other["error"]


def test_a_column_alone_has_what_it_has_among_both(tmp_path):
    """Makes sure that `same` above compares what it should."""
    state = {key: value for key, value in Run(tmp_path).resume()[1].items() if "/a." in key}
    assert same(state, seed=99)
    assert not same(state, seed=1)
    assert network(1)[0].columns == (0, 1)
