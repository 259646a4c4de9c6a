"""Trainings on three hosts with addresses of their own, and on networks that fail.

The hosts are namespaces of this machine (`tests.helpers.hosts`). Their own name is of no use to
others: 127.0.0.1 on the first, and on the rest the address of docker0, which all of them have.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import status
from tests.helpers.hosts import Host, Network, find_obstacle
from tests.helpers.training_processes import (  # noqa: F401 - a fixture
    REPOSITORY,
    RunningCommand,
    end_processes,
    losses,
    marked,
    tiny_config,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]
HEAD = "10.77.0.1"
DOCKER = "172.17.0.1"
LONG = ("--steps", 100_000, "--checkpoint-every", 20, "--schedule", "manual", "--validate-every", 0)
NO_SPARES = ("--spares", 0)
"""Ray reserves no room for anybody while it waits for an answer of a host that was cut off while it
reserved some there, as for a spare ten seconds after the start."""


class Hosts:
    """Three hosts with a node of Ray and room for a pair each, and a fourth without."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self._folder = network, folder
        self.mark, self.environment = marked(
            PATH=f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin",
            PYTHONPATH=str(REPOSITORY),
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN="a" * 32,
            RAY_USAGE_STATS_ENABLED="0",
            # A node is given up after three seconds of silence, not after half a minute.
            RAY_health_check_initial_delay_ms="1000",
            RAY_health_check_period_ms="1000",
            RAY_health_check_timeout_ms="1000",
            RAY_health_check_failure_threshold="3",
        )
        self.attached = self.environment | {"RAY_ADDRESS": f"{HEAD}:6379"}

    def start_node(self, host: Host) -> None:
        """Start Ray on a host, and wait until it runs."""
        log = self._folder / f"{host.port}.log"
        words = ["--address", f"{HEAD}:6379"]
        if host.address == HEAD:
            words = ["--head", "--port", "6379", "--dashboard-host", HEAD]
        with log.open("w") as out:
            host.start(
                sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                "--node-ip-address", host.address, "--num-cpus", "2", "--disable-usage-stats",
                "--temp-dir", f"{self._folder}/{host.port}", *words,
                environment=self.environment, stdout=out, stderr=out,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def train(self, *words: object, **more: str) -> RunningCommand:
        """Start a training on the first host."""
        command = [sys.executable, "-m", "cluster.train", *map(str, words)]
        return start_on(self.network[0], command, self.attached | more)


def start_on(host: Host, command: list[str], environment: dict[str, str]) -> RunningCommand:
    """Start a command on a host."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return RunningCommand(host.start(*command, environment=environment, **out))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    folder = tmp_path_factory.getbasetemp().parent / "hosts"  # a short path: sockets lie in it
    folder.mkdir(exist_ok=True)
    with Network(4, names=("127.0.0.1", DOCKER)) as network:
        for host in network.hosts:
            for line in (
                "ip link add docker0 type bridge",
                f"ip addr add {DOCKER}/16 dev docker0",
                "ip link set docker0 up",
            ):
                host.run(*line.split())
        made = Hosts(network, folder)
        try:
            for host in network.hosts[:3]:
                made.start_node(host)
            yield made
        finally:
            end_processes(made.mark)


def read_rows(run: Path, event: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def find_nodes(row: dict) -> list[str]:
    """Return the addresses of the workers' nodes."""
    return [re.search(r"\((.*)\)", worker["node"])[1] for worker in row["workers"]]


def test_a_job_from_a_fourth_host_has_a_pair_on_each_of_two_hosts(
    hosts, config, tiny_data, tmp_path
):
    run = tmp_path / "run"
    job = start_on(
        hosts.network[3],
        [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
         f"http://{HEAD}:8265", "--working-dir", ".", "--", "python", "-m", "cluster.train",
         str(config), "--data", str(tiny_data), "--run", str(run), "--replicas", "2",
         "--steps", "6"],
        hosts.environment,
    )  # fmt: skip
    assert job.end() == 0, "\n".join(job.lines)
    assert len(losses(run)) == 6
    (start,) = read_rows(run, "start")
    a, b, c, d = find_nodes(start)
    assert a == b != c == d
    assert {a, c} <= {host.address for host in hosts.network.hosts[:3]}


def test_hosts_that_do_not_reach_each_other_are_named_and_hold_nothing_afterwards(
    hosts, config, tiny_data, tmp_path
):
    """The second and the third host reach the head, but not each other."""
    run = tmp_path / "run"
    words = (config, "--data", tiny_data, "--run", run, "--replicas", 3, "--batch-size", 12)
    for host in hosts.network.hosts[1:3]:
        host.isolate()
    try:
        one = hosts.train(*words)
        one.until("; starting again$")
        assert one.end() == 3, "\n".join(one.lines)
    finally:
        for host in hosts.network.hosts[1:3]:
            host.isolate(False)
    (error,) = (line for line in one.lines if line.startswith("error: "))
    assert re.match(
        r"error: the workers did not meet: node \S+ \(10\.77\.0\.([23])\) cannot reach node \S+ "
        r"\(10\.77\.0\.[23]\) at 10\.77\.0\.(?!\1)[23] \(.*\), and 1 more such paths; open all",
        error,
    ), error
    told = "\n".join([*one.lines, (run / "attempts.jsonl").read_text()])
    for strange in ("ray::", "\x1b", "\\u001b", "more for nodes"):
        assert strange not in told


def test_the_profiler_says_that_a_slow_link_is_what_a_step_waits_for(
    hosts, config, tiny_data, tmp_path
):
    for host in hosts.network.hosts[1:3]:  # a replica is on one of these at least
        host.limit("100mbit")
    try:
        run = tmp_path / "run"
        one = hosts.train(config, "--data", tiny_data, "--run", run, "--replicas", 2, "--measure")
        assert one.end() == 0, "\n".join(one.lines)
    finally:
        for host in hosts.network.hosts[1:3]:
            host.limit()
    shown = "\n".join(one.lines)
    (share,) = re.findall(r"waiting for other replicas .* ms +([\d.]+)%", shown) or [shown]
    assert float(share) > 50, shown


def test_a_token_that_the_head_refuses_is_told_at_once(hosts, config, tiny_data, tmp_path):
    start = time.monotonic()
    one = hosts.train(
        config, "--data", tiny_data, "--run", tmp_path / "run", RAY_AUTH_TOKEN="b" * 32
    )
    assert one.end() == 3
    assert time.monotonic() - start < 30
    (error,) = (line for line in one.lines if line.startswith("error: "))
    assert f"the Ray at {HEAD}:6379 refuses the token of RAY_AUTH_TOKEN" in error
    assert not [line for line in one.lines if "gcs_client" in line]


@pytest.fixture(scope="module")
def training(hosts, config, tiny_data, tmp_path_factory) -> tuple[RunningCommand, Path]:
    """A training of two replicas that goes on, with its run."""
    run = tmp_path_factory.mktemp("long") / "run"
    words = (config, "--data", tiny_data, "--run", run, "--replicas", 2, *LONG, *NO_SPARES)
    one = hosts.train(*words, "--collective-timeout", 60)
    one.until(r"step +\d+  checkpoint")
    return one, run  # it ends with the hosts


def find_victim(hosts: Hosts, run: Path) -> Host:
    """Return a host of the workers that is not the driver's."""
    nodes = find_nodes(read_rows(run, "start")[-1])
    return next(host for host in hosts.network.hosts[1:3] if host.address in nodes)


def wait_for_steps(run: Path, count: int, seconds: float = 60) -> None:
    """Wait until so many more steps are made."""
    before, deadline = len(losses(run)), time.monotonic() + seconds
    while len(losses(run)) < before + count:
        assert time.monotonic() < deadline, f"{len(losses(run)) - before} steps in {seconds} s"
        time.sleep(0.1)


def test_what_holds_the_room_is_named(hosts, training, config, tiny_data, tmp_path):
    words = (config, "--data", tiny_data, "--run", tmp_path / "run", "--batch-size", 12)
    one = hosts.train(*words, "--replicas", 3)
    assert one.end() == 3
    (error,) = (line for line in one.lines if line.startswith("error: "))
    assert re.search(rf"; in use are 4 CPUs by job \w+ \(process \d+ on {HEAD}\)$", error), error


def test_a_partition_that_heals_costs_no_restart(hosts, training):
    _, run = training
    victim = find_victim(hosts, run)
    victim.cut()
    time.sleep(1.5)
    victim.join()
    wait_for_steps(run, 20)
    assert len(read_rows(run, "start")) == 1
    assert read_rows(run, "end") == []


def test_status_says_that_a_slow_link_is_what_a_step_waits_for(hosts, training, capsys):
    _, run = training
    victim = find_victim(hosts, run)
    victim.limit("20mbit")
    try:
        wait_for_steps(run, 5)
    finally:
        victim.limit()
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["reduce"] > 0.5 * row["seconds"], row
    assert status.main([str(run)]) == 0
    (share,) = re.findall(r"([\d.]+)% for\s+the\s+gradients", capsys.readouterr().out)
    assert float(share) > 30


def test_a_run_leaves_a_host_whose_link_is_cut(hosts, training):
    one, run = training
    victim = find_victim(hosts, run)
    victim.cut()
    try:
        again = one.until("; starting again$")
        one.until("^restarted, ", 120)
        wait_for_steps(run, 5)
        assert victim.address not in find_nodes(read_rows(run, "start")[-1])
        assert re.match(r"lost node \S+ \(" + re.escape(victim.address), again), again
    finally:
        victim.join()
