"""What Ray's endpoint shows of a run, and the dashboard that draws it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster.run.exporters import GAUGES, TAGS
from tests.end_to_end.test_ray_job import free_port
from tests.helpers.training_processes import REPOSITORY, end_processes, marked

DASHBOARD = json.loads((REPOSITORY / "cluster" / "deploy" / "duet.json").read_text())
NAMES = {f"ray_{name}" for name, _ in GAUGES.values()}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it():
    asked = {name for expr in expressions() for name in re.findall(r"ray_duet_\w+", expr)}
    assert asked == NAMES
    for expr in expressions():
        chosen = re.findall(r"ray_duet_\w+\{([^}]*)\}", expr)
        assert len(chosen) == expr.count("ray_duet_"), expr
        for labels in chosen:  # every metric by the variables of the dashboard
            pairs = [re.fullmatch(r'(\w+)=~"\$(\w+)"', label) for label in labels.split(", ")]
            assert all(pair and pair[1] == pair[2] and pair[1] in TAGS for pair in pairs), labels
            assert 'run=~"$run"' in labels
        for labels in re.findall(r"by \(([^)]*)\)", expr):
            assert set(labels.split(", ")) <= set(TAGS)
    variables = {entry["name"]: entry for entry in DASHBOARD["templating"]["list"]}
    assert set(TAGS) <= set(variables)
    for tag in TAGS:
        assert re.fullmatch(rf"label_values\(ray_duet_step.*, {tag}\)", variables[tag]["query"])


def test_what_a_legend_names_is_left_by_the_sum():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            kept = re.findall(r"by \(([^)]*)\)", target["expr"])[0].split(", ")
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(kept)


def test_its_panels_lie_beside_each_other_within_the_grid():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


SCRIPT = """
import sys, time, urllib.request
import ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1,
         _metrics_export_port=int(sys.argv[1]))
@ray.remote
def worker():
    from cluster.mesh import ProcessMesh
    from cluster.run.exporters import PrometheusGauges
    gauges = PrometheusGauges("a-run", ProcessMesh(columns=(1,), replica=3, replicas=4))
    gauges(7, {"loss": 1.5, "img_s": 640, "unknown": 1})
    time.sleep(120)
task = worker.remote()
print("up", flush=True)
sys.stdin.read()
"""


def listening(port: int) -> set[str]:
    """Addresses, as the kernel writes them, on which somebody listens at a port."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]
    ]
    return {
        address
        for address, _, its_port in (
            fields[1].partition(":") for fields in lines if fields[3] == "0A"
        )
        if int(its_port, 16) == port
    }


@pytest.mark.ray
def test_the_endpoint_of_a_node_shows_what_a_worker_publishes():
    port = free_port()
    mark, environment = marked(
        PYTHONPATH=str(REPOSITORY),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_AUTH_MODE="disabled",
        RAY_metrics_report_interval_ms="500",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "up"
        found = ""
        for _ in range(60):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
                    found = answer.read().decode()
            except OSError:
                found = ""
            if "ray_duet_loss" in found and "ray_duet_images_per_second" in found:
                break
            subprocess.run(["sleep", "0.5"], check=True)
        (line,) = (line for line in found.splitlines() if line.startswith("ray_duet_loss{"))
        assert line.endswith(" 1.5")
        for label in ('run="a-run"', 'replica="3"', 'column="b"'):
            assert label in line, line
        assert "unknown" not in found
        assert listening(port) == {"0100007F"}  # 127.0.0.1, and nowhere else
    finally:
        end_processes(mark)
        process.wait()
