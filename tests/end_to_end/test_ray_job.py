"""Training as a job that is submitted to a Ray."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.training_processes import REPOSITORY, end_processes, losses, marked, tiny_config  # noqa: F401 - a fixture


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray of its own that takes jobs, on loopback only; yields the environment to reach it."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="duet-ray-"))  # a short path: Ray's sockets lie in it
    mark, environment = marked(
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_AUTH_MODE="disabled",
        RAY_JOB_STOP_WAIT_TIME_S="30",
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{port}",
    )
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port",
            "0", "--num-cpus", "2", "--dashboard-port", str(port),
            "--dashboard-agent-listen-port", str(free_port()), "--temp-dir", str(folder),
            "--disable-usage-stats",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield environment
    finally:
        end_processes(mark)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


class Jobs:
    """`ray job` on that cluster."""

    def __init__(self, cluster: dict[str, str], config: Path, data: Path) -> None:
        self._cluster, self._words = cluster, (str(config), "--data", str(data))

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
            cwd=REPOSITORY,
            env=self._cluster,
            text=True,
            capture_output=True,
            timeout=120,
        )

    def submit(self, run: Path, *flags: str, name: str = "") -> subprocess.CompletedProcess[str]:
        waits = ("--no-wait", "--submission-id", name) if name else ()
        return self(
            "submit", *waits, "--working-dir", ".", "--", "python", "-m", "cluster.train",
            *self._words, "--run", str(run), *flags,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_trains_passes_its_exit_code_on_and_saves_when_it_is_stopped(
    cluster, config, tiny_data, tmp_path
):
    jobs, run = Jobs(cluster, config, tiny_data), tmp_path / "run"
    done = jobs.submit(run, "--steps", "4")
    deadline = time.monotonic() + 60
    while "No available agent" in done.stderr and time.monotonic() < deadline:
        time.sleep(1)  # the head listens before it can take jobs
        done = jobs.submit(run, "--steps", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(run)) == 4
    assert "Traceback" not in done.stdout + done.stderr
    refused = jobs.submit(run, "--steps", "4", "--width", "0.25")
    assert refused.returncode != 0
    assert "width: 0.125 -> 0.25" in refused.stdout + refused.stderr

    long = tmp_path / "long"
    flags = ("--steps", "100000", "--checkpoint-every", "100000", "--schedule", "manual")
    assert jobs.submit(long, *flags, name="long").returncode == 0
    deadline = time.monotonic() + 90
    while not ((long / "metrics.jsonl").exists() and losses(long)):
        assert time.monotonic() < deadline, jobs("logs", "long").stdout
        time.sleep(0.2)
    assert jobs("stop", "long").returncode == 0
    (saved,) = (long / "checkpoints").iterdir()
    assert saved.name == f"step-{len(losses(long)):08d}"
    log = jobs("logs", "long").stdout
    assert "stopping: saving first" in log
    assert f"stopped; the same command resumes from step {len(losses(long))}" in log
