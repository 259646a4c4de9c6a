"""One build at a time at an address."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time

import fsspec
import pytest

from pipeline.remote import lease
from pipeline.remote.target import WORK, StoreTarget
from pipeline.tools.errors import UsageError
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
    claim = lease.Lease(target, CLAIM)
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


def test_a_claim_is_kept_fresh_and_its_loss_ends_the_build(memory, quick_claims):
    target = StoreTarget(memory, QUICK)
    system = fsspec.filesystem("memory")
    path = f"/{memory.removeprefix('memory://')}/{CLAIM}"

    def hold() -> None:
        with target.reserve():
            before = system.modified(path)
            deadline = time.monotonic() + 5
            while system.modified(path) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert system.modified(path) > before
            claim_of(target, host="far")
            time.sleep(5)
            pytest.fail("the loss was not noticed")

    with pytest.raises(UsageError, match="taken over") as raised:
        hold()
    complaint(raised)
    assert json.loads(target.read(CLAIM))["host"] == "far"  # it is not ours to remove


def test_strangers_files_are_left_alone(target):
    put(target, "thesis.doc", b"years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.doc, which is no part"), target.reserve():
        pass
    assert target.list_files() == {"thesis.doc"}
