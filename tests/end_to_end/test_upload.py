"""The files of a checkout that `ray job submit --working-dir .` uploads, by Ray's own packaging."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.training_processes import REPOSITORY

MOST = 3 * 2**20
"""Bytes of the upload, at most: Ray sends files as they are, uncompressed."""
HOLE = 200 * 2**20
JUNK = (
    "data/set/train-000000.tar", "runs/a/metrics.jsonl", ".venv/lib/torch.so", ".git/objects/x",
    "cluster/__pycache__/x.pyc", ".mypy_cache/y", "weights.safetensors", "notes.ipynb", "x",
    "picture.jpg", "results.bin", "experiments/a.py", "wandb/b.json", "model/c.npy",
    "cluster/x.safetensors", "pipeline/notebook.ipynb", "cluster/run/events.out.tfevents.1",
    "cluster/wandb/a.py", "model/norm/kernels.so", "pipeline/core", "cluster/launch/metrics.jsonl",
)  # fmt: skip
SECRETS = (
    ".env", ".env.local", ".aws/credentials", ".ray/auth_token", "credentials.json", "id.pem",
    "id_rsa", "secrets.toml", "cluster/.env", "cluster/secret.yaml", "cluster/config/presets/a.key",
    "cluster/id_rsa", "cluster/a.pem", "cluster/secrets.toml", "cluster/launch/token",
    "cluster/credentials.json", "cluster/.secret.py", "model/kubeconfig.yaml", "pipeline/.netrc",
)  # fmt: skip


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The upload, unpacked, of a checkout in which somebody works."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    working_dir = pytest.importorskip("ray._private.runtime_env.working_dir")
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("not a git checkout")
    root = tmp_path_factory.mktemp("checkout") / "duet"
    for name in done.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, root / name)
    for name in (*JUNK, *SECRETS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            file.truncate(HOLE)  # takes no room on the disk
    sent = tmp_path_factory.mktemp("upload")

    def pack(folder: str, excludes: list[str], is_file: bool = False) -> None:
        packaging.create_package(
            folder, sent / "package.zip", include_gitignore=True, excludes=excludes
        )

    working_dir.upload_working_dir_if_needed(
        {"working_dir": str(root)}, include_gitignore=True, upload_fn=pack
    )
    assert (sent / "package.zip").stat().st_size < MOST
    with zipfile.ZipFile(sent / "package.zip") as archive:
        archive.extractall(sent / "files")
    return sent / "files"


def test_it_holds_neither_data_nor_secrets_nor_tests(upload):
    names = {str(path.relative_to(upload)) for path in upload.rglob("*") if path.is_file()}
    assert names & {*JUNK, *SECRETS} == set()
    assert {name.split("/")[0] for name in names} == {
        "cluster", "pipeline", "model", "pyproject.toml", "constraints.txt",
    }  # fmt: skip


def test_it_holds_the_whole_of_the_three_packages(upload):
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard",
         "pipeline", "model", "cluster"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    here = {name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()}
    sent = {str(path.relative_to(upload)) for path in upload.rglob("*") if path.is_file()}
    assert here - sent == set()


JOBS = ("cluster.train", "cluster.build_shards", "cluster.evaluate", "cluster.export",
        "cluster.launch.measurement")  # fmt: skip
IMPORTED = """
import importlib.util, pathlib, sys
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
"""


@pytest.mark.slow
def test_the_jobs_start_from_it_alone(upload):
    environment = {**os.environ, "PYTHONPATH": str(upload)}
    subprocess.run(
        [sys.executable, "-c", IMPORTED, str(upload), *JOBS, "cluster.launch.worker"],
        cwd=upload, env=environment, check=True,
    )  # fmt: skip
    for source in ("kernels.c", "kernels.inc"):
        assert (upload / "model" / "norm" / source).is_file()
