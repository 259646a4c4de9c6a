"""One build at a time at an address."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import fsspec
import pytest

from pipeline.remote import lease
from pipeline.remote.cache import Cache
from pipeline.remote.target import WORK, FolderTarget, StoreTarget
from pipeline.tools.errors import SetupError, UsageError, hint_resume
from pipeline.tools.files import try_lock
from tests.helpers.build_targets import (  # noqa: F401
    CLAIM,
    QUICK,
    complaint,
    memory_address,
    put,
    s3_address,
    target_at_address,
)


def test_one_build_at_a_time(target):
    with target.reserve():
        with pytest.raises(UsageError) as raised, target.reserve():
            pass
        assert f"process {os.getpid()} on {platform.node()}" in complaint(raised)
        assert target.list_files() == {CLAIM}
    assert target.list_files() == set()
    with target.reserve():
        put(target, f"{WORK}/build.json", b"{}")
    assert target.list_files() == {f"{WORK}/build.json"}
    with target.reserve():
        pass


def claim_of(target: StoreTarget, **changes: object) -> dict[str, object]:
    """Write what another process would have written."""
    claim = lease.Lease(target, CLAIM, "build")
    mine = {**claim._mine, **changes}
    put(target, CLAIM, json.dumps(mine).encode())
    return mine


@pytest.fixture
def quick_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE", 0.01)
    monkeypatch.setattr(lease, "BEAT", 0.05)


def test_the_claim_of_a_killed_build_of_this_machine_is_taken_over_at_once(target, quick_claims):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim_of(target, pid=ended.pid)
    with target.reserve():
        assert json.loads(target.read(CLAIM))["pid"] == os.getpid()


def test_the_claim_of_another_machine_is_taken_over_when_it_is_stale(
    target, quick_claims, monkeypatch
):
    claim_of(target, machine="other", host="far", pid=4)
    with pytest.raises(UsageError) as raised, target.reserve():
        pass
    assert "process 4 on far" in complaint(raised)
    assert "run this again in 1" in complaint(raised)
    assert target.list_files() == {CLAIM}
    monkeypatch.setattr(lease, "STALE", 0.9)  # S3 tells whole seconds
    time.sleep(1)
    with target.reserve():
        assert json.loads(target.read(CLAIM))["pid"] == os.getpid()
    assert target.list_files() == set()


@pytest.mark.parametrize("content", [b"null", b"[1]", b"{half", b"\xff"])
def test_a_claim_that_says_nothing_is_one_all_the_same(memory, quick_claims, monkeypatch, content):
    target = StoreTarget(memory, QUICK)
    put(target, CLAIM, content)
    with pytest.raises(UsageError, match=r"process \? on \? .*run this again in 1"):
        target.reserve().__enter__()
    assert target.read(CLAIM) == content
    monkeypatch.setattr(lease, "STALE", 0.0)
    with target.reserve():
        assert json.loads(target.read(CLAIM))["pid"] == os.getpid()


@pytest.fixture(params=["as it is", "SIGINT ignored", "Ray's"])
def handlers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Signals as a shell leaves them, as `errors.run` in a background job, and as `ray.init`."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if request.param == "SIGINT ignored":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if request.param == "Ray's":
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_claim_is_kept_fresh_and_its_loss_ends_the_build(memory, quick_claims):
    target = StoreTarget(memory, QUICK)
    system = fsspec.filesystem("memory")
    path = f"/{memory.removeprefix('memory://')}/{CLAIM}"

    def hold() -> None:
        with target.reserve(), hint_resume("what is done is kept"):
            before = system.modified(path)
            deadline = time.monotonic() + 5
            while system.modified(path) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert system.modified(path) > before
            for _ in range(50):
                claim_of(target, host="far")  # again: a beat of ours may have just begun
                time.sleep(0.1)
            pytest.fail("the loss was not noticed")

    with pytest.raises(UsageError, match="taken over") as raised:
        hold()
    complaint(raised)
    assert json.loads(target.read(CLAIM))["host"] == "far"  # it is not ours to remove


def training(target: StoreTarget, told: list[str]) -> lease.Lease:
    return lease.Lease(target, CLAIM, "training", "run a-1", told.append)


def test_a_run_waits_for_its_own_claim_of_another_machine_until_it_is_stale(
    memory, quick_claims, monkeypatch
):
    """The machine has probably gone; another run's claim is refused with the time to wait."""
    target, told = StoreTarget(memory, QUICK), list[str]()
    monkeypatch.setattr(lease, "POLL", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.5)
    claim_of(target, machine="other", host="far", owner="run b-2")
    with pytest.raises(UsageError, match=r"another training \(run b-2, process .* was killed"):
        training(target, told).__enter__()
    assert told == []
    claim_of(target, machine="other", host="far", owner="run a-1")
    with training(target, told):
        assert json.loads(target.read(CLAIM))["pid"] == os.getpid()
    assert "held for this run on far; waiting 0 s" in told[0] or "waiting 1 s" in told[0]


def test_a_run_that_gives_a_sign_of_life_elsewhere_is_not_taken_over(
    memory, quick_claims, monkeypatch
):
    target, told = StoreTarget(memory, QUICK), list[str]()
    monkeypatch.setattr(lease, "POLL", 0.3)
    claim = claim_of(target, machine="other", host="far", owner="run a-1")
    beat = threading.Timer(0.4, put, (target, CLAIM, json.dumps(claim).encode()))
    beat.start()
    with pytest.raises(UsageError, match="has just given a sign of life"):
        training(target, told).__enter__()
    beat.join()
    claim_of(target, owner="run a-1", pid=os.getppid())  # here, and alive: no need to wait
    with pytest.raises(UsageError, match=r"run a-1, process"):
        training(target, told).__enter__()
    assert len(told) == 1


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINTR])
def test_a_folder_without_flock_is_held_by_a_lease(tmp_path, monkeypatch, quick_claims, number):
    refuse_locks(monkeypatch, number)
    with pytest.raises(SetupError, match=r"/lock cannot be locked \(no flock on its file system"):
        try_lock(tmp_path / "lock")
    folder = tmp_path / "a b#%20?"
    folder.mkdir()
    target = FolderTarget(str(folder))
    for _ in range(2):
        with target.reserve():
            with pytest.raises(UsageError, match="is in use by another build") as raised:
                target.reserve().__enter__()
            assert f"process {os.getpid()} on {platform.node()}" in complaint(raised)
        assert list(folder.iterdir()) == []
    with pytest.raises(UsageError, match=r"^cache /.*/lock cannot be locked .*local disk, with"):
        Cache(folder, 10, 1.0)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"{half", b"\xff", b"[" * 99_999, b'{"pid": []}']
)
def test_a_lock_that_says_nothing_is_held_all_the_same(tmp_path, content):
    with lease.lock_folder(tmp_path, "lock", "build", "run a-1"):
        assert json.loads((tmp_path / "lock").read_bytes())["owner"] == "run a-1"
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(UsageError, match=r"is in use by another build \(process"):
            lease.lock_folder(tmp_path, "lock", "build").__enter__()


def test_strangers_files_are_left_alone(target):
    put(target, "thesis.doc", b"years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.doc, which is no part"), target.reserve():
        pass
    assert target.list_files() == {"thesis.doc"}
