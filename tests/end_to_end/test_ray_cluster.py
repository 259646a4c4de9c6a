"""Trainings, the doctor and metrics on a simulated cluster whose nodes go and come."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cluster.config import Config
from pipeline.stream.ledger.proof import prove
from tests.helpers.http_servers import Server
from tests.helpers.images import flip_bit
from tests.helpers.ray_cluster import Simulated
from tests.helpers.training_processes import (  # noqa: F401 - a fixture
    REPOSITORY,
    SETTINGS,
    RunningCommand,
    sockets,
    strangers,
    tiny_config,
)
from tests.helpers.training_runs import Call, learned, together

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Simulated]:
    with Simulated([3, 3], RAY_metrics_report_interval_ms="500") as running:
        yield running


def train_on(cluster: Simulated, *words: object) -> RunningCommand:
    """Start `cluster.train` on the cluster."""
    return RunningCommand(
        subprocess.Popen(
            [sys.executable, "-m", "cluster.train", *map(str, words)],
            cwd=REPOSITORY, env=cluster.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
    )  # fmt: skip


def starts(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "start"]


def test_what_cannot_be_placed_is_refused_at_once_with_what_would_fit(
    cluster, config, tiny_data, tmp_path
):
    start = time.monotonic()
    one = train_on(cluster, config, "--data", tiny_data, "--run", tmp_path / "run", "--replicas", 4)
    assert one.end() == 3
    assert time.monotonic() - start < 30
    (error,) = (line for line in one.lines if line.startswith("error: "))
    assert "4 replicas of 2 workers need 8 GPUs, 2 of them on one node each time" in error
    assert error.count("3 GPUs") == 2
    assert "--device cpu" in error
    assert "2 replicas would fit; use --replicas 2 or" in error


def isolate(run: Path) -> list[str]:
    """Return the head of a command for which RUN is a file system that no other process sees.

    It is empty where no process may have a file system of its own.
    """
    if not shutil.which("unshare"):
        return []
    over = 'mount -t tmpfs none "$0" && exec "$@"'
    head = ["unshare", *(["-m"] if os.geteuid() == 0 else ["-rm"]), "sh", "-c"]
    tried = subprocess.run([*head, over, str(run), "true"], capture_output=True, check=False)
    return [] if tried.returncode else [*head, over, str(run)]


def test_the_doctor_asks_every_node(cluster, config, tiny_data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()

    def ask_doctor(path: Path, head: list[str]) -> tuple[int, dict[str, dict[str, str]]]:
        done = subprocess.run(
            [*head, sys.executable, "-m", "cluster.doctor", str(path), "--data", str(tiny_data),
             "--run", str(run), "--json"],
            cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        return done.returncode, {one["name"]: one for one in json.loads(done.stdout)["checks"]}

    code, found = ask_doctor(config, [])
    assert code == 0, found
    room = found["room"]
    assert (room["status"], room["value"]) == ("ok", "1 replica of 2 GPU workers on 1 of 3 nodes")
    nodes = [
        (one["status"], one["value"]) for name, one in found.items() if name.startswith("node ")
    ]
    assert sorted(nodes) == [
        ("ok", "same packages, sees RUN and DATA"),  # the head
        *[("warn", "3 GPUs: one has no partner")] * 2,
    ]
    assert list(run.iterdir()) == []  # the mark is gone
    large = tmp_path / "large.toml"
    large.write_text(config.read_text() + "replicas = 4\n")
    alone = isolate(run)
    code, found = ask_doctor(large, alone)
    assert code == 3
    assert found["room"]["status"] == "FAIL"
    assert "2 replicas would fit" in found["room"]["value"]
    assert list(run.iterdir()) == []
    if not alone:
        pytest.skip("needs unshare of util-linux, and the right to mount")
    nodes = [one for name, one in found.items() if name.startswith("node ")]
    assert [(one["status"], one["value"]) for one in nodes] == [("FAIL", f"does not see {run}")] * 3
    assert all("storage that all nodes mount" in one["mend"] for one in nodes)


def test_strict_refuses_a_damaged_image(cluster, config, data, tmp_path):
    flip_bit(data, "train", 23)
    run = tmp_path / "strict"
    flags = ("--cache", tmp_path / "cache", "--cache-size", "1GB", "--steps", 10, "--strict")
    with Server(data) as server:
        one = train_on(cluster, config, "--data", server.address, "--run", run, *flags)
        assert one.end() == 4
    (error,) = strangers(one.lines)
    assert re.search(r"train sample 23 \(train-000002\.tar, key 000002_00003\): CRC-32", error)
    assert re.match(r"error: replica 0, column [ab]: ", error)
    assert "Traceback" in (run / "error.log").read_text()


PUBLISHER = """
import sys, time
import ray
ray.init(log_to_driver=False)
@ray.remote
def publish():
    from cluster.mesh import ProcessMesh
    from cluster.run.exporters import PrometheusGauges
    gauges = PrometheusGauges("a-run", ProcessMesh(columns=(1,), replica=3, replicas=4))
    gauges(7, {"loss": 1.5, "img_s": 640, "unknown": 1})
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    print(node["MetricsExportPort"], file=open(sys.argv[1], "w"), flush=True)
    time.sleep(120)
task = publish.remote()
sys.stdin.read()
"""


def read_page(port: int) -> str:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
        return str(answer.read().decode())
    return ""


def test_the_endpoint_of_a_node_shows_what_a_worker_publishes(cluster, tmp_path):
    noted = tmp_path / "port"
    driver = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER.replace("sys.argv[1]", repr(str(noted)))],
        env=cluster.environment, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        page = ""
        while not {"ray_duet_loss", "ray_duet_images_per_second"} <= set(re.findall(r"\w+", page)):
            assert time.monotonic() < deadline, page
            time.sleep(0.3)
            if noted.exists() and (port := noted.read_text().strip()):
                page = read_page(int(port))
        (line,) = (line for line in page.splitlines() if line.startswith("ray_duet_loss{"))
        assert line.endswith(" 1.5")
        for label in ('run="a-run"', 'replica="3"', 'column="b"'):
            assert label in line, line
        assert "unknown" not in page
        assert {address for address, at, _ in sockets() if at == int(port)} == {"0100007F"}
    finally:
        driver.kill()
        driver.wait()


def test_a_run_shrinks_with_a_lost_node_grows_with_a_new_one_and_is_one_run(
    cluster, config, tiny_data, tmp_path
):
    """Nodes of three GPUs: Ray's own packing would split a pair."""
    run = tmp_path / "run"
    # A rate at which rounding stays rounding: at 0.01 its errors grow tenfold in a few steps, in
    # any two worlds. What a sample's mask or place does to a loss is a hundred times more.
    words = ("--replicas", "1:2", "--ledger", "--steps", 250, "--schedule", "manual", "--lr", 2e-5)
    one = train_on(cluster, config, "--data", tiny_data, "--run", run, *words)
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
