"""Conditions that must hold before Ray is started."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import evaluate, train
from cluster.launch import session
from cluster.launch.controller import count_interrupts
from cluster.launch.session import refuse_relative
from pipeline.tools.errors import SetupError, UsageError, handle_end
from pipeline.tools.files import try_lock, unlock
from pipeline.tools.processes import defer_signals
from tests.helpers.processes import run_command
from tests.helpers.training_processes import REPOSITORY


def test_the_driver_imports_no_ray_before_it_has_said_where_ray_may_listen():
    """Ray reads `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` at its import: loaded earlier, it listens on
    every interface of the machine."""
    script = (
        "import sys, cluster.train, cluster.launch.controller, cluster.launch.measurement\n"
        "sys.exit('ray' in sys.modules)"
    )
    assert run_command([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


def test_in_a_job_relative_folders_are_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    train_words = ["demo", "--data", "here", "--run", "/r"]
    refuse_relative("RUN", "run")  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for path in ("/run", "s3://b/run", "file:///run", str(tmp_path)):
        refuse_relative("RUN", path)
    refuse_relative("DATA", "here", missing=True)
    for main, words, text in (
        (train.main, [*train_words[:2], "data/demo", "--run", "/r"], "DATA data/demo is relative"),
        (train.main, [*train_words[:4], "runs/x"], "--run runs/x is relative"),
        (train.main, [*train_words, "--store", "kept"], "--store kept is relative"),
        (train.main, [*train_words, "--init", "runs/old"], "--init runs/old is relative"),
        (evaluate.main, ["runs/x", "--data", "here"], "RUN runs/x is relative"),
        (evaluate.main, ["/runs/x", "--data", "d"], "DATA d is relative"),
    ):
        with pytest.raises(UsageError, match=text) as refused:
            main(words)
        assert "absolute path on storage that all nodes share" in str(refused.value)


def test_rays_folder_is_in_a_private_one_of_a_short_path(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    (tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr(session, "PREFIX", prefix := f"duet-test-{os.getpid()}-")
    with session.make_session_folder() as folder:
        assert len(str(folder)) < 26 + len(prefix) + 10
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert try_lock(folder / session.LOCK) is None
    assert not folder.exists()
    monkeypatch.setattr(session, "LONGEST", 0)
    with pytest.raises(SetupError, match=r"TMPDIR .*xxx has more than 0 characters, too many for"):
        session.make_session_folder().__enter__()


def test_folders_of_dead_sessions_are_removed_and_no_others(tmp_path, monkeypatch):
    def make(name: str, lock: str = session.LOCK, age: float = 100.0) -> Path:
        folder = tmp_path / name
        (folder / "r/session_1").mkdir(parents=True)
        (folder / lock).touch()
        os.utime(folder / lock, (time.time() - age,) * 2)
        return folder

    dead, alive, new = make("duet-dead"), make("duet-alive"), make("duet-new", age=5)
    others = [make("else-x"), make("duet-cache", lock="lock")]
    (tmp_path / "duet-link").symlink_to(others[0])
    held = try_lock(alive / session.LOCK)
    assert held is not None
    session.sweep_sessions(tmp_path)
    assert not dead.exists()
    assert all(path.is_dir() for path in (alive, new, *others, tmp_path / "duet-link"))
    unlock(held)
    monkeypatch.setattr(os, "getuid", lambda: 4711)  # they are another user's
    session.sweep_sessions(tmp_path)
    assert alive.is_dir()


def hang_up_while_ray_starts() -> None:
    with defer_signals(signal.SIGHUP):
        os.kill(os.getpid(), signal.SIGHUP)
        deferred = True
    pytest.fail(f"it has not come: {deferred}")


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_lost_connection_ends_a_run_as_sigterm_does_but_for_nohup(ignored):
    own = signal.SIG_IGN if ignored else signal.SIG_DFL
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, own)
        with count_interrupts() as count:
            os.kill(os.getpid(), signal.SIGHUP)
            assert count() == (0 if ignored else 1)
        assert signal.getsignal(signal.SIGHUP) == own
        handle_end(signal.default_int_handler)
        if not ignored:
            with pytest.raises(KeyboardInterrupt):
                hang_up_while_ray_starts()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", ["127.0.0.1:1 does not answer (Connection refused)", "unset RAY_ADDRESS"]),
        ("[::1]:1", ["[::1]:1 does not answer", "unset RAY_ADDRESS"]),
        ("auto", ["auto, which is 127.0.0.1:1 in ", "ray_current_cluster, does not answer"]),
        ("head", ["head has no port", "export RAY_ADDRESS=head:6379"]),
        ("http://head:8265", ["RAY_API_SERVER_ADDRESS=http://head:8265"]),
        (f"{'x' * 70}.:6379", ["does not answer"]),
    ],
)
def test_a_ray_that_is_gone_is_told_before_ray_is_asked(address, words, tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session, "_start", None)
    with pytest.raises(SetupError) as caught, session.ray_session(1):
        pass
    for word in ("RAY_ADDRESS: ", *words):
        assert word in str(caught.value)


def test_an_empty_address_is_none(monkeypatch):
    for value, is_attached in (("", False), ("auto", True)):
        monkeypatch.setenv("RAY_ADDRESS", value)
        assert session.is_attached() is is_attached


@pytest.mark.parametrize(
    ("says", "mend"),
    [
        ("Failed to connect to Ray cluster at 127.0.0.1:6379", "auth_token belongs here, too"),
        ("Version mismatch: The cluster was started with: Ray: 2.59", "pip install -c constraints"),
        ("something else", "ray status"),
    ],
)
def test_a_ray_that_does_not_take_us_is_not_told_as_none(says, mend, monkeypatch):
    def init(**_: object) -> None:
        raise ConnectionError(f"{says}\nand more")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(SetupError) as caught:
        session._start(SimpleNamespace(init=init), None, 1, {})
    assert f"RAY_ADDRESS=127.0.0.1:6379 does not take us ({says})" in str(caught.value)
    assert mend in str(caught.value)
    assert "start one" not in str(caught.value)


def test_a_head_that_does_not_answer_is_told_and_given_up(monkeypatch, capsys):
    for name, value in (("HEAD", 0.3), ("CONNECT", 0.1), ("SAY", 0.0)):
        monkeypatch.setattr(session, f"{name}_SECONDS", value)
    monkeypatch.setattr(session, "ASK_EVERY", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # takes connections, and is silent
        address = f"127.0.0.1:{frozen.getsockname()[1]}"
        with pytest.raises(SetupError, match=rf"{address} takes connections, but no Ray has ans"):
            session.ask_head(address)
    assert f"no answer of the Ray at {address} for 0 s" in capsys.readouterr().err


def test_a_head_that_refuses_a_token_is_told_at_once():
    import grpc

    class Refusing(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(
                    grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken"
                )
            )

    server = grpc.server(ThreadPoolExecutor(1), [Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(SetupError, match=rf"the Ray at 127\.0\.0\.1:{port} .*token"):
            session.ask_head(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_a_refused_token_is_told_with_the_way_to_the_right_one(tmp_path):
    there, missing = str(tmp_path / "token"), str(tmp_path / "none")
    Path(there).touch()
    for environment, words in (
        ({"RAY_AUTH_TOKEN_PATH": there}, "none is sent; export RAY_AUTH_MODE=token, and copy"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, "refuses the token of RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": missing}, f"there is no {missing}; "),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": there}, f"refuses the token of {there}"),
    ):
        told = session.describe_refusal(environment)
        assert words in told
        assert "copy the head's ~/.ray/auth_token to" in told
