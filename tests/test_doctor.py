"""What the doctor finds in broken machines, data and clusters, and that it says what mends it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.doctor import exchange, hardware, ray_check, software, storage
from cluster.doctor.command import guarded, main
from cluster.doctor.finding import Finding
from cluster.doctor.hardware import Gpu, Hardware
from cluster.doctor.software import Software
from tests.trainings import REPOSITORY

GOOD = Software(
    python=(3, 12, 1),
    packages=dict.fromkeys(software.PACKAGES, "1.0")
    | {"torch": "2.13.0", "nvidia-dali-cuda130": "2.4.0", "ray": "2.60.0"},
    cuda="13.0",
    driver="580.65.06",
    pins={"numpy": "1.0"},
)
H100 = Gpu(name="H100", free=79 * 10**9, total=80 * 10**9, capability=(9, 0), neighbour=True)
MACHINE = Hardware(
    gpus=[H100, replace(H100, neighbour=None)], cores=16, memory=10**11, shared=10**10,
    files=65536, compiler="/usr/bin/cc",
)  # fmt: skip


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def only(findings: list[Finding]) -> Finding:
    (found,) = (finding for finding in findings if finding.status != "ok")
    assert found.mend
    assert "\n" not in found.value
    return found


def without(*names: str) -> dict[str, str]:
    return {name: release for name, release in GOOD.packages.items() if name not in names}


def test_a_good_machine_has_nothing_to_mend():
    found = [*software.judge(GOOD), *hardware.judge(MACHINE, Config())]
    assert {finding.status for finding in found} == {"ok"}
    assert len(found) > 10


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"python": (3, 10, 2)}, "FAIL", ["Python 3.10.2", "PYTHON=python3.11"]),
        ({"packages": without("nvidia-dali-cuda130")}, "FAIL", ["DALI missing", "make install"]),
        ({"packages": GOOD.packages | {"nvidia-dali-cuda120": "2.4.0"}}, "FAIL",
         ["overwrite each other", "pip uninstall -y nvidia-dali-cuda130 nvidia-dali-cuda120"]),
        ({"cuda": None}, "FAIL", ["a CPU build", "580.65.06", "pip uninstall -y torch"]),
        ({"packages": GOOD.packages | {"ray": "2.61.1"}}, "FAIL", ["Ray 2.61.1", "2.60"]),
        ({"packages": without("webdataset")}, "FAIL", ["missing: webdataset"]),
        ({"pins": {"numpy": "2.0"}}, "warn", ["numpy 1.0 (tested with 2.0)"]),
    ],
)  # fmt: skip
def test_software_that_does_not_go_together_is_named(changes, status, words):
    found = only(list(software.judge(replace(GOOD, **changes))))
    assert found.status == status
    told = f"{found.name} {found.value} {found.mend}"
    assert [word for word in words if word not in told] == []


def test_a_driver_that_is_too_old_fails_both_torch_and_dali():
    found = list(software.judge(replace(GOOD, driver="535.104.05")))
    bad = [finding for finding in found if finding.status == "FAIL"]
    assert [finding.name for finding in bad] == ["torch", "DALI"]
    for finding in bad:
        assert "needs a driver from 580 on, here is 535.104.05" in finding.value
        assert "CUDA=12" in finding.mend
    older = GOOD.packages | {"nvidia-dali-cuda120": "2.4.0"}
    del older["nvidia-dali-cuda130"]
    for_12 = replace(GOOD, driver="535.104.05", cuda="12.8", packages=older)
    assert {finding.status for finding in software.judge(for_12)} == {"ok"}


def test_the_driver_tells_its_release(tmp_path):
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n")
    assert software.driver_in(told) == "535.104.05"
    told.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    assert software.driver_in(told) == "580.65.06"
    assert software.driver_in(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"gpus": [H100, H100, replace(H100, neighbour=None)]}, "warn",
         ["3 (H100): one has no partner", "--columns-per-worker 2"]),
        ({"gpus": [replace(H100, neighbour=False), H100]}, "warn",
         ["GPUs 0 and 1 cannot reach", "topo -m"]),
        ({"gpus": [replace(H100, free=10**10), H100]}, "warn", ["70.0 GB in use", "nvidia-smi"]),
        ({"gpus": [replace(H100, capability=(7, 5)), H100]}, "warn", ["no bfloat16", "float32"]),
        ({"shared": 64 * 2**20}, "warn", ["/dev/shm", "0.1 GB", "--shm-size"]),
        ({"files": 1024}, "warn", ["open files 1024", "ulimit -n"]),
        ({"cores": 1}, "warn", ["cores 1"]),
        ({"gpus": [], "compiler": ""}, "warn", ["C compiler", "apt install gcc"]),
        ({"gpus": [], "memory": 10**8}, "FAIL", ["0.1 GB available", "--microbatch"]),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_named(changes, status, words):
    found = only(list(hardware.judge(replace(MACHINE, **changes), Config())))
    assert found.status == status
    told = f"{found.name} {found.value} {found.mend}"
    assert [word for word in words if word not in told] == []


def test_a_round_trip_is_made_and_a_broken_one_is_told():
    found = exchange.round_trip("gloo")
    assert found.status == "ok"
    assert "GB/s" in found.value
    bad = exchange.round_trip("no such thing")
    assert bad.status == "FAIL"
    assert "no such thing" in bad.value


def test_a_host_name_that_nobody_else_can_use_is_told(monkeypatch):
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    assert only([exchange.interface("here", chosen=False)]).mend.startswith("on a cluster: export")
    assert exchange.interface("here", chosen=True).status == "ok"


def test_data_is_looked_at(tiny_data, tmp_path):
    assert set(statuses(list(storage.judge_data(str(tiny_data), Config()))).values()) == {"ok"}
    for harm, words in (
        (lambda data: (data / "train-000001.tar").unlink(), "train-000001.tar"),
        (lambda data: (data / "train-000001.tar").write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda data: (data / "stats.npz").unlink(), "stats.npz"),
        (lambda data: (data / "manifest.json").unlink(), "manifest"),
    ):
        data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
        harm(data)
        bad = only(list(storage.judge_data(str(data), Config())))
        assert bad.status == "FAIL"
        assert words in bad.value
        shutil.rmtree(data)


def test_a_set_without_validation_pictures_does_not_fit_a_config_that_validates(pictures, tmp_path):
    from tests.drawn import packed

    packed(tmp_path / "data", train=pictures / "train", samples_per_shard=10)
    found = list(storage.judge_data(str(tmp_path / "data"), Config()))
    assert "--validate-every 0" in only(found).mend
    found = list(storage.judge_data(str(tmp_path / "data"), Config(validate_every=0)))
    assert {finding.status for finding in found} == {"ok"}


def test_a_token_for_everybody_and_one_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    path = tmp_path / "auth_token"
    assert only(list(ray_check.token(path, "token"))).status == "FAIL"
    assert list(ray_check.token(path, "")) == []
    path.write_text("secret")
    path.chmod(0o644)
    readable = only(list(ray_check.token(path, "token")))
    assert readable.mend == f"chmod 600 {path}"
    assert "secret" not in readable.value
    path.chmod(0o600)
    assert only(list(ray_check.token(path, ""))).mend == "export RAY_AUTH_MODE=token"
    assert [finding.status for finding in ray_check.token(path, "token")] == ["ok"]


def test_a_job_server_that_does_not_answer(monkeypatch):
    assert ray_check.dashboard("http://127.0.0.1:1").status == "FAIL"
    assert ray_check.dashboard("nonsense").status == "FAIL"


def test_nodes_that_differ_or_do_not_see_the_folders():
    mine = {"Python": "3.12.1", "torch": "2.13.0"}
    good = ray_check.Node(name="a", run=True, data=True, releases=mine, gpus=4)
    answers = {
        "a": good,
        "b": replace(good, run=False),
        "c": replace(good, data=False),
        "d": replace(good, releases={"Python": "3.11.7", "torch": "2.13.0"}),
        "e": "ModuleNotFoundError: No module named 'cluster'",
        "f": replace(good, gpus=3),
    }
    found = {f.name[-1]: f for f in ray_check.nodes_agree(answers, mine, Path("/r"), "/d")}
    assert {name: f.status for name, f in found.items()} == {
        "a": "ok", "b": "FAIL", "c": "FAIL", "d": "FAIL", "e": "FAIL", "f": "warn",
    }  # fmt: skip
    assert found["a"].value == "same packages, sees RUN and DATA"
    assert "does not see /r" in found["b"].value
    assert "--store" in found["b"].mend
    assert "Python 3.11.7, here 3.12.1" in found["d"].value


def test_a_check_that_breaks_is_a_line():
    def breaks() -> list[Finding]:
        raise RuntimeError("what?\nmore")

    (found,) = guarded("x", breaks)
    assert (found.status, found.value) == ("FAIL", "the check itself failed: RuntimeError: what?")


CONFIG = str(REPOSITORY / "configs" / "demo.toml")


def test_the_command_tells_people_and_machines_and_leaves_with_the_right_code(
    tiny_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(exchange, "judge", lambda gpus: [])
    words = [CONFIG, "--data", str(tiny_data), "--run", str(tmp_path / "run"), "--json"]
    assert main(words) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["ok"] is True
    assert {"name", "status", "value", "mend"} == set(result["checks"][0])
    assert "all well" in told.err
    assert "its own, on loopback only" in told.err
    assert main([CONFIG, "--data", str(tmp_path / "nowhere"), "--json"]) == 3
    told = capsys.readouterr()
    assert json.loads(told.out)["ok"] is False
    assert "1 problem, each with what mends it" in told.err
    assert "-> " in told.err


def test_a_config_that_cannot_be_read_is_wrong_usage(tmp_path):
    from pipeline.errors import UsageError

    (tmp_path / "bad.toml").write_text("width = -1.0\n")
    for path in (tmp_path / "none.toml", tmp_path / "bad.toml"):
        with pytest.raises(UsageError):
            main([str(path)])
