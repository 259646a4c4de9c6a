"""Packing by tasks of Ray, without a Ray: each task runs here, through what a node runs."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import build_shards
from cluster.launch import task_pool
from pipeline.dataset.manifest import Manifest
from pipeline.options import BuildConfig
from pipeline.packing.additions import add_version
from pipeline.packing.build import library_versions
from pipeline.tools.errors import UsageError
from pipeline.verify import verify
from tests.helpers.images import InProcess, folder_per_class


class NodePool(task_pool.RayPool):
    """A `RayPool` whose tasks run in this process, on pickled jobs, as on another node."""

    ran = 0

    def run(self, task: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        for job in jobs:
            with job.target.create(self._mark) as file:
                file.write(task_pool.platform.node().encode())
            task, job = pickle.loads(pickle.dumps((task, job)))
            NodePool.ran += 1
            yield task_pool.run_job(task, job, self._mark, library_versions())


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "RayPool", NodePool)
    monkeypatch.setattr(task_pool, "end_process_on_hang", lambda: None)
    monkeypatch.setattr(NodePool, "ran", 0)


def test_images_are_added_by_tasks_of_ray_as_by_processes_of_one_machine(
    data, tmp_path, node, capsys
):
    more = folder_per_class(tmp_path / "more", 3, first_seed=900)
    twin = Path(shutil.copytree(data, tmp_path / "twin"))
    words = ["--add", str(more), "--samples-per-shard", "5", "--json"]
    assert build_shards.main([str(data), *words]) == 0
    assert NodePool.ran >= 2  # chunks, then shards
    said = capsys.readouterr()
    assert "version 2" in said.err
    add_version(BuildConfig(out=str(twin), add=str(more), samples_per_shard=5), pool=InProcess())
    assert everything(data) == everything(twin)
    assert verify(data) == []
    before, ran = everything(data), NodePool.ran
    assert build_shards.main([str(data), *words]) == 0  # they are there already
    assert (everything(data), NodePool.ran) == (before, ran)
    assert Manifest.load(data).number == 2
    assert "these images were added as version 2" in capsys.readouterr().err


def test_what_is_to_be_added_must_be_there_and_absolute_in_a_job(data, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="nowhere"):
        build_shards.main([str(data), "--add", str(tmp_path / "nowhere")])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match="--add more is relative"):
        build_shards.main([str(data), "--add", "more"])
