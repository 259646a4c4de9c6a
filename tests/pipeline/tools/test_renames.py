"""Commands answer under their former names, with one line that says the new one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.foreign_shards import copy_of_made, made_by_webdataset  # noqa: F401 - fixtures
from tests.helpers.processes import run_command
from tests.helpers.training_processes import REPOSITORY


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("pipeline.demo_pictures", "pipeline.demo_images"),
        ("pipeline.index", "pipeline.index_shards"),
        ("pipeline.inspect", "pipeline.describe"),
        ("cluster.neighbours.codes", "cluster.experiments.neighbors.codes"),
    ],
)
def test_a_former_name_runs_the_command_and_says_its_name(former, name):
    done = run_command([sys.executable, "-m", former, "--help"], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert f"python -m {name}" in done.stdout
    package = former.removesuffix(".codes")
    assert done.stderr == f"note: {package} is called {name.removesuffix('.codes')} now\n"


def test_the_processes_of_a_command_say_nothing(folder):
    """Python itself starts them: a spawned process imports the command under its former name."""
    command = [sys.executable, "-m", "pipeline.index", str(folder), "--workers", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: ") == 1
