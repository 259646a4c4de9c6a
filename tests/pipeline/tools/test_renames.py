"""Commands answer under their former names, with one line that says the new one."""

from __future__ import annotations

import sys

import pytest

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
