"""Training as a user starts it: processes, exit codes, what is on the screen, what is in RUN."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.run_folder import held, settle
from cluster.train import main
from pipeline.errors import UsageError
from pipeline.ledger.proof.exactly_once import prove
from pipeline.manifest import identity
from tests.drawn import flip_bit
from tests.servers import Server
from tests.test_worker import Call, together

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = 80
SETTINGS = {
    "dtype": "float32",
    "width": 0.125,
    "batch_size": 8,
    "steps": STEPS,
    "checkpoint_every": 10,
    "validate_every": 30,
    "max_failures": 1,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in SETTINGS.items()))
    return path


@pytest.fixture(scope="module")
def oracle(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """(position, loss) of every step of the same run by two bare processes: no Ray, no cuts."""
    root = tmp_path_factory.mktemp("oracle")
    together(root / "job", [Call(Config(**SETTINGS), tiny_data, root / "run")])
    return losses(root / "run")


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["position"], row["loss"]) for row in map(json.loads, lines)]


def processes(mark: str, title: str = "") -> list[int]:
    """Living processes that were started, however indirectly, with `mark` in their environment."""
    parents, titles, ours = {}, {}, set()
    for folder in Path("/proc").iterdir():
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = (folder / "cmdline").read_bytes()
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                ours.add(pid)
        except (OSError, ValueError):
            continue
    # Processes that Ray gives a title lose their environment by it; their parents have theirs.
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return [pid for pid in ours if title.encode() in titles.get(pid, b"")]


def end_processes(mark: str) -> None:
    """End what is left of them."""
    for pid in processes(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(**more: str) -> tuple[str, dict[str, str]]:
    """A mark, and an environment with it."""
    value = str(uuid.uuid4())
    environment = {**os.environ, "DUET_TEST": value, **more}
    environment.pop("RAY_ADDRESS", None)
    return f"DUET_TEST={value}", environment


class Command:
    """`python -m cluster.train`, its output line by line, and the processes it started."""

    def __init__(self, *words: object) -> None:
        self.mark, environment = marked(PYTHONPATH=str(REPOSITORY))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.train", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []

    def until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if word in line:
                return line
        raise AssertionError(f"no {word!r} in:\n" + "\n".join(self.lines))

    def end(self) -> int:
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(timeout=60)


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    """Start commands; none of their processes outlives the test."""
    started: list[Command] = []

    def start(*words: object) -> Command:
        started.append(Command(*words))
        return started[-1]

    yield start
    for one in started:
        end_processes(one.mark)
        one.process.wait()


OURS = re.compile(
    r"\S+tiny\.toml -> |48 pictures, |starting: |going on from |restarted after |stopped; "
    r"|interrupted|1 damaged picture|step +\d+  (loss|validation|checkpoint|done)|\S+ is finished|$"
)


def strangers(lines: list[str]) -> list[str]:
    return [line for line in lines if not OURS.match(line)]


@pytest.mark.ray
def test_a_run_outlives_ctrl_c_and_a_killed_worker_and_is_then_finished(
    command, config, tiny_data, tmp_path, oracle
):
    run = tmp_path / "run"
    words = (config, "--data", tiny_data, "--run", run, "--ledger")
    one = command(*words)
    one.until("checkpoint")
    one.process.send_signal(signal.SIGINT)
    assert one.end() == 130
    assert strangers(one.lines) == []
    assert any(line.startswith("stopped; the same command goes on from") for line in one.lines)
    deadline = time.monotonic() + 30
    while processes(one.mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(one.mark) == []

    two = command(*words)
    two.until("going on from step")
    two.until("checkpoint")
    os.kill(processes(two.mark, "ray::RayTrainWorker")[-1], signal.SIGKILL)
    two.until("restarted after a lost worker, going on from step")
    assert two.end() == 0
    assert losses(run) == oracle  # every step once, and as if nothing had happened
    assert strangers(two.lines) == []
    assert two.lines[-1].split() == ["step", str(STEPS), "done"]
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.toml", "machine.json", "metrics.jsonl", "validation.jsonl", "checkpoints",
        "ledger",
    }  # fmt: skip
    proof = prove(tiny_data, [run])
    assert not proof.findings
    assert "3 attempts on 2 ranks" in proof.summary()
    assert "all identical" in proof.summary()
    assert json.loads((run / "machine.json").read_text())["workers"] == 2

    again = command(*words)
    assert again.end() == 0
    assert again.lines == [f"{run} is finished: step {STEPS} of {STEPS}; nothing to do"]


@pytest.mark.ray
def test_a_failure_in_a_worker_is_one_line_and_a_file(command, config, tiny_data, tmp_path):
    one = command(config, "--data", tiny_data, "--run", tmp_path / "run", "--lr", "1e30")
    assert one.end() == 1
    (error,) = strangers(one.lines)
    assert re.match(r"error: replica 0, column [ab]: the loss of step 2 is (nan|inf); ", error)
    assert "error.log)" in error
    assert "Traceback" in (tmp_path / "run" / "error.log").read_text()


@pytest.mark.ray
def test_a_remote_set_with_a_damaged_picture_trains_or_is_refused(
    command, config, tiny_data, tmp_path
):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    flip_bit(data, "train", 23)
    cache = ("--cache", tmp_path / "cache", "--cache-size", "1GB", "--steps", 10)
    with Server(data) as server:
        words = (config, "--data", server.address, *cache)
        strict = command(*words, "--run", tmp_path / "strict", "--strict")
        assert strict.end() == 4
        (error,) = strangers(strict.lines)
        assert re.search(r"train sample 23 \(train-000002\.tar, key 000002_00003\): CRC-32", error)
        mild = command(*words, "--run", tmp_path / "mild")
        assert mild.end() == 0
    run = tmp_path / "mild"
    assert f"1 damaged picture was replaced by others; {run}/quarantine.jsonl" in mild.lines[-1]
    assert sum(json.loads(row)["replaced"] for row in (run / "metrics.jsonl").open()) > 0
    (row,) = map(json.loads, (run / "quarantine.jsonl").open())
    assert row["sample"] == 23
    assert server.counts["train-000000.tar"] == 1  # two workers, two runs, one cache


@pytest.mark.ray
def test_too_few_gpus_is_exit_code_3(command, config, tiny_data, tmp_path):
    one = command(
        config, "--data", tiny_data, "--run", tmp_path / "run", "--device", "gpu",
        "--replicas", 4,
    )  # fmt: skip
    assert one.end() == 3
    (error,) = strangers(one.lines)
    assert "need 8 GPUs" in error
    assert "--device cpu" in error


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


@pytest.mark.ray
def test_a_submitted_job_trains_and_passes_its_exit_code_on(cluster, config, tiny_data, tmp_path):
    run = tmp_path / "run"

    def submit(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".",
                "--", "python", "-m", "cluster.train", str(config), "--data", str(tiny_data),
                "--run", str(run), *flags,
            ],
            cwd=REPOSITORY,
            env=cluster,
            text=True,
            capture_output=True,
            timeout=120,
        )  # fmt: skip

    done = submit("--steps", "4")
    deadline = time.monotonic() + 60
    while "No available agent" in done.stderr and time.monotonic() < deadline:
        time.sleep(1)  # the head listens before it can take jobs
        done = submit("--steps", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(run)) == 4
    assert "Traceback" not in done.stdout + done.stderr
    refused = submit("--steps", "4", "--width", "0.25")
    assert refused.returncode != 0
    assert "width: 0.125 -> 0.25" in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{nowhere}"], "is not a folder; build it"),
        (["--run", "{config}"], "cannot be written"),
        (["--run", "/proc/run"], "cannot be written"),
        (["--width", "0.001"], "width is 0.001; the smallest"),
        (["--batch-size", "7"], "batch_size is 7; it must be a multiple of 2"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_starts(
    config, tiny_data, tmp_path, words, message
):
    names = {"nowhere": tmp_path / "nowhere", "config": config}
    words = [word.format(**names) for word in words]
    argv = [str(config), "--data", str(tiny_data), "--run", str(tmp_path / "run"), *words]
    with pytest.raises(UsageError, match=message) as caught:
        main(argv)
    assert "\n" not in str(caught.value)


def test_a_run_that_another_training_holds_is_refused(config, tiny_data, tmp_path):
    with held(tmp_path), pytest.raises(UsageError, match="in use by another training"):
        main([str(config), "--data", str(tiny_data), "--run", str(tmp_path)])


def test_a_run_with_other_settings_or_data_is_refused(config, tiny_data, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    settle(run, Config(**SETTINGS), identity(tiny_data), samples=48, step=0)
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    shutil.copytree(tiny_data, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UsageError) as caught:
        main([str(config), "--data", str(other), "--run", str(run), "--lr", "0.5", "--seed", "7"])
    message = str(caught.value)
    for words in ("at step 10", "lr: 0.01 -> 0.5", "seed: 0 -> 7", "data set (manifest): "):
        assert words in message
