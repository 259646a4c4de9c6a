"""Messages about workers that fail: they name the cause, not its consequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.config import Config
from cluster.launch.controller import build_environment
from cluster.launch.failure import Failure, WorkerGpu, describe_failure, suggest_images
from cluster.launch.placement import WorkerMemory, estimate_memory
from cluster.run.events import Failed, Worker
from pipeline.tools.errors import DataError, SetupError
from pipeline.tools.watchdog import Hang

WORKERS = tuple(
    Worker(rank, rank // 2, "ab"[rank % 2], f"node-{rank // 2}", None) for rank in range(4)
)
NOISE = "RuntimeError: reset by peer"


def make_failed(text: str, final: bool, code: int = 1) -> Failed:
    return Failed(text, "Traceback of " + text, "replica 0, column b", code, final)


def test_the_cause_is_told_not_what_it_led_to(tmp_path: Path):
    failure = Failure(WORKERS, make_failed(NOISE, final=False), RuntimeError("both"), {3})
    assert failure.why.startswith("the worker of replica 1, column b (node node-1) died: killed")
    error = failure.build_error(tmp_path)
    assert str(error).startswith(f"{failure.why} (traceback in ")
    assert error.exit_code == 1
    log = (tmp_path / "error.log").read_text()
    assert f"Traceback of {NOISE}" in log
    assert "both" in log


def test_workers_that_died_with_their_node_were_not_killed():
    failure = Failure(WORKERS, dead={2, 3}, gone=frozenset({"node-1", "other"}))
    assert failure.why == "lost node node-1: it is gone, or its network is cut"
    failure.dead = {0}
    assert "died: killed, or out of memory" in failure.why


def test_several_deaths_are_counted():
    assert "node-0) and 2 more died" in Failure(WORKERS, dead={0, 2, 3}).why
    assert Failure(dead={2}).why.startswith("the worker of rank 2 died")


def test_an_error_of_ours_keeps_its_exit_code(tmp_path: Path):
    failure = Failure(WORKERS, make_failed("shard x is damaged", final=True, code=4), dead={1})
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


def test_workers_that_do_not_start_are_a_fault_of_the_machines(tmp_path: Path):
    failure = Failure(raised=SetupError("workers did not start in 180 s"))
    assert failure.build_error(tmp_path).exit_code == 3
    died = Failure(raised=SetupError("workers did not start in 180 s"), dead={1})
    assert died.build_error(tmp_path).exit_code == 1


TASK = (
    "Training failed due to controller error:\n"
    "\x1b[36mray::execute._setup_torch_process_group()\x1b[39m (pid=119, ip=10.77.0.2, repr=<x>)\n"
    '  File "a.py", line 1, in work\n    ^^^^\n'
    "RuntimeError: it has not met the others. More of it\n"
)


def test_the_error_of_a_task_of_ray_is_told_without_its_place_in_ray(tmp_path: Path):
    failure = Failure(raised=RuntimeError(TASK))
    assert failure.why == "RuntimeError: it has not met the others. More of it"
    failure.build_error(tmp_path)
    assert "\x1b" not in (tmp_path / "error.log").read_text()


# As torch 2.11 to 2.13 write them (ProcessGroupNCCL.cpp, NCCLUtils.cpp).
WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=78, OpType=ALLREDUCE, "
    "NumelIn=80, NumelOut=80, Timeout(ms)=300000) ran for 300096 milliseconds before timing out."
)
ABORTED = f"NCCL communicator was aborted on rank 0.  Original reason for failure was: {WATCHDOG}"
REMOTE = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, remote process "
    "exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: A call failed "
    "possibly due to a network error or a remote process exiting prematurely."
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("[gloo/tcp/pair.cc:538] Read error: Connection reset by peer"),
         "lost another worker (Connection reset by peer)"),
        (RuntimeError("gloo write: Broken pipe"), "lost another worker (Broken pipe)"),
        (RuntimeError("Timed out waiting 300000ms for recv operation to complete"),
         "another worker does not answer (frozen?)"),
        (dist.DistBackendError(ABORTED), "another worker does not answer (frozen?)"),
        (dist.DistBackendError("NCCL communicator was aborted on rank 0. "),
         "another worker does not answer (frozen?)"),
        (dist.DistBackendError(WATCHDOG), "another worker does not answer (frozen?)"),
        (dist.DistBackendError(REMOTE), "lost another worker (remote process exited)"),
        # Errors of other libraries, or of other types, are not about another worker.
        (RuntimeError("flush failed: Broken pipe"), "RuntimeError: flush failed: Broken pipe"),
        (OSError("Connection refused"), "OSError: Connection refused"),
        (ValueError("one\ntwo"), "ValueError: one"),
    ],
)  # fmt: skip
def test_a_worker_tells_lost_ones_from_its_own_errors(error: Exception, text: str):
    named = describe_failure(error, "replica 0, column a", peer="replica 0, column b")
    assert named.text == text.replace("another worker", "replica 0, column b")
    failed = describe_failure(error, "replica 0, column a")
    assert (failed.text, failed.exit_code, failed.final) == (text, 1, False)
    assert str(error) in failed.trace


def test_a_mount_that_hangs_is_worth_another_start():
    failed = describe_failure(Hang("process 7 on a has waited 300 s"), "replica 0, column a")
    assert (failed.final, failed.exit_code) == (False, 1)


def test_an_error_of_ours_is_final_whatever_its_words():
    failed = describe_failure(DataError("the store timed out: Broken pipe"), "replica 0, column a")
    assert (failed.text, failed.exit_code, failed.final) == (
        "the store timed out: Broken pipe", DataError.exit_code, True,
    )  # fmt: skip


def test_a_log_that_cannot_be_written_hides_nothing(tmp_path: Path):
    assert str(Failure(event=make_failed("disk full", True)).build_error(tmp_path / "gone")) == (
        "replica 0, column b: disk full"
    )


GB = 10**9
MEMORY = WorkerMemory(parameters=GB, image=30 * 10**6)
GPU = WorkerGpu(name="GPU 3", node="n2", node_id="2f", images=512, memory=MEMORY)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total")


def fail_twice(error: Exception) -> Exception:
    """Raise an error of a GPU in code whose cleaning up fails by it, too; return what comes out."""
    try:
        try:
            raise error
        finally:
            raise RuntimeError("the pipeline cannot be closed")
    except RuntimeError as second:
        return second


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_C"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory"),
        RuntimeError("Unable to determine the device handle for GPU0000: GPU is lost."),
    ],
)
def test_a_gpu_that_fails_is_named_with_its_node_and_the_run_goes_on(error):
    first = str(error).splitlines()[0]
    for raised in (error, fail_twice(error)):
        failed = describe_failure(raised, "replica 0, column a", GPU)
        assert failed.text == f"GPU 3 of node n2 failed ({first})"
        assert (failed.exit_code, failed.final, failed.broken_node) == (1, False, "2f")
        assert str(error) in failed.trace


def test_a_gpu_that_torch_has_no_code_for_is_a_matter_of_the_installation():
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the")
    failed = describe_failure(error, "replica 0, column a", GPU)
    assert "no code for GPU 3 of node n2; make install CUDA=12" in failed.text
    assert (failed.exit_code, failed.final, failed.broken_node) == (3, True, "")


@pytest.mark.parametrize(
    ("free", "reserved", "fixed", "code", "words"),
    [
        (1, 15, False, 3, ["512 images at once do not fit in 16 GB; use --microbatch 256"]),
        (1, 3, False, 1, ["of which others take 12 GB; end those, or use --microbatch 64"]),
        (1, 15, True, 3, ["--microbatch 256 in a new run (batch normalization"]),
    ],
)
def test_a_batch_that_is_too_large_for_a_gpu_is_told_with_one_that_fits(
    free, reserved, fixed, code, words, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved * GB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: reserved * GB)
    gpu = replace(GPU, is_fixed=fixed)
    for error in (FULL, torch.AcceleratorError("CUDA error: out of memory")):
        failed = describe_failure(error, "replica 0, column a", gpu)
        assert failed.text.startswith("the memory of GPU 3 of node n2 is too small: ")
        assert [word for word in words if word not in failed.text] == []
        assert (failed.exit_code, failed.final, failed.broken_node) == (code, code == 3, "")
        later = describe_failure(error, "replica 0, column a", replace(gpu, steps=500))
        assert (later.text, later.exit_code, later.final) == (failed.text, 1, False)


def test_the_images_that_fit_follow_from_the_estimate_or_from_what_was_taken():
    assert suggest_images(MEMORY, 512, room=10 * GB, taken=0) == 256
    # It took 32 GB where 16 were estimated, so that 128 images take 9.6.
    assert suggest_images(MEMORY, 512, room=11 * GB, taken=2 * MEMORY.count_bytes(512)) == 128
    assert suggest_images(MEMORY, 512, room=0, taken=0) == 256  # nothing is known
    assert suggest_images(MEMORY, 512, room=GB, taken=0) == 0
    paper = estimate_memory(Config(), None, size=1)
    assert suggest_images(paper, 4096, room=16 * GB, taken=0) == 2048


def test_errors_of_gpus_are_others_on_a_cpu():
    failed = describe_failure(RuntimeError("CUDA error: no device"), "replica 0, column a")
    assert failed.text == "RuntimeError: CUDA error: no device"


def test_the_users_own_handling_of_nccls_errors_wins(monkeypatch):
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    assert build_environment()[name] == "2"
    monkeypatch.setenv(name, "1")
    assert build_environment()[name] == "1"
