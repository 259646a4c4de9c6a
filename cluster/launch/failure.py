"""Failures: what a worker's exception means, and the cause of the end of a group of workers."""

from __future__ import annotations

import os
import re
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.launch.placement import WorkerMemory
from cluster.run.events import Failed, Worker
from cluster.run.folder import ERRORS
from pipeline.tools.errors import DuetError, SetupError
from pipeline.tools.text import human_bytes
from pipeline.tools.watchdog import Hang

LOST = re.compile(r"gloo|nccl|socket|store|timed? ?out|connection", re.IGNORECASE)
"""Errors of torch.distributed, as opposed to those of other libraries."""
GONE = re.compile(
    r"Connection [a-z ]*(?:reset|closed|refused)[a-z ]*|Broken pipe|remote process exited",
    re.IGNORECASE,
)
"""Errors of torch.distributed about a worker that has died (gloo's, and NCCL's ncclRemoteError)."""
LATE = re.compile(r"timed? ?out|timing out|NCCL communicator was aborted", re.IGNORECASE)
"""Errors of torch.distributed about a worker that does not answer. NCCL's watchdog aborts the
communicator, and the next operation says so (torch/csrc/distributed/c10d/NCCLUtils.cpp)."""
NO_MEMORY = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
"""Errors about a full GPU that are not of torch's allocator."""
NO_CODE = "no kernel image is available"
GPU_ERRORS = re.compile(
    r"CUDA (?:error|runtime API error|driver API error)|CUBLAS_STATUS_|CUDNN_STATUS_|GPU is lost"
)
"""Errors of CUDA, in the words of torch, DALI, cuBLAS, cuDNN and the driver."""
FIRST_STEPS = 3
"""Steps in which a batch that is too large for a GPU shows itself; a later one has met something
else, so that a restart may help."""
MOST_MEMORY = 0.9
"""Share of a GPU's memory that the estimate for a smaller batch may take."""
COLOR = re.compile("\x1b\\[[0-9;]*m")
"""Codes by which Ray colors its texts, also where nobody sees them."""


@dataclass(frozen=True, kw_only=True)
class WorkerGpu:
    """GPU of a worker, and the work for which its memory must do."""

    name: str
    """GPU 3, or its id."""
    node: str
    """Host name of its node."""
    node_id: str
    """Ray's id of its node."""
    images: int
    """Images that are computed at once."""
    memory: WorkerMemory
    """Estimate of the memory that the worker takes."""
    steps: int = 0
    """Steps made since the start, with the one that failed."""
    is_fixed: bool = False
    """True if the number of images may not change within a run: batch norm, `exact`."""


def describe_failure(
    error: Exception, worker: str, gpu: WorkerGpu | None = None, peer: str = "another worker"
) -> Failed:
    """Return the event for an exception of a worker.

    Args:
        error: the exception.
        worker: name of the worker.
        gpu: GPU of the worker; None: it computes on a CPU.
        peer: name of the worker that it waits for, if there is only one.
    """
    root = _find_gpu_error(error)
    node, code, is_final = "", 1, isinstance(error, DuetError) and not isinstance(error, Hang)
    if gpu and root:
        text, code = _describe_gpu_error(root, gpu)
        is_final = code == SetupError.exit_code
        node = gpu.node_id if code == 1 and not _is_full(root) else ""
    elif isinstance(error, DuetError):
        text, code = str(error), error.exit_code
    else:
        text = _describe_lost_worker(error, peer) or f"{type(error).__name__}: {error}"
    return Failed(
        text=text.strip().splitlines()[0],
        trace="".join(traceback.format_exception(error)),
        worker=worker,
        exit_code=code,
        final=is_final,
        late=is_lost_worker(error) and not GONE.search(str(error)),
        broken_node=node,
    )


def _describe_lost_worker(error: Exception, peer: str) -> str:
    """Describe an error of torch.distributed; "" if it is not one."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not LOST.search(text):
        return ""
    if found := GONE.search(text):
        return f"lost {peer} ({found[0].strip()})"
    return f"{peer} does not answer (frozen?)" if LATE.search(text) else ""


def is_lost_worker(error: Exception) -> bool:
    """Return whether an error says that another worker was lost, and nothing else is wrong."""
    return bool(_describe_lost_worker(error, "another worker")) and not _find_gpu_error(error)


def _find_gpu_error(error: BaseException) -> BaseException | None:
    """Return the error of a GPU that led to an exception: closing what used it fails, too."""
    import torch  # here: the driver, which has this module for `Failure`, needs no torch

    chain: BaseException | None = error
    while chain is not None:
        is_cuda = isinstance(chain, RuntimeError) and GPU_ERRORS.search(str(chain))
        if is_cuda or isinstance(chain, torch.OutOfMemoryError | torch.AcceleratorError):
            return chain
        chain = chain.__cause__ or chain.__context__
    return None


def _is_full(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or bool(NO_MEMORY.search(str(error)))


def _describe_gpu_error(error: BaseException, gpu: WorkerGpu) -> tuple[str, int]:
    """Return a line about an error of a GPU, and the exit code: 3 if a restart would end there."""
    where, said = f"{gpu.name} of node {gpu.node}", str(error).strip().splitlines()[:1]
    if _is_full(error):
        return _describe_full_gpu(where, gpu)
    if NO_CODE in str(error):
        mend = "make install CUDA=12 there   # its torch knows older GPUs"
        return f"this torch has no code for {where}; {mend}", SetupError.exit_code
    return f"{where} failed ({''.join(said) or type(error).__name__})", 1


def _describe_full_gpu(where: str, gpu: WorkerGpu) -> tuple[str, int]:
    import torch

    total = others = taken = 0
    with suppress(Exception):  # the GPU may not answer any more
        free, total = torch.cuda.mem_get_info()
        others = max(0, total - free - torch.cuda.memory_reserved())
        taken = torch.cuda.max_memory_allocated()
    size = f" in {human_bytes(total)}" if total else ""
    text = f"the memory of {where} is too small: {gpu.images} images at once do not fit{size}"
    fewer = suggest_images(gpu.memory, gpu.images, total - others, taken)
    mend = f"--microbatch {fewer}" if fewer else "a smaller --width, or another GPU"
    if fewer and gpu.is_fixed:
        mend += " in a new run (batch normalization, or exact sums, take so many at once)"
    if 2 * others > total:  # it may have room again at the next start
        return f"{text}, of which others take {human_bytes(others)}; end those, or use {mend}", 1
    return f"{text}; use {mend}", SetupError.exit_code if gpu.steps <= FIRST_STEPS else 1


def suggest_images(memory: WorkerMemory, images: int, room: int, taken: int) -> int:
    """Return the most images, of half, a quarter and so on, that a GPU has room for; 0: not one.

    Args:
        memory: estimate of what a worker takes.
        images: images at once that did not fit.
        room: bytes of the GPU that the worker may take; 0: not known.
        taken: most bytes that the worker had when they did not fit. An estimate below them is
            scaled up.
    """
    scale = max(1.0, taken / memory.count_bytes(images))
    images //= 2
    while room and images and scale * memory.count_bytes(images) > MOST_MEMORY * room:
        images //= 2
    return images


def describe_ray_error(error: BaseException | None) -> str:
    """Return the cause that an error of Ray names, in one line."""
    lines = [line.rstrip() for line in COLOR.sub("", str(error)).splitlines() if line.strip()]
    # The trace of a task begins with its address in Ray, and ends with the error.
    if any(line.startswith("ray::") for line in lines):
        return next((line for line in reversed(lines) if not line[0].isspace()), lines[-1])
    # Others begin with lines that only announce the next.
    lines = [line.strip() for line in lines if not line.endswith(":")]
    return (lines or [repr(error)])[0].split(". ")[0]


@dataclass
class Failure:
    """Causes of the failure of a group: the workers that died, and the error that came first."""

    workers: tuple[Worker, ...] = ()
    """Workers in job order; empty if they were not placed yet."""
    event: Failed | None = None
    """Event of the first worker that failed."""
    raised: BaseException | None = None
    """Error that Ray raised, or a worker of which no event came."""
    dead: set[int] = field(default_factory=set)
    """Ranks of the workers that died."""
    gone: frozenset[str] = frozenset()
    """Names of the nodes that Ray has lost since the start."""

    @property
    def deaths(self) -> list[str]:
        """Names of the workers that died without an error of their own."""
        return [self._name_worker(rank) for rank in sorted(self.dead)]

    def _find_lost_nodes(self) -> list[str]:
        """Return the nodes that are gone with workers that died."""
        nodes = {worker.node: None for worker in self.workers if worker.rank in self.dead}
        return [node for node in nodes if node in self.gone]

    def _name_worker(self, rank: int) -> str:
        for worker in self.workers:
            if worker.rank == rank:
                columns = f"column{'s' if ' ' in worker.column else ''} {worker.column}"
                return f"replica {worker.replica}, {columns} (node {worker.node})"
        return f"rank {rank}"

    @property
    def is_final(self) -> bool:
        """True if a restart would fail in the same way."""
        return self.event is not None and self.event.final

    @property
    def why(self) -> str:
        """The cause in a line; errors of workers that lost a dead one are consequences."""
        if self.event is not None and (self.event.final or not self.deaths):
            return f"{self.event.worker}: {self.event.text}"
        if lost := self._find_lost_nodes():
            return f"lost node {' and node '.join(lost)}: it is gone, or its network is cut"
        if self.deaths:
            others = f" and {len(self.deaths) - 1} more" if len(self.deaths) > 1 else ""
            return f"the worker of {self.deaths[0]}{others} died: killed, or out of memory"
        return describe_ray_error(self.raised)

    def build_error(self, run: Path, output: str = "") -> DuetError:
        """Build the error to exit with, and write all that is known to RUN/error.log.

        Args:
            run: run folder.
            output: what Ray has printed, which nobody was shown.
        """
        trace = [self.event.trace] if self.event else []
        if not self.is_final:
            trace += [COLOR.sub("", str(self.raised)), output]
        text, log = self.why, run / ERRORS
        try:
            body = "\n".join([time.strftime("%F %T"), text, *trace]) + "\n"
            log.write_text(body, encoding="utf-8")
            text = f"{text} (traceback in {os.path.relpath(log)})"
        except OSError:
            pass  # the disk may be what is wrong
        error = DuetError(text)
        if self.event is not None and (self.is_final or not self.deaths):
            error.exit_code = self.event.exit_code
        elif isinstance(self.raised, DuetError) and not self.deaths:
            error.exit_code = self.raised.exit_code
        return error
