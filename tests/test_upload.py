"""What `ray job submit --working-dir .` uploads of a checkout, by Ray's own packaging."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.trainings import REPOSITORY

MOST = 2**20
LOOK = (
    "cluster/kuberay/", "cluster/launcher/", "cluster/grafana/", "cluster/report/",
    "cluster/status.py", "cluster/run_state.py", "pipeline/inspect/",
    "pipeline/verification/", "pipeline/verify.py", "pipeline/demo_",
)  # fmt: skip
"""What is for people who look at things, not for jobs."""


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the upload of a checkout in which somebody works."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    root = tmp_path_factory.mktemp("checkout") / "duet"
    for name in tracked():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    for junk in ("data/set/train-000000.tar", "runs/a/metrics.jsonl", ".venv/lib/torch.so",
                 "cluster/__pycache__/x.pyc", ".mypy_cache/y", "weights.safetensors", ".env",
                 "notes.ipynb", "id.pem", "picture.jpg"):  # fmt: skip
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(bytes(3 * MOST))
    out = tmp_path_factory.mktemp("upload") / "package.zip"
    packaging.create_package(
        str(root), out, include_gitignore=True, logger=logging.getLogger("quiet")
    )
    assert out.stat().st_size < MOST
    with zipfile.ZipFile(out) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_it_holds_all_that_workers_need(package):
    needed = {
        name
        for name in tracked()
        if name.split("/")[0] in ("cluster", "pipeline", "model", "configs")
        and not name.startswith(LOOK)
    }
    assert {"cluster/worker.py", "model/norm/kernels.c", "configs/dexp.toml"} <= needed
    assert needed - package == set()


def test_it_holds_neither_data_nor_secrets_nor_tests(package):
    kinds = {Path(name).suffix for name in package}
    assert kinds <= {".py", ".toml", ".txt", ".md", ".c", ".inc", ".yaml", ".json", ".html", ".css",
                     ".js", ".j2", ".h", ""}  # fmt: skip
    folders = {name.split("/")[0] for name in package if "/" in name}
    assert folders == {"cluster", "pipeline", "model", "configs"}
    tops = {name for name in package if "/" not in name}
    assert tops <= {"pyproject.toml", "constraints.txt"}


def test_what_jobs_run_needs_nothing_that_is_left_out(package):
    """By what they import, in a process that sees the upload only."""
    code = f"""
import sys
left_out = {tuple(name.replace("/", ".").removesuffix(".py").rstrip(".") for name in LOOK)!r}
import cluster.train, cluster.build_shards, cluster.evaluate, cluster.export, cluster.worker
import cluster.supervisor, cluster.ray_worker, pipeline.build_shards
print([name for name in sys.modules if name.startswith(left_out)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
