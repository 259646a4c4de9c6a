"""The machine, and its limits: the best rate of each operation of the stream, measured here."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from isal import isal_zlib

from pipeline.stream import operators as dali
from pipeline.stream.decode import run_on_current_stream
from pipeline.stream.shard_reader import Bytes
from pipeline.stream.transfer import select_gpu
from pipeline.throughput.clock import Rate, count_items, measure
from pipeline.tools.files import drop_page_cache
from pipeline.tools.packages import DALI, find_version
from pipeline.tools.units import cpu_count, cpu_name


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and libraries that a measurement depends on."""

    processor: str
    cores: int
    """Processors that this process may use."""
    memory: int
    """Bytes of main memory."""
    gpu: str
    """Name of the GPU; empty without one."""
    torch: str
    dali: str


def describe_machine(gpu: bool) -> Machine:
    """Describe this machine."""
    return Machine(
        processor=cpu_name(),
        cores=cpu_count(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=torch.cuda.get_device_name() if gpu else "",
        torch=torch.__version__,
        dali=find_version(*DALI) or "",
    )


def format_count(count: int, noun: str) -> str:
    """Return a count of things in words: `1 core`, `2 cores`."""
    return f"{count} {noun}{'s' if count > 1 else ''}"


READ_BYTES = 2**20
"""Bytes read at a time."""
LARGE = 64 * 2**20
"""Bytes of a buffer that is larger than any processor cache."""
DISK_THREADS = 4
"""Files read at a time to measure a disk."""
DISK_BYTES = 256 * 2**20
"""Most bytes read to measure a disk."""
CHUNK = 16
"""Images decoded by a thread at a time."""


def measure_page_cache(paths: Sequence[Path], seconds: float) -> Rate:
    """Measure the bytes per second that one thread reads from the page cache, end to end."""
    buffer = memoryview(bytearray(READ_BYTES))
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")).fileno() for path in paths]
        blocks = itertools.cycle(_list_blocks(files, LARGE))

        def read() -> int:
            return sum(os.preadv(file, [buffer], at) for file, at in itertools.islice(blocks, 32))

        for _ in range(1 + LARGE // (32 * READ_BYTES)):
            read()  # fills the page cache
        return measure(read, seconds)


def measure_disk(paths: Sequence[Path]) -> tuple[float, float]:
    """Measure the bytes per second of the disk, files read end to end, several at a time.

    Returns:
        the rate, and the share of the bytes that the kernel kept in memory nevertheless.
    """
    buffers = [memoryview(bytearray(READ_BYTES)) for _ in range(DISK_THREADS)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")).fileno() for path in paths]
        kept = sum(map(drop_page_cache, files)) / max(
            1, sum(os.fstat(file).st_size for file in files)
        )
        blocks = list(_list_blocks(files, DISK_BYTES))
        parts = [blocks[start::DISK_THREADS] for start in range(DISK_THREADS)]

        def read(number: int) -> int:
            return sum(os.preadv(file, [buffers[number]], at) for file, at in parts[number])

        with ThreadPoolExecutor(DISK_THREADS) as pool:
            start = time.perf_counter()
            done = sum(pool.map(read, range(DISK_THREADS)))
            return done / (time.perf_counter() - start), kept


def measure_checksum(size: int, seconds: float) -> Rate:
    """Measure the bytes per second of CRC-32 on one core, over images of `size` bytes."""
    images = itertools.cycle(np.random.default_rng(0).integers(0, 256, (16, size), np.uint8))

    def check() -> int:
        for image in itertools.islice(images, 64):
            isal_zlib.crc32(image)
        return 64 * size

    return measure(check, seconds)


def measure_memory(threads: int, seconds: float) -> Rate:
    """Measure the bytes per second that threads read and write in memory: a copy counts twice."""
    source, target = torch.ones(LARGE // 4), torch.empty(LARGE // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure(count_items(lambda: target.copy_(source), 2 * LARGE), seconds)
    finally:
        torch.set_num_threads(before)


def measure_libjpeg(jpegs: Sequence[Bytes], threads: int, seconds: float) -> Rate:
    """Measure the images per second that libjpeg-turbo decodes whole, to RGB, into one buffer."""
    parts = itertools.cycle([jpegs[at : at + CHUNK] for at in range(0, len(jpegs), CHUNK)])
    sizes = (simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs)
    largest = max(3 * height * width for height, width in sizes)

    def decode(part: Sequence[Bytes]) -> int:
        pixels = np.empty(largest, np.uint8)
        for jpeg in part:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=pixels)
        return len(part)

    ahead: deque[Future[int]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def step() -> int:
            while len(ahead) < 4 * threads:
                ahead.append(pool.submit(decode, next(parts)))
            return ahead.popleft().result()

        return measure(step, seconds)


def measure_nvjpeg(jpegs: Sequence[Bytes], batch_size: int, threads: int, load: float,
           seconds: float) -> Rate:  # fmt: skip
    """Measure the images per second that a DALI pipeline of nvJPEG alone decodes to RGB."""
    batches = [list(jpegs[at : at + batch_size]) for at in range(0, len(jpegs), batch_size)]
    with dali.Pipeline(batch_size, threads, select_gpu("gpu"), prefetch_queue_depth=3) as pipe:
        stored = dali.fn.external_source(
            source=batches, cycle=True, batch=True, dtype=dali.types.UINT8, ndim=1
        )
        pipe.set_outputs(
            dali.fn.decoders.image(
                stored,
                device="mixed",
                output_type=dali.types.RGB,
                hw_decoder_load=load,
                affine=False,
            )
        )
    pipe.build()

    def step() -> int:
        return len(run_on_current_stream(pipe))

    return measure(step, seconds, torch.cuda.synchronize)


def measure_upload(seconds: float) -> Rate:
    """Measure the bytes per second from pinned host memory to the current GPU."""
    host = torch.empty(LARGE, dtype=torch.uint8).pin_memory()
    device = torch.empty(LARGE, dtype=torch.uint8, device="cuda")

    return _measure_gpu_copies(lambda: device.copy_(host, non_blocking=True), LARGE, 4, seconds)


def measure_device_memory(seconds: float) -> Rate:
    """Measure the bytes per second that the GPU reads and writes: a copy counts twice."""
    source = torch.ones(LARGE, device="cuda")
    target = torch.empty_like(source)

    return _measure_gpu_copies(lambda: target.copy_(source), 8 * LARGE, 32, seconds)


def _measure_gpu_copies(copy: Callable[[], object], size: int, count: int, seconds: float) -> Rate:
    """Measure the bytes per second of a copy of `size` bytes, which the host only launches.

    It waits after `count` of them: a host that is let go launches a thousand before a GPU has it
    wait, and the clock of a window stops only behind them all.
    """

    def step() -> int:
        for _ in range(count):
            copy()
        torch.cuda.current_stream().synchronize()
        return count * size

    return measure(step, seconds, torch.cuda.synchronize)


def _list_blocks(files: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(file, offset) of each block, some of each file, `most` bytes in all."""
    each = max(READ_BYTES, most // max(1, len(files)))
    for file in files:
        for at in range(0, min(each, os.fstat(file).st_size), READ_BYTES):
            yield file, at
