"""The manifests of clusters: against Ray's own schema, and what pairs of GPUs need of them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cluster.config_file import parse
from tests.trainings import REPOSITORY

yaml = pytest.importorskip("yaml")
KUBERAY = REPOSITORY / "cluster" / "kuberay" / "rayjob.yaml"
LAUNCHER = REPOSITORY / "cluster" / "launcher" / "aws.yaml"


def release(package: str) -> str:
    pins = (REPOSITORY / "constraints.txt").read_text()
    return re.findall(rf"^{package}==(.+)$", pins, re.M)[0]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load(KUBERAY.read_text())


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    return yaml.safe_load(LAUNCHER.read_text())


def test_the_job_is_a_rayjob_of_the_pinned_ray(job):
    """Held against KubeRay's CRD (commit feeaf72, 2026-08-19) when it was written; it is too large
    to be kept here."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == release("ray")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert set(spec) <= {
        "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "entrypoint", "runtimeEnvYAML", "jobId", "rayClusterSpec",
    }  # fmt: skip
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_AUTH_MODE"] == "token"


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def test_its_pods_hold_whole_pairs_and_share_memory(job):
    head, worker = pods(job)
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) % 2 == 0
    for pod in (head, worker):
        assert pod["resources"]["limits"] == pod["resources"]["requests"]
    assert {"/dev/shm", "/cache"} == {mount["mountPath"] for mount in worker["volumeMounts"]}
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_token_is_asked_for_on_every_pod_and_is_in_no_file(job):
    """KubeRay draws it and hands it to the pods."""
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(job):
        names = {one["name"]: one for one in pod["env"]}
        assert names["RAY_AUTH_MODE"]["value"] == "token"
    for path in (KUBERAY, LAUNCHER):
        assert not re.search(r"(AKIA|ghp_|hf_)[A-Za-z0-9]{10}", path.read_text())


@pytest.mark.parametrize("path", [KUBERAY, LAUNCHER, REPOSITORY / "docs" / "cluster.md"])
def test_its_training_command_is_one(path, monkeypatch):
    """Flags that do not exist would only show when the cluster is up."""
    monkeypatch.chdir(REPOSITORY)
    text = re.sub(r"\s*\\?\n#?\s*(?=--\w)", " ", path.read_text())
    commands = re.findall(r"python -m cluster\.train (configs[^\n`]*)", text)
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert parse(words).settings.batch_size == 128


def test_the_launcher_file_fits_rays_own_schema(launcher):
    ray = pytest.importorskip("ray")
    jsonschema = pytest.importorskip("jsonschema")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(launcher, json.loads(schema.read_text()))
    for node in launcher["available_node_types"].values():
        assert node["resources"].get("GPU", 0) % 2 == 0
    assert launcher["head_node_type"] in launcher["available_node_types"]


def test_the_launchers_head_lets_nobody_in(launcher):
    head = " ".join(launcher["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for commands in (launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r"RAY_JOB\S+ ", "", " ".join(commands))
