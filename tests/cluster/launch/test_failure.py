"""Messages about workers that fail: they name the cause, not its consequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.launch.controller import Failure
from cluster.launch.worker import describe_failure
from cluster.run.events import Failed, Worker
from pipeline.tools.errors import DataError


class WorkerHealthCheckFailedError(Exception):
    """Named like Ray Train's."""


class GroupError(Exception):
    """Has the fields of Ray Train's WorkerGroupError."""

    def __init__(self, text: str, *gone: int) -> None:
        super().__init__(text)
        dead, torn = WorkerHealthCheckFailedError("gone"), RuntimeError("reset by peer")
        self.worker_failures = {rank: dead if rank in gone else torn for rank in range(4)}


WORKERS = tuple(
    Worker(rank, rank // 2, "ab"[rank % 2], f"node-{rank // 2}", None) for rank in range(4)
)
NOISE = "RuntimeError: reset by peer"


def make_failed(text: str, final: bool, code: int = 1) -> Failed:
    return Failed(text, "Traceback of " + text, "replica 0, column b", code, final)


def test_the_cause_is_told_not_what_it_led_to(tmp_path: Path):
    failure = Failure(WORKERS, make_failed(NOISE, final=False), GroupError("both", 3))
    assert failure.why.startswith("the worker of replica 1, column b (node node-1) died: killed")
    error = failure.build_error(tmp_path)
    assert str(error).startswith(f"{failure.why} (traceback in ")
    assert error.exit_code == 1
    log = (tmp_path / "error.log").read_text()
    assert f"Traceback of {NOISE}" in log
    assert "both" in log


def test_several_deaths_are_counted():
    assert "node-0) and 2 more died" in Failure(WORKERS, None, GroupError("all", 0, 2, 3)).why
    assert Failure((), None, GroupError("early", 2)).why.startswith("the worker of rank 2 died")


def test_an_error_of_ours_keeps_its_exit_code(tmp_path: Path):
    failure = Failure(
        WORKERS, make_failed("shard x is damaged", final=True, code=4), GroupError("x", 1)
    )
    assert failure.is_final
    error = failure.build_error(tmp_path)
    assert str(error).startswith("replica 0, column b: shard x is damaged (traceback in ")
    assert error.exit_code == 4


def test_a_failure_of_ray_itself_is_one_line(tmp_path: Path):
    failure = Failure(raised=RuntimeError("Training failed due to:\nno room\nthird line"))
    assert str(failure.build_error(tmp_path, "said aside")).startswith("no room (traceback in ")
    log = (tmp_path / "error.log").read_text()
    assert "third line" in log
    assert "said aside" in log


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("[gloo/tcp/pair.cc:538] Read error: Connection reset by peer"),
         "lost another worker (Connection reset by peer)"),
        (RuntimeError("gloo write: Broken pipe"), "lost another worker (Broken pipe)"),
        (RuntimeError("Timed out waiting 300000ms for recv operation to complete"),
         "another worker does not answer (frozen?)"),
        # Errors of other libraries, or of other types, are not about another worker.
        (RuntimeError("flush failed: Broken pipe"), "RuntimeError: flush failed: Broken pipe"),
        (OSError("Connection refused"), "OSError: Connection refused"),
        (ValueError("one\ntwo"), "ValueError: one"),
    ],
)  # fmt: skip
def test_a_worker_tells_lost_ones_from_its_own_errors(error: Exception, text: str):
    failed = describe_failure(error, "replica 0, column a")
    assert (failed.text, failed.exit_code, failed.final) == (text, 1, False)
    assert str(error) in failed.trace


def test_an_error_of_ours_is_final_whatever_its_words():
    failed = describe_failure(DataError("the store timed out: Broken pipe"), "replica 0, column a")
    assert (failed.text, failed.exit_code, failed.final) == (
        "the store timed out: Broken pipe", DataError.exit_code, True,
    )  # fmt: skip


def test_a_log_that_cannot_be_written_hides_nothing(tmp_path: Path):
    assert str(Failure(event=make_failed("disk full", True)).build_error(tmp_path / "gone")) == (
        "replica 0, column b: disk full"
    )
