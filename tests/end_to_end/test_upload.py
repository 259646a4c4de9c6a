"""What `ray job submit --working-dir .` uploads of a checkout, by Ray's own packaging."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.training_processes import REPOSITORY

MOST = 2**20
JUNK = (
    "data/set/train-000000.tar", "runs/a/metrics.jsonl", ".venv/lib/torch.so", ".git/objects/x",
    "cluster/__pycache__/x.pyc", ".mypy_cache/y", "weights.safetensors", "notes.ipynb", "x",
    "picture.jpg", "results.bin", "experiments/a.py", "wandb/b.json", "model/c.npy",
)  # fmt: skip
SECRETS = (
    ".env", ".env.local", ".aws/credentials", ".ray/auth_token", "credentials.json", "id.pem",
    "id_rsa", "secrets.toml", "cluster/.env", "cluster/deploy/secret.yaml", "cluster/configs/a.key",
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
            file.truncate(200 * MOST)  # a hole: takes no room
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
    here = {path.name for path in (REPOSITORY / "cluster/configs").glob("*.toml")}
    assert {
        name.removeprefix("cluster/configs/")
        for name in names
        if name.startswith("cluster/configs/") and "studies" not in name
    } == here


JOBS = ("cluster.train", "cluster.build_shards", "cluster.evaluate", "cluster.export",
        "cluster.launch.measurement")  # fmt: skip
IMPORTED = """
import importlib.util, pathlib, sys
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
"""


def test_the_jobs_start_from_it_alone(upload):
    environment = {**os.environ, "PYTHONPATH": str(upload)}
    subprocess.run(
        [sys.executable, "-c", IMPORTED, str(upload), *JOBS, "cluster.launch.worker"],
        cwd=upload, env=environment, check=True,
    )  # fmt: skip
    for source in ("kernels.c", "kernels.inc"):
        assert (upload / "model" / "norm" / source).is_file()


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("pipeline", "model", "cluster"):
                yield name


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_nothing_in_it_imports_what_was_left_out(upload):
    missing = {
        (str(path.relative_to(upload)), name)
        for path in upload.rglob("*.py")
        for name in imports(path)
        if is_module(REPOSITORY, name) and not is_module(upload, name)
    }
    assert missing == set()
