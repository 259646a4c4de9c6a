"""Conditions that must hold before Ray is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster import evaluate, train
from cluster.launch.session import refuse_relative
from pipeline.tools.errors import UsageError
from tests.helpers.training_processes import REPOSITORY


def test_the_driver_imports_no_ray_before_it_has_said_where_ray_may_listen():
    """Ray reads `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` at its import: loaded earlier, it listens on
    every interface of the machine."""
    script = (
        "import sys, cluster.train, cluster.launch.controller, cluster.launch.measurement\n"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


def test_in_a_job_relative_folders_are_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    train_words = ["demo", "--data", "here", "--run", "/r"]
    refuse_relative("RUN", "run")  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for path in ("/run", "s3://b/run", "file:///run", str(tmp_path)):
        refuse_relative("RUN", path)
    refuse_relative("DATA", "here", missing=True)
    for main, words, text in (
        (train.main, [*train_words[:2], "data/demo", "--run", "/r"], "DATA data/demo is relative"),
        (train.main, [*train_words[:4], "runs/x"], "--run runs/x is relative"),
        (train.main, [*train_words, "--store", "kept"], "--store kept is relative"),
        (train.main, [*train_words, "--init", "runs/old"], "--init runs/old is relative"),
        (evaluate.main, ["runs/x", "--data", "here"], "RUN runs/x is relative"),
        (evaluate.main, ["/runs/x", "--data", "d"], "DATA d is relative"),
    ):
        with pytest.raises(UsageError, match=text) as refused:
            main(words)
        assert "absolute path on storage that all nodes share" in str(refused.value)
