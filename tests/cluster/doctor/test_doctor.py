"""`python -m cluster.doctor`: what it tells people and machines, and the code it leaves with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.doctor import data, network
from cluster.doctor.command import Examination, format_verdict, main
from cluster.doctor.finding import Finding
from pipeline.tools.errors import UsageError
from tests.helpers.training_processes import REPOSITORY

CONFIG = str(REPOSITORY / "cluster" / "config" / "presets" / "demo.toml")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(data, "SECONDS", 0.2)


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "try_round_trip", lambda backend: Finding(backend, "ok", ""))


@pytest.mark.filterwarnings("ignore:For MPI backend")
def test_a_round_trip_is_made_and_a_broken_one_is_told(tmp_path):
    found = network.try_round_trip("gloo")
    assert (found.status, found.mend) == ("ok", "")
    assert "B/s each way" in found.value
    with pytest.raises(SystemExit):
        network.run_side(0, "mpi", str(tmp_path))
    assert "MPI" in (tmp_path / "error").read_text()


def test_the_command_tells_people_and_machines_and_leaves_with_the_right_code(
    tiny_data, tmp_path, capsys, no_exchange
):
    words = [CONFIG, "--data", str(tiny_data), "--run", str(tmp_path / "run"), "--json"]
    assert main(words) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert set(result) == {"checks", "ok"}
    assert result["ok"] is True
    for check in result["checks"]:
        assert set(check) == {"name", "status", "value", "mend"}
        assert check["status"] in ("ok", "warn")
        assert bool(check["mend"]) == (check["status"] == "warn")
    names = {check["name"] for check in result["checks"]}
    assert names >= {"Python", "torch", "DALI", "packages", "data", "stream", "network", "GPUs",
                     "memory", "worker memory", "run", "gloo", "Ray"}  # fmt: skip
    assert "all well" in told.err
    assert "ok   Python " in told.err
    assert "\x1b" not in told.err  # no terminal, no colours and nothing that moves


def test_one_that_fails_is_code_3_and_has_its_way_out_below(tmp_path, capsys, no_exchange):
    large = tmp_path / "large.toml"
    large.write_text('replicas = 4\nbatch_size = 8\ndevice = "gpu"\n')
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(f'data = "{tmp_path}/nowhere"\n')  # the data set of the run
    assert main([str(large), "--run", str(run)]) == 3
    told = capsys.readouterr().out.splitlines()
    failed = [place for place, line in enumerate(told) if line.startswith("FAIL ")]
    assert {told[place].split()[1] for place in failed} >= {"data"}
    assert all(told[place + 1].startswith("      -> ") for place in failed)
    (room,) = (line for line in told if line[5:].startswith("room "))
    assert room.startswith("FAIL")
    assert "4 replicas of 1 worker need 4 GPUs" in room
    assert told[-1].startswith(f"{len(failed)} problems")


def test_a_config_that_cannot_be_read_is_wrong_usage(tmp_path):
    (tmp_path / "bad.toml").write_text("width = -1.0\n")
    for path in (tmp_path / "none.toml", tmp_path / "bad.toml"):
        with pytest.raises(UsageError):
            main([str(path)])


def test_a_check_that_breaks_is_a_line_and_the_others_go_on(monkeypatch, tmp_path, no_exchange):
    def breaks(*_: object) -> list[Finding]:
        raise RuntimeError("what?\nmore")

    monkeypatch.setattr("cluster.doctor.software.gather", breaks)
    monkeypatch.setattr("cluster.doctor.hardware.gather", breaks)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # another test's head may have just ended
    found_ones = list(Examination("", None, None).findings())
    failed = [found for found in found_ones if found.status == "FAIL"]
    assert [found.name for found in failed] == ["packages", "this machine"]
    assert {found.value for found in failed} == {"the check itself failed: RuntimeError: what?"}
    assert found_ones[-1].name == "Ray"


def test_the_verdict_counts():
    assert format_verdict(0, 0) == "all well"
    assert format_verdict(0, 2) == "all well, 2 to look at"
    assert format_verdict(1, 2).startswith("1 problem,")


def test_a_package_without_which_nothing_is_said_is_named(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('gone', name='tyro')\n")
    done = subprocess.run(
        [sys.executable, "-m", "cluster.doctor"], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "FAIL packages       missing: tyro\n      -> make install" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_nothing_is_left_in_the_run_folder(tmp_path, capsys, no_exchange):
    main(["--run", str(tmp_path / "run")])
    assert list(Path(tmp_path, "run").iterdir()) == []
