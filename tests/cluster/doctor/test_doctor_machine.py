"""Findings of the doctor on broken machines, each with what mends it: pure judgements."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace

import pytest
import torch

from cluster.config import Config
from cluster.doctor import hardware, job, network, software
from cluster.doctor.finding import Finding
from cluster.doctor.hardware import Gpu, Hardware
from cluster.doctor.software import Software
from cluster.launch import gpus
from cluster.launch.placement import estimate_memory
from model.norm import response
from pipeline.throughput.nvidia_smi import parse_smi, select_rows
from tests.helpers.training_processes import REPOSITORY

RANGES = software.read_ranges(REPOSITORY / "pyproject.toml")
GOOD = Software(
    python=(3, 12, 1),
    packages=dict.fromkeys(RANGES, "2099.1")
    | {"torch": "2.13.0", "nvidia-dali-cuda130": "2.4.0", "ray": "2.60.0"},
    ranges=RANGES,
    cuda="13.0",
    driver="580.65.06",
    devices=2,
    pins={"numpy": "2099.1"},
)
del GOOD.packages["nvidia-dali-cuda120"]
H100 = Gpu(name="H100", free=79 * 10**9, total=80 * 10**9, capability=(9, 0), has_peer_access=True)
PAIR = [H100, replace(H100, has_peer_access=None)]
MACHINE = Hardware(
    cores=16, memory=10**11, shared=10**10, files=65536, temporary_free=10**11, vectors="AVX512",
    kernels="kernels compiled by gcc",
)  # fmt: skip


def only(findings: list[Finding]) -> Finding:
    (found,) = (finding for finding in findings if finding.status != "ok")
    assert found.mend
    assert "\n" not in found.value + found.mend
    return found


def without(*names: str) -> dict[str, str]:
    return {name: release for name, release in GOOD.packages.items() if name not in names}


def lacks(found: Finding, words: list[str]) -> list[str]:
    told = f"{found.name} {found.value} {found.mend}"
    return [word for word in words if word not in told]


def test_a_good_machine_has_nothing_to_mend():
    found = [
        *software.judge(GOOD),
        *hardware.judge_gpus(PAIR, needs_gpu=True),
        *hardware.judge(MACHINE, own_ray=True),
        *job.judge_local_job(Config(), 1000, MACHINE, PAIR),
    ]
    assert [finding for finding in found if finding.status != "ok"] == []
    assert len(found) > 12
    assert {f.name: f.value for f in found}["open files"] == "65,536"


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"python": (3, 10, 2)}, "FAIL", ["Python 3.10.2", "PYTHON=python3.11"]),
        ({"packages": without("torch")}, "FAIL", ["torch is missing", "make install"]),
        ({"packages": without("nvidia-dali-cuda130")}, "FAIL", ["DALI is missing", "CUDA=12"]),
        ({"packages": GOOD.packages | {"nvidia-dali-cuda120": "2.4.0"}}, "FAIL",
         ["overwrite each other", "pip uninstall -y nvidia-dali-cuda130 nvidia-dali-cuda120"]),
        ({"broken": {"nvidia.dali": "libcuda.so.1: no such file"}}, "FAIL",
         ["DALI", "does not load: libcuda.so.1", "--force-reinstall"]),
        ({"cuda": None}, "FAIL", ["a CPU build", "580.65.06", "pip uninstall -y torch"]),
        ({"packages": GOOD.packages | {"ray": "2.61.1"}}, "FAIL",
         ["2.61.1", "<2.61", "pip install -c constraints.txt 'ray[default,train]'"]),
        ({"packages": GOOD.packages | {"torch": "2.9.1"}}, "FAIL", ["torch 2.9.1", ">=2.11"]),
        ({"packages": without("webdataset", "safetensors")}, "FAIL",
         ["missing: webdataset, safetensors", "make install"]),
        ({"packages": without("webdataset"), "pins": {}}, "FAIL",
         ["missing: webdataset", "pip install", "[cuda13]'"]),
        ({"packages": GOOD.packages | {"numpy": "1.26.4"}, "pins": {}}, "FAIL",
         ["numpy 1.26.4 (>=2)", "pip install numpy"]),
        ({"pins": {"numpy": "2.4.6"}}, "warn", ["numpy 2099.1 (tested with 2.4.6)"]),
        ({"gpu_error": "no devices", "visible": ""}, "warn",
         ["unset CUDA_VISIBLE_DEVICES"]),
        ({"gpu_error": "no devices", "devices": 0}, "warn", ["docker run --gpus all"]),
        ({"gpu_error": "system not yet initialized"}, "FAIL",
         ["sees no GPU: system not yet initialized", "nvidia-smi", "fabricmanager"]),
        ({"gpu_error": "No CUDA GPUs are available", "visible": "GPU-7"}, "FAIL",
         ["CUDA_VISIBLE_DEVICES=GPU-7 names none of the 2 GPUs", "nvidia-smi -L"]),
    ],
)  # fmt: skip
def test_software_that_does_not_go_together_is_named(changes, status, words):
    found = only(list(software.judge(replace(GOOD, **changes))))
    assert found.status == status
    assert lacks(found, words) == []


def test_a_driver_that_is_too_old_fails_both_torch_and_dali():
    found = list(software.judge(replace(GOOD, driver="535.104.05")))
    bad = [finding for finding in found if finding.status == "FAIL"]
    assert [finding.name for finding in bad] == ["torch", "DALI"]
    for finding in bad:
        assert "needs a driver from 580 on, here is 535.104.05" in finding.value
        assert finding.mend.startswith("make install CUDA=12 ")
    older = without("nvidia-dali-cuda130") | {"nvidia-dali-cuda120": "2.4.0"}
    for_12 = replace(GOOD, driver="535.104.05", cuda="12.8", packages=older)
    assert {finding.status for finding in software.judge(for_12)} == {"ok"}
    cpu = only(list(software.judge(replace(for_12, cuda=None))))
    assert cpu.mend == "make install CUDA=12"
    for finding in software.judge(replace(for_12, driver="470.223.02")):
        if finding.name in ("torch", "DALI"):
            assert "needs a driver from 525 on, here is 470.223.02" in finding.value
            assert finding.mend == "update the driver"


def test_the_driver_tells_its_release(tmp_path):
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n")
    assert gpus.read_driver_release(told) == "535.104.05"
    told.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    assert gpus.read_driver_release(told) == "580.65.06"
    assert gpus.read_driver_release(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("cards", "status", "words"),
    [
        ([], "FAIL", ['device = "gpu"', "--device auto"]),
        ([H100, H100, replace(H100, has_peer_access=None)], "warn",
         ["3 (H100): one has no partner", "--columns-per-worker 2"]),
        ([replace(H100, has_peer_access=False), H100], "warn",
         ["GPUs 0 and 1 cannot reach", "topo -m"]),
        ([replace(H100, free=10**10, users=("41 python",)), H100], "warn",
         ["GPU 0", "70 GB of 80 GB in use by 41 python", "nvidia-smi"]),
        ([H100, replace(H100, capability=(7, 5))], "warn", ["GPU 1", "no bfloat16", "float32"]),
        ([replace(H100, is_mig=True), H100], "warn", ["MIG", "--columns-per-worker 2", "-mig 0"]),
        ([replace(H100, is_built_for=False), H100], "FAIL", ["no code for H100 (9.0)", "CUDA=12"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gpu_is_named(cards, status, words):
    found = only(list(hardware.judge_gpus(cards, needs_gpu=True)))
    assert found.status == status
    assert lacks(found, words) == []


def test_one_gpu_is_a_good_machine_too():
    """MIG is no matter there: nothing has to join two instances."""
    alone = [replace(H100, has_peer_access=None, is_mig=True)]
    found = [
        *hardware.judge_gpus(alone, needs_gpu=True),
        *job.judge_local_job(Config(), 1000, MACHINE, alone),
    ]
    assert {finding.status for finding in found} == {"ok"}
    (room,) = (finding.value for finding in found if finding.name == "room")
    assert room == "1 replica of 1 GPU worker on 1 of 1 node; one GPU here: both columns on it"


def test_the_kernels_of_a_gpu_need_a_compiler_and_pythons_headers(tmp_path, monkeypatch):
    none = hardware.judge_compiler("", tmp_path)
    gone = hardware.judge_compiler("icc -O2", tmp_path)
    bare = hardware.judge_compiler(sys.executable, tmp_path)
    for finding, words in (
        (none, ["no C compiler (CC, gcc, clang)"]),
        (gone, ["no C compiler (icc -O2)"]),
        (bare, [f"{tmp_path} has no Python.h"]),
    ):
        assert finding.status == "warn"
        assert lacks(finding, [*words, "apt install gcc python3-dev"]) == []
    (tmp_path / "Python.h").touch()
    assert hardware.judge_compiler(sys.executable, tmp_path).status == "ok"
    monkeypatch.setenv("CC", "icc -O2")
    assert hardware.find_compiler() == "icc -O2"


def test_kernels_that_do_not_run_on_the_gpu_are_told(monkeypatch):
    def refuse(x: object) -> None:
        raise RuntimeError("gcc: exit status 1\nmore")

    judge = hardware.judge_gpu_kernels
    assert judge("Triton kernels", "").status == "ok"
    missing = judge("torch operations, as triton is not installed", "")
    assert (missing.status, missing.mend) == ("warn", "pip install -c constraints.txt triton")
    slow = judge("torch operations, as Triton does not launch: no gcc", "")
    assert (slow.status, slow.mend.startswith('as the line "compiler" says')) == ("warn", True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1, 4, 2, 2))
    monkeypatch.setattr(response, "local_response_norm", refuse)
    broken = judge(*hardware.try_gpu_kernels())
    assert broken.status == "FAIL"
    assert lacks(broken, ["Triton's do not work: gcc: exit status 1", "TRITON_CACHE_DIR"]) == []


def test_no_gpus_are_no_matter_where_none_are_wanted():
    assert [finding.status for finding in hardware.judge_gpus([], needs_gpu=False)] == ["ok"]


def test_what_nvidia_smi_says_is_read():
    apps = f"GPU-ab, 123, python\nGPU-ab, {os.getpid()}, python\nGPU-cd, 7, /usr/bin/x\n\n"
    assert hardware.list_users(parse_smi(apps), "ab") == ("123 python",)
    assert hardware.list_users(parse_smi(apps), "") == ()
    modes = parse_smi("GPU-ab, Enabled\nGPU-cd, [N/A]\n")
    assert select_rows(modes, "ab") == [["Enabled"]]


def test_a_gpu_that_torch_was_not_built_for_is_told():
    built = ["75", "80", "90", "100"]
    assert [hardware.has_code(built, c) for c in ((7, 0), (8, 9), (9, 0), (12, 0), (6, 1))] == [
        False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"shared": 64 * 2**20}, "warn", ["/dev/shm 67.1 MB free", "--shm-size"]),
        ({"files": 1024}, "warn", ["open files 1,024", "ulimit -n"]),
        ({"cores": 1, "has_quota": True}, "warn", ["cores 1", "container's quota", "--cpus"]),
        ({"memory": 10**9, "has_memory_limit": True}, "warn",
         ["memory", "container's limit", "--memory"]),
        ({"temporary_free": 10**8}, "warn", ["temporary", "100 MB free", "TMPDIR"]),
        ({"temporary_full": 0.97}, "warn", ["97% full"]),
        ({"temporary": "/scratch/jobs/somebody/1234567/tmp"}, "FAIL",
         ["too long for Ray's sockets", "TMPDIR=/tmp"]),
        ({"gpus": 2, "has_infiniband": True, "locked": 65536}, "warn",
         ["locked memory", "ulimit -l unlimited"]),
        ({"kernels": "torch operations, as there are no compiled kernels: no C compiler (gcc)"},
         "warn", ["no C compiler", "apt install gcc"]),
        ({"kernels": "torch operations, as there are no compiled kernels: DUET_KERNELS=torch"},
         "warn", ["unset DUET_KERNELS"]),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_named(changes, status, words):
    found = only(list(hardware.judge(replace(MACHINE, **changes), own_ray=True)))
    assert found.status == status
    assert lacks(found, words) == []


def test_the_longest_temporary_folder_is_the_one_in_which_sockets_can_be():
    session = "duet-abcdefgh/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    longest = hardware.SOCKET_PATH - hardware.RAY_SUFFIX
    for length, status, reason in (
        (longest, "ok", FileNotFoundError), (longest + 1, "FAIL", OSError),
    ):  # fmt: skip
        folder = "/" + "x" * (length - 1)
        found = list(hardware.judge(replace(MACHINE, temporary=folder), own_ray=True))
        assert [f.status for f in found if f.name == "temporary"] == [status]
        with socket.socket(socket.AF_UNIX) as one, pytest.raises(reason) as error:
            one.bind(f"{folder}/{session}")  # the kernel, or Python before it, says which it is
        assert type(error.value) is reason, error.value


@pytest.mark.parametrize(
    ("settings", "cards", "status", "words"),
    [
        ({"replicas": 2}, PAIR, "FAIL", ["need 4 GPUs", "1 replica would fit", "--replicas 1"]),
        ({"device": "gpu"}, [], "FAIL", ["needs 1 GPU;", "--device cpu"]),
        ({"columns_per_worker": 1}, [H100], "FAIL", ["2 GPUs", "--columns-per-worker 2"]),
        ({"replicas": 16}, [], "warn", ["32 workers take turns on 16", "--replicas"]),
        ({"batch_size": 65536}, [], "FAIL", ["worker memory", "--microbatch"]),
        ({"batch_size": 65536}, PAIR, "FAIL", ["worker memory", "of 79 GB free", "--microbatch"]),
    ],
)
def test_a_job_that_does_not_fit_this_machine_is_told_with_what_would(
    settings, cards, status, words
):
    found = only(list(job.judge_local_job(Config.from_settings(settings), 1000, MACHINE, cards)))
    assert found.status == status
    assert lacks(found, words) == []


def test_the_memory_of_a_worker_is_that_of_the_paper_with_gradient_and_velocity():
    both = estimate_memory(Config(), 1000, size=1).count_bytes(128)
    parameters, neurons = 60_965_224, 659_272  # of the paper's network, as facts/alexnet.md has it
    assert both == 4 * (3 * parameters + 2 * neurons * 128)
    half = estimate_memory(Config(), 1000, size=2).count_bytes(128)
    assert half == pytest.approx(both / 2, rel=1e-3)


def test_a_network_that_the_classes_do_not_fit_is_told():
    assert job.judge_network(Config(), 10).status == "ok"
    assert job.judge_network(Config(), 1).status == "FAIL"


ADDRESSES = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "ens5": ["10.1.0.7"]}


def test_the_interface_of_the_workers_is_told(monkeypatch):
    found = network.judge_interface("10.1.0.7", {}, ADDRESSES)
    assert (found.status, found.value.split(",")[0]) == ("ok", "ens5")
    assert network.judge_interface("", {}, ADDRESSES).value.startswith("lo: ")
    behind = network.judge_interface("203.0.113.9", {}, ADDRESSES)
    assert behind.status == "warn"
    assert lacks(behind, ["203.0.113.9", "GLOO_SOCKET_IFNAME=NAME", "docker0, ens5"]) == []
    for variables, status in (
        ({"GLOO_SOCKET_IFNAME": "ens5"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "FAIL"),
        ({"GLOO_SOCKET_IFNAME": "en"}, "FAIL"),
        ({"GLOO_SOCKET_IFNAME": "ens5", "NCCL_SOCKET_IFNAME": "en,ib"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "ens5", "NCCL_SOCKET_IFNAME": "=en"}, "FAIL"),
        ({"GLOO_SOCKET_IFNAME": "ens5", "NCCL_SOCKET_IFNAME": "^docker"}, "ok"),
    ):
        found = network.judge_interface("10.1.0.7", variables, ADDRESSES)
        assert found.status == status, variables


def test_this_machine_is_known_by_the_address_from_which_it_reaches_the_head():
    assert network.find_own_address("10.1.0.7:6379", ADDRESSES) == "10.1.0.7"  # it is the head
    assert network.find_own_address("127.0.0.2:6379", ADDRESSES).startswith("127.0.0.")
    assert network.find_own_address("no-such-host.invalid:6379", ADDRESSES) == ""


def test_a_host_name_that_nobody_else_can_use_is_told(monkeypatch):
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    found = network.judge_host_name("here", True)
    assert found.status == "warn"
    assert lacks(found, ["here is 127.0.1.1", "/etc/hosts", "workers do without"]) == []
    assert network.judge_host_name("here", False).status == "ok"
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.1.0.7")
    assert network.judge_host_name("here", True).status == "ok"


def test_two_processes_that_do_not_meet_are_told():
    assert network.judge_round_trip("gloo", False, "fast", "").status == "ok"
    for stuck, result, why in (
        (True, "", ""), (True, "fast", ""), (False, "", ""), (False, "fast", "b: reset"),
    ):  # fmt: skip
        found = network.judge_round_trip("nccl", stuck, result, why)
        assert found.status == "FAIL"
        assert "NCCL_DEBUG=INFO" in found.mend
        assert (why or "a") in found.value
