"""Training on clusters of several nodes, simulated: pairs, refusals, nodes that go and come."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.config import Config
from pipeline.stream.ledger.proof import prove
from tests.helpers.ray_cluster import Simulated
from tests.helpers.training_processes import REPOSITORY, SETTINGS, tiny_config  # noqa: F401 - a fixture
from tests.helpers.training_runs import Call, learned, together

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Simulated]:
    with Simulated([3, 3]) as running:
        yield running


class Training:
    """`cluster.train` on the cluster, its lines as they come."""

    def __init__(self, cluster: Simulated, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.train", *map(str, words)],
            cwd=REPOSITORY,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def until(self, word: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not any(word in line for line in self.lines):
            assert time.monotonic() < deadline, "\n".join([f"no {word!r} in:", *self.lines])
            assert self.process.poll() is None or self._reader.is_alive(), "\n".join(self.lines)
            time.sleep(0.1)

    def end(self, seconds: float = 120) -> int:
        code = self.process.wait(timeout=seconds)
        self._reader.join()
        return code


def starts(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "start"]


def test_what_cannot_be_placed_is_refused_at_once_with_what_would_fit(
    cluster, config, tiny_data, tmp_path
):
    start = time.monotonic()
    one = Training(cluster, config, "--data", tiny_data, "--run", tmp_path / "run", "--replicas", 4)
    assert one.end() == 3
    assert time.monotonic() - start < 30
    (error,) = (line for line in one.lines if line.startswith("error: "))
    assert "4 replicas of 2 workers need 8 GPUs, 2 of them on one node each time" in error
    assert error.count("3 GPUs") == 2
    assert "2 replicas would fit; use --replicas 2 or" in error


def test_the_doctor_asks_every_node(cluster, config, tiny_data, tmp_path):
    def doctor(path: Path) -> tuple[int, dict[str, tuple[str, str]]]:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.doctor", str(path), "--data", str(tiny_data),
             "--run", str(tmp_path / "run"), "--json"],
            cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        checks = json.loads(done.stdout)["checks"]
        return done.returncode, {one["name"]: (one["status"], one["value"]) for one in checks}

    code, found = doctor(config)
    assert code == 0, found
    assert found["room"] == ("ok", "1 replica of 2 GPU workers on 1 of 3 nodes")
    nodes = [value for name, value in found.items() if name.startswith("node ")]
    assert sorted(nodes) == [
        ("ok", "same packages, sees RUN and DATA"),  # the head
        *[("warn", "3 GPUs: one has no partner")] * 2,
    ]
    assert list((tmp_path / "run").iterdir()) == []  # the mark is gone
    large = tmp_path / "large.toml"
    large.write_text(config.read_text() + "replicas = 4\n")
    code, found = doctor(large)
    assert code == 3
    assert found["room"][0] == "FAIL"
    assert "2 replicas would fit" in found["room"][1]


def test_a_run_shrinks_with_a_lost_node_grows_with_a_new_one_and_is_one_run(
    cluster, config, tiny_data, tmp_path
):
    """Nodes of three GPUs: Ray's own packing would split a pair."""
    run = tmp_path / "run"
    # A rate at which rounding stays rounding: at 0.01 its errors grow tenfold in a few steps, in
    # any two worlds. What a sample's mask or place does to a loss is a hundred times more.
    words = ("--replicas", "1:2", "--ledger", "--steps", 250, "--schedule", "manual", "--lr", 2e-5)
    one = Training(cluster, config, "--data", tiny_data, "--run", run, *words)
    one.until("starting: ")
    one.until("checkpoint")
    cluster.kill(1)
    one.until("restarted, going on from step")
    assert len(starts(run)[1]["workers"]) == 2
    cluster.add(3)
    one.until("there is room for 2 replicas: saving, then starting again")
    assert one.end() == 0
    assert [row["replicas"] for row in starts(run)] == [2, 1, 2]
    for row in starts(run):
        assert [w["column"] for w in row["workers"]] == ["a", "b"] * row["replicas"]
        for a, b in zip(row["workers"][::2], row["workers"][1::2], strict=True):
            assert (a["replica"], a["node"], a["gpu"] + 1) == (b["replica"], b["node"], b["gpu"])
    proof = prove(tiny_data, [run])
    assert proof.findings == ()
    assert set(proof.worlds) == {2, 4}

    settings = Config.from_settings(SETTINGS | {"steps": 250, "schedule": "manual", "lr": 2e-5})
    together(tmp_path / "job", [Call(settings, tiny_data, tmp_path / "fixed")])
    changed, fixed = learned(run), learned(tmp_path / "fixed")
    assert [row[:3] for row in changed] == [row[:3] for row in fixed]
    losses = torch.tensor([[row[3] for row in rows] for rows in (changed, fixed)])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0.01)
    assert (losses[0, 48:] - losses[0, :-48]).abs().mean() > 0.1  # other masks and crops
