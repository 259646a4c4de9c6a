"""The Ray Train loop of examples/: a worker that is killed is started again and resumes exactly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.test_examples import (
    EXAMPLES,
    SMALL,
    check_ledger,
    figures,  # noqa: F401
    read_losses,
)
from tests.helpers.training_processes import end_processes, marked

WORDS = ["--batch-size", "10", "--epochs", "2", "--save-every", "2"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_resumes_exactly(figures: Path, tmp_path: Path):  # noqa: F811
    run, out = tmp_path / "run", tmp_path / "out"
    mark, environment = marked(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    command = [sys.executable, EXAMPLES / "ray_train_loop.py", figures, run, *SMALL, *WORDS]
    with out.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 200
        while 9 not in read_losses(out.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = re.search(r"RayTrainWorker pid=(\d+)", out.read_text())
        assert found, out.read_text()
        os.kill(int(found[1]), signal.SIGKILL)
        assert process.wait(300) == 0, out.read_text()
    finally:
        end_processes(mark)
    check_ledger(figures, run, 100)
    text = out.read_text()
    losses = [re.findall(rf"step {step} of 10: loss ([\d.]+)", text) for step in range(1, 11)]
    assert all(len(set(values)) == 1 for values in losses), losses
    # A worker waits to report until Ray has taken the report before: some checkpoint was there.
    assert len(losses[0]) < max(map(len, losses))
