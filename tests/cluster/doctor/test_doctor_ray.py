"""Findings of the doctor on broken clusters, each with what mends it."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.doctor import ray_cluster, ray_probe
from tests.cluster.doctor.test_doctor_machine import lacks, only
from tests.helpers.training_processes import REPOSITORY

TOKEN = {"RAY_AUTH_MODE": "token"}


def test_a_token_for_everybody_and_one_that_is_missing(tmp_path):
    path = tmp_path / "auth_token"
    where = {"RAY_AUTH_TOKEN_PATH": str(path)}

    def judged(clients: bool = True, **more: str) -> list:
        return list(ray_cluster.judge_token(where | more, clients))

    missing = only(judged(**TOKEN))
    assert missing.status == "FAIL"
    assert "ray get-auth-token --generate > /dev/null" in missing.mend  # it would print the token
    assert judged() == []
    path.write_text("secret")
    path.chmod(0o644)
    readable = only(judged(**TOKEN))
    assert (readable.status, readable.mend) == ("warn", f"chmod 600 {path}")
    assert "secret" not in readable.value
    path.chmod(0o600)
    assert only(judged()).mend == "export RAY_AUTH_MODE=token"
    assert [finding.status for finding in judged(clients=False)] == ["ok"]
    assert [finding.status for finding in judged(**TOKEN)] == ["ok"]
    assert only(judged(RAY_AUTH_MODE="disabled")).status == "warn"
    assert judged(clients=False, RAY_AUTH_MODE="disabled") == []
    (given,) = judged(RAY_AUTH_TOKEN="secret", **TOKEN)
    assert given.status == "ok"
    assert "secret" not in given.value


class Guarded(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401 if self.path == "/api/version" else 500)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_job_server_is_asked_whether_it_is_there():
    with http.server.HTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert ray_cluster.judge_job_server(address).status == "ok"
        assert ray_cluster.judge_job_server(f"{address}/elsewhere").status == "FAIL"
        assert ray_cluster.judge_address(f"127.0.0.1:{server.server_port}").status == "ok"
        server.shutdown()
    gone = ray_cluster.judge_job_server("http://127.0.0.1:1")
    assert gone.status == "FAIL"
    assert "ssh -L 8265" in gone.mend
    assert "no http://" in ray_cluster.judge_job_server("127.0.0.1:8265").value


def test_a_huge_file_in_the_upload_of_a_job_is_named(tmp_path):
    (tmp_path / "cluster" / "run").mkdir(parents=True)
    (tmp_path / "cluster" / "run" / "a.py").write_bytes(b"x")
    for name in ("weights.safetensors", "huge.py"):
        assert ray_cluster.judge_upload(tmp_path).status == "ok"
        with (tmp_path / "cluster" / "run" / name).open("wb") as file:
            file.truncate(ray_cluster.UPLOAD)
    found = ray_cluster.judge_upload(tmp_path)
    assert (found.status, "huge.py (105 MB)" in found.value) == ("FAIL", True)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", ["does not answer (Connection refused)", "ray start --head"]),
        ("http://head:8265", ["export RAY_API_SERVER_ADDRESS=http://head:8265"]),
        ("ray://head:10001", ["ray job submit"]),
        ("head", ["has no port", "export RAY_ADDRESS=head:6379"]),
    ],
)
def test_an_address_that_leads_nowhere_is_told_at_once(address, words):
    found = only(list(ray_cluster.judge({"RAY_ADDRESS": address, "RAY_AUTH_TOKEN_PATH": "/none"})))
    assert found.status == "FAIL"
    assert lacks(found, words) == []


def test_without_an_address_it_is_said_what_listens_where():
    found = list(ray_cluster.judge({"RAY_AUTH_TOKEN_PATH": "/none"}))
    assert "loopback only (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in found[0].value


def test_what_a_stopped_head_has_left_behind_is_told(tmp_path, monkeypatch):
    path = tmp_path / "ray_current_cluster"
    assert list(ray_cluster.judge_old_address(path)) == []
    path.write_text("127.0.0.1:1")
    assert only(list(ray_cluster.judge_old_address(path))).mend == f"rm {path}"
    path.write_text("127.0.0.1:no port")  # half written, or not Ray's
    found = only(list(ray_cluster.judge_old_address(path)))
    assert (found.status, found.mend) == ("warn", f"rm {path}")
    assert "which does not answer" in found.value
    assert "int()" not in found.value
    monkeypatch.setattr(ray_cluster, "try_connection", lambda address: "")
    assert list(ray_cluster.judge_old_address(path)) == []


REQUEST = {"run": "/r", "mark": ".m", "data": "/d", "address": "s3://k:secret@b/x", "code": "/c"}
MINE = {"Python": "3.12.1", "torch": "2.13.0", "DALI": "2.4.0"}
SEES = {
    "releases": MINE, "run": True, "disk": 10**12, "own": ".m.1", "data": True, "address": "",
    "devices": 4, "files": 65536, "shared": 10**10, "code": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"releases": MINE | {"Python": "3.11.7"}}, "FAIL", ["Python 3.11.7, here 3.12.1"]),
        ({"releases": {"Python": "3.12.1", "torch": "2.13.0"}}, "FAIL", ["DALI is missing"]),
        ({"run": False}, "FAIL", ["does not see /r", "--store s3://"]),
        ({"cannot_write": "Read-only file system"}, "FAIL", ["cannot write in /r (Read-only"]),
        ({"own": ".m.2"}, "FAIL", ["what it writes in /r does not arrive here"]),
        ({"data": False}, "FAIL", ["does not see /d"]),
        ({"address": "NoCredentialsError: s3://k:secret@b/x"}, "FAIL",
         ["NoCredentialsError", "--runtime-env-json"]),
        ({"devices": 3}, "warn", ["Ray was started with 4 GPUs, and there are 3", "--num-gpus 3"]),
        ({"code": False}, "warn", ["ray job submit --working-dir ."]),
        ({"disk": 10**6}, "warn", ["1 MB free in RUN, a checkpoint takes 500 MB"]),
        ({"files": 1024}, "warn", ["ulimit -n 65536"]),
        ({"shared": 10**6}, "warn", ["--shm-size"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_node_is_told(changes, status, words, monkeypatch):
    monkeypatch.delenv("DUET_FAKE_GPUS", raising=False)
    node = {"id": "0123456789", "name": "b", "gpus": 4, "answer": SEES | changes}
    found = ray_cluster.judge_node(node, MINE, REQUEST, {".m", ".m.1"}, 5 * 10**8, 2)
    assert found.status == status
    assert found.name == "node b (012345)"
    assert lacks(found, words) == []
    assert "secret" not in found.value + found.mend


def test_good_nodes_odd_ones_and_silent_ones(monkeypatch):
    monkeypatch.delenv("DUET_FAKE_GPUS", raising=False)

    def judged(size: int = 2, **node: object) -> tuple[str, str]:
        whole = {"id": "0123456789", "name": "b", "gpus": 4} | node
        found = ray_cluster.judge_node(whole, MINE, REQUEST, {".m.1"}, 0, size)
        return found.status, found.value

    assert judged(answer=SEES) == ("ok", "same packages, sees RUN and DATA")
    assert judged(answer=SEES, gpus=3) == ("warn", "3 GPUs: one has no partner")
    assert judged(answer=SEES, gpus=1, size=1) == ("ok", "same packages, sees RUN and DATA")
    assert judged(why="no answer for 40 s") == ("FAIL", "no answer for 40 s")


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.59", "pip install -c constraints"),
        ("AuthenticationError: Missing authentication token", "RAY_AUTH_MODE=token"),
        ("Failed to connect to Ray cluster at 127.0.0.1:38295", "the head's ~/.ray/auth_token"),
        ("no answer for 90 s", "ray status"),
    ],
)
def test_why_a_driver_could_not_join_leads_to_what_mends_it(why, words):
    assert words in ray_cluster.suggest_mend(why)


def test_a_driver_that_dies_leaves_its_last_words(monkeypatch):
    text = "starting\nRuntimeError: one\nfatal: AuthenticationError: no token\n  at f()\n\n"
    assert ray_cluster.find_error(text) == "fatal: AuthenticationError: no token"
    monkeypatch.setattr(ray_cluster, "REPOSITORY", Path("/none"))
    monkeypatch.setattr(ray_cluster.sys, "executable", shutil.which("false"))
    assert ray_cluster.run_probe({}) == {"why": "the driver ended with code 1"}


def test_a_node_looks_with_pythons_own_library_and_sees_what_is_there(tmp_path):
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import ray_probe; "
        "print(json.dumps(ray_probe.look(json.loads(sys.argv[2]))))"
    )
    (tmp_path / ".m").touch()

    def look(run: Path) -> dict:
        request = dict.fromkeys(REQUEST, "") | {"run": str(run), "mark": ".m"}
        request |= {"code": str(REPOSITORY), "data": str(tmp_path)}
        folder = str(Path(ray_probe.__file__).parent)
        done = subprocess.run(  # -S: no packages, -I: nothing of ours
            [sys.executable, "-S", "-I", "-c", program, folder, json.dumps(request)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    found = look(tmp_path)
    assert (found["run"], found["code"], found["data"]) == (True, True, False)
    assert (tmp_path / found["own"]).exists()
    assert set(found["releases"]) == {"Python"}
    other = look(tmp_path / "elsewhere")
    assert other["run"] is False
    assert not (tmp_path / "elsewhere").exists()
