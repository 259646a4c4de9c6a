"""The manifests of clusters: against Ray's own schema, and what pairs of GPUs need of them."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_settings
from cluster.train import parse_command
from tests.helpers.training_processes import REPOSITORY

yaml = pytest.importorskip("yaml")
KUBERAY = REPOSITORY / "examples" / "deploy" / "rayjob.yaml"
LAUNCHER = REPOSITORY / "examples" / "deploy" / "aws.yaml"


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
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == release("ray")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"working_dir"}


def strict(schema: Any) -> Any:
    """A schema of Kubernetes, with names that it does not know as errors."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    if isinstance(found.get("properties"), dict) and "type" in found:
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no schema")
def test_the_job_fits_kuberays_own_schema(job):
    """KUBERAY_CRD: what `kubectl get crd rayjobs.ray.io -o yaml` prints; 1.4 MB, so not kept here.

    1.5.1, 1.6.2 and 1.7.0 were tried when the manifest was written.
    """
    jsonschema = pytest.importorskip("jsonschema")
    crd = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator(schema).validate(job)


CONTAINER = {
    "name", "image", "env", "envFrom", "ports", "resources", "lifecycle", "volumeMounts",
}  # fmt: skip
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
SPEC = {
    "submissionMode", "jobId", "backoffLimit", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "entrypoint", "runtimeEnvYAML", "rayClusterSpec",
}  # fmt: skip


def test_the_job_has_only_names_that_were_held_against_the_schema(job):
    """So that a slip is found without the schema, too. New names: run the test above, add them."""
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"].keys() == SPEC
    assert cluster.keys() == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == GROUP
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod.keys() <= {"containers", "volumes", "terminationGracePeriodSeconds"}
        (container,) = pod["containers"]
        assert container.keys() <= CONTAINER
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}
        assert all(isinstance(one["value"], str) for one in container["env"])


def test_a_pod_that_ends_leaves_time_to_save(job):
    head, worker = pods(job)
    (wait,) = [one["value"] for one in head["env"] if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    stop = head["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert f" {job['spec']['jobId']} " in stop
    for group in (job["spec"]["rayClusterSpec"]["headGroupSpec"],
                  *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]):  # fmt: skip
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > int(wait)
    stay = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert f"seq {wait})" in stay[-1]
    assert subprocess.run([*stay[:-1], "-n", stay[-1]]).returncode == 0  # it can be parsed


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
    commands = re.findall(r"python -m cluster\.train ((?:dexp|demo)[^\n`]*)", text)
    assert commands
    for command in commands:
        words = shlex.split(command)
        preset = load_settings(Path(words[0])).get("batch_size", 128)
        assert parse_command(words).settings.batch_size == preset


def test_the_launcher_file_passes_rays_own_checks(launcher):
    util = pytest.importorskip("ray.autoscaler._private.util")
    whole = util.prepare_config(copy.deepcopy(launcher))
    util.validate_config(whole)
    assert launcher.keys() <= whole.keys()
    head = launcher["head_node_type"]
    for name, node in launcher["available_node_types"].items():
        assert (node["resources"].get("GPU", 0) == 0) == (name == head)
        assert node["resources"].get("GPU", 0) % 2 == 0
        # A group that Ray would make lets in SSH from anywhere; its image is from 2018.
        assert {"SecurityGroupIds", "ImageId"} <= node["node_config"].keys()


def test_the_launchers_head_lets_nobody_in(launcher):
    head = " ".join(launcher["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for commands in (launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r"RAY_JOB\S+ ", "", " ".join(commands))
