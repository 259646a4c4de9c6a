"""Training as a user starts it: processes, exit codes, what is on the screen, what is in RUN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.train import main
from pipeline.stream.ledger.proof import prove
from tests.helpers.http_servers import Server
from tests.helpers.images import flip_bit
from tests.helpers.training_processes import (  # noqa: F401
    LOOPBACK,
    REPOSITORY,
    SETTINGS,
    STEPS,
    WORKER,
    end_processes,
    listening,
    losses,
    marked,
    processes,
    strangers,
    tiny_config,
    train_processes,
)
from tests.helpers.training_runs import Call, rows, together


@pytest.fixture
def damaged(data: Path) -> Path:
    """The data set with an image that cannot be decoded: sample 23 of train."""
    flip_bit(data, "train", 23)
    return data


@pytest.fixture
def oracle(damaged: Path, tmp_path: Path) -> list[tuple[int, float]]:
    """(position, loss) of every step of the same run by two bare processes: no Ray, no cuts."""
    run = tmp_path / "oracle"
    together(tmp_path / "job", [Call(Config.from_settings(SETTINGS), damaged, run)])
    return losses(run)


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
            start_new_session=True,
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


@pytest.mark.ray
def test_a_remote_set_with_a_damaged_image_outlives_a_killed_worker_and_is_finished(
    command, config, damaged, tmp_path, oracle, monkeypatch, capsys
):
    run = tmp_path / "run"
    with Server(damaged) as server:
        cache = ("--cache", tmp_path / "cache", "--cache-size", "1GB")
        words = (config, "--data", server.address, *cache, "--run", run, "--ledger")
        one = command(*words)
        one.until("checkpoint")
        doors = listening(one.mark)
        assert len(doors) > 10  # Ray's, gloo's and torch's
        assert [door for door in doors if door[1] not in LOOPBACK] == []
        os.kill(train_processes(one.mark)[-1], signal.SIGKILL)
        one.until("restarted, going on from step")
        assert one.end() == 0
        wait_until_gone(one.mark)
        assert losses(run) == oracle  # every step once, and as if nothing had happened
        assert strangers(one.lines) == []
        done, replaced = one.lines[-2:]
        assert done.split() == ["step", str(STEPS), "done"]
        assert (
            f"1 damaged or withdrawn image was replaced by others; {run}/quarantine.jsonl"
            in replaced
        )
        assert {path.name for path in run.iterdir()} == {
            ".lock", ".leader", "attempts.jsonl", "config.toml", "machine.json", "metrics.jsonl",
            "validation.jsonl", "layers.jsonl", "kernels.jsonl", "rates.jsonl", "checkpoints",
            "ledger", "quarantine.jsonl",
        }  # fmt: skip
        proof = prove(damaged, [run])
        assert not proof.findings
        assert "2 attempts on 2 ranks" in proof.summary()
        assert "all identical" in proof.summary()
        assert json.loads((run / "machine.json").read_text())["workers"] == 2
        assert sum(json.loads(row)["replaced"] for row in (run / "metrics.jsonl").open()) > 0
        (row,) = map(json.loads, (run / "quarantine.jsonl").open())
        assert row["sample"] == 23
        assert server.counts["train-000000.tar"] == 1  # two workers, two attempts, one cache

        monkeypatch.setattr("cluster.train.start_ray", None)
        capsys.readouterr()
        assert main([*map(str, words)]) == 0
        finished = f"{run} is finished: step {STEPS} of {STEPS}; nothing to do"
        assert capsys.readouterr().out.splitlines() == [finished]


def wait_until_gone(mark: str) -> None:
    """Wait for the last of a command's processes, half a minute at most."""
    deadline = time.monotonic() + 30
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(mark) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_replica_costs_no_step_and_a_spare_takes_its_place(
    command, config, tiny_data, tmp_path
):
    run = tmp_path / "run"
    words = ("--replicas", 2, "--columns-per-worker", 2, "--checkpoint-every", 5000)
    one = command(config, "--data", tiny_data, "--run", run, *words, "--steps", 20_000)
    one.until("starting: ")
    (spare,) = wait_for_spare(one.mark)
    # Not the leader, whose last row may be lost; the second time the spare is a new one.
    for number in range(2):
        training = train_processes(one.mark)
        assert len(training) == 2
        before = rows(run)[-1]["step"]
        os.kill(training[1], signal.SIGKILL)
        line = one.until("restarted, going on from step")
        assert int(line.split("step ")[1].split()[0].strip(":,")) >= before
        assert training[0] in train_processes(one.mark)  # who lives stays
        assert number or spare in train_processes(one.mark)
        wait_for_spare(one.mark)
    os.killpg(one.process.pid, signal.SIGINT)
    assert one.end() == 130
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert strangers(one.lines) == []


def wait_for_spare(mark: str) -> set[int]:
    """Wait until a spare has imported what it needs; return its process id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        idle = set(processes(mark, WORKER)) - set(train_processes(mark))
        if any(b"libdali" in Path(f"/proc/{pid}/maps").read_bytes() for pid in idle):
            time.sleep(1)
            return idle
        time.sleep(0.2)
    raise AssertionError("no spare")


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(command, config, damaged, tmp_path, oracle):
    run = tmp_path / "run"
    words = (config, "--data", damaged, "--run", run, "--ledger")
    one = command(*words)
    one.until("checkpoint")
    os.killpg(one.process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it, too
    one.until("saved, and ended")
    saved_at = time.monotonic()
    assert one.end() == 130
    assert time.monotonic() - saved_at < 8
    assert strangers(one.lines) == []
    saved = next(line.split()[1] for line in one.lines if line.endswith("saved, and ended"))
    assert f"stopped; the same command resumes from step {saved}" in one.lines
    assert losses(run)[-1][0] == int(saved) * SETTINGS["batch_size"]  # nothing is lost
    wait_until_gone(one.mark)

    two = command(*words)
    two.until("going on from step")
    assert two.end() == 0
    assert losses(run) == oracle
    assert strangers(two.lines) == []
    proof = prove(damaged, [run])
    assert not proof.findings
    assert "2 attempts on 2 ranks" in proof.summary()
