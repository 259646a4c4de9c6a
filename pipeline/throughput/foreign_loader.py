"""Any loader of others: its rate, its CPU time and memory, and how long a trainer waits for it."""

from __future__ import annotations

import importlib
import re
import statistics
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import torch
from rich.text import Text

from pipeline.throughput import hardware
from pipeline.throughput.clock import (
    OTHERS,
    Rate,
    find_descendants,
    measure_in_turn,
    measure_until_steady,
)
from pipeline.throughput.hardware import Machine, describe_machine, format_count
from pipeline.throughput.stages import Setting, open_parts
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import read_text
from pipeline.tools.progress import Progress
from pipeline.tools.text import first_line, human_bytes
from pipeline.tools.units import cpu_count

WARM_UP = 4
"""Batches after the first one before the clock starts."""
BUSY = 0.85
"""Share of the cores from which on a loader is bound by processor time."""
DEEPEST = 5
"""Levels of a batch that are searched for an array."""


@dataclass(frozen=True)
class FoundArray:
    """The first array of a batch, whose first dimension counts the images."""

    path: str
    """Place in the batch as Python writes it, such as `batch[0]["image"]`."""
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    on_gpu: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.dtype} {list(self.shape)}"


def find_array(batch: object, path: str = "batch", depth: int = DEEPEST) -> FoundArray | None:
    """Return the first array of a batch, in the order of its items or fields; None without one.

    An array has a shape of one dimension or more: a tensor of torch, NumPy or any other library.
    Batches may be arrays, tuples, lists, mappings, dataclasses and objects with `images`.
    """
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple) and shape and all(isinstance(one, int) for one in shape):
        size = int(getattr(batch, "nbytes", 0))
        dtype = str(getattr(batch, "dtype", "")).removeprefix("torch.")
        return FoundArray(path, tuple(shape), dtype, size, bool(getattr(batch, "is_cuda", False)))
    if depth:
        for place, item in _list_items(batch):
            if found := find_array(item, path + place, depth - 1):
                return found
    return None


def _list_items(batch: object) -> Iterator[tuple[str, object]]:
    if hasattr(batch, "images"):  # ours: its first field holds ids
        yield ".images", batch.images
    elif isinstance(batch, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in batch.items())
    elif isinstance(batch, tuple | list):
        yield from ((f"[{number}]", value) for number, value in enumerate(batch))
    elif is_dataclass(batch):
        yield from ((f".{one.name}", getattr(batch, one.name)) for one in fields(batch))


class ForeignLoader:
    """Batches of `module:function` without end: a loader that ends is started again."""

    def __init__(self, name: str) -> None:
        """Import the function; nothing is called yet.

        Raises:
            UsageError: the module or the function cannot be had.
        """
        self.name = name
        self._function = _import_function(name)
        self._loader: Any = None
        self._batches: Iterator[object] = iter(())
        self.passes = 0
        """Number of times that the loader was started."""
        self.images = 0
        """Images delivered."""
        self.found: FoundArray | None = None
        """Array of the first batch."""
        self.waits: list[float] = []
        """Seconds of each `next`."""

    def take(self) -> int:
        """Take a batch and return its number of images.

        Raises:
            UsageError: what the function returns is no iterable, ends at once, or gives a batch
                without an array.
            DuetError: it raised an exception.
        """
        start = time.perf_counter()
        try:
            batch = self._next()
        except DuetError:
            raise
        except (Exception, SystemExit) as error:  # of any kind: the loader is the user's
            raise DuetError(f"--loader {self.name} failed: {describe_error(error)}") from error
        found = find_array(batch)
        if found is None:
            raise UsageError(
                f"--loader {self.name} gives batches without an array ({type(batch).__name__}); "
                "return tensors, or tuples, lists or dicts of them"
            )
        self.waits.append(time.perf_counter() - start)
        self.found = self.found or found
        self.images += found.shape[0]
        return found.shape[0]

    def synchronize(self) -> None:
        """Wait for the GPU, if batches lie on one."""
        if self.found is not None and self.found.on_gpu:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Let go of the loader, which ends its workers."""
        close = getattr(self._batches, "close", None)
        if callable(close):
            close()
        self._loader, self._batches = None, iter(())

    def _next(self) -> object:
        for batch in self._batches:
            return batch
        # What is an iterator itself has nothing more to give: it is made anew.
        if self._loader is None or self._batches is self._loader:
            self._loader = self._function()
            if not isinstance(self._loader, Iterable) and not hasattr(self._loader, "__getitem__"):
                raise UsageError(
                    f"--loader {self.name} returns {type(self._loader).__name__}, which is no "
                    "iterable of batches"
                )
        self._batches = iter(self._loader)
        self.passes += 1
        for batch in self._batches:
            return batch
        after = f" when it is started again, after {self.images:,} images" if self.images else ""
        raise UsageError(f"--loader {self.name} ends without a batch{after}")


def _import_function(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"--loader {name}: give module:function, for example train:make_loader")
    if "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # of any kind: the module is the user's
        if isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0]):
            raise UsageError(
                f"--loader {name}: there is no module {error.name} in this folder or installed"
            ) from None
        raise UsageError(
            f"--loader {name}: {module} cannot be imported: {describe_error(error)}"
        ) from error
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"--loader {name}: module {module} has no function {function}")
    return found  # type: ignore[no-any-return]


def describe_error(error: BaseException) -> str:
    """Return type, message and place of an exception of a user's code in one line.

    An exception of one of torch's workers carries the traceback of there in its message.
    """
    text = str(error).strip()
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if there := re.findall(r'File "(.+?)", line (\d+)', text):
        places, text = there, text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib"))
    ours = str(Path(__file__).resolve().parents[1])
    own = [place for place in places if not place[0].startswith((*libraries, ours, "<"))]
    file, line = (own or places or [("?", 0)])[-1]
    message = first_line(text)
    return f"{type(error).__name__}{': ' if message else ''}{message} ({file}, line {line})"


def read_memory() -> tuple[int, int]:
    """Return the bytes held by this process and its descendants, and their number.

    A page that several of them share counts once in all (PSS, as Linux shares it out).
    """
    total, pids = 0, find_descendants()
    for pid in pids:
        text = read_text(Path(f"/proc/{pid}/smaps_rollup"))  # empty of a process that has ended
        found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
        total += 1024 * int(found[1]) if found else 0
    return total, len(pids)


@dataclass(frozen=True, kw_only=True)
class TrainerWait:
    """A trainer that takes a number of images per second and does not use the cores meanwhile."""

    needed: float
    """Images per second that it takes."""
    waits: float
    """Fraction of its time, 0..1, that it waits for batches."""
    img_s: float
    """Images per second that it gets."""


def simulate_trainer(loader: ForeignLoader, needed: float, seconds: float) -> TrainerWait:
    """Take batches for some seconds, and sleep for as long as a step with each would take."""
    images, waited, start = 0, 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds or not images:
        begun = time.perf_counter()
        count = loader.take()
        loader.synchronize()
        waited += time.perf_counter() - begun
        images += count
        time.sleep(count / needed)
    took = time.perf_counter() - start
    return TrainerWait(needed=needed, waits=waited / took, img_s=images / took)


@dataclass(frozen=True, kw_only=True)
class LoaderReport:
    """All measurements of a loader."""

    loader: str
    """Name of its function."""
    batch: str
    """Array that was found in a batch, and its shape."""
    first_batch: float
    """Seconds from the call of the function to the first batch."""
    rate: Rate
    """Images per second."""
    quartiles: tuple[float, float]
    """Quarter and three quarters of the windows are slower than these, in images per second."""
    next_ms: dict[str, float]
    """Milliseconds of a `next`: median, 95 % of them, longest."""
    core_us: float
    """Microseconds of a core for an image, workers included."""
    memory: int
    """Most bytes held by this process and its descendants; shared pages count once."""
    memory_before: int
    """Bytes held before the loader was made."""
    processes: int
    """Processes that hold it, this one included."""
    passes: int
    """Times that the loader was started."""
    trainer: TrainerWait | None
    """None without `--img-s`."""
    limits: dict[str, float]
    """Images per second that this machine allows, by what is done with an image."""
    stream: Rate | None
    """Our stream on the data set, in turn with the loader; None without one."""
    over: float | None
    """Rate of our stream by that of the loader, in turn."""
    machine: Machine
    warnings: tuple[str, ...]

    def to_table(self) -> dict[str, Any]:
        """Return the report as plain values."""
        table = asdict(self)
        for name in ("rate", "stream"):
            if (rate := getattr(self, name)) is not None:
                table[name]["img_s"], table[name]["steady"] = rate.median, rate.is_steady
        return table | {"img_s": self.rate.median, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """A sentence or two: the bound of the loader, and its meaning for a trainer."""
        cores, rate = self.machine.cores, self.rate.median
        busy = self.rate.cpu / cores
        text = f"{rate:,.0f} img/s with {self.rate.cpu:.1f} of {format_count(cores, 'core')} busy: "
        if busy >= BUSY:
            text += "bound by processor time, so more workers would not help here."
        elif self.rate.others > OTHERS:
            text += "other programs use the cores, so what bounds it cannot be told."
        else:
            text += "it waits for something else (storage, a lock, one thread, too few workers)."
        if self.trainer is not None:
            one = self.trainer
            text += (f" A trainer that takes {one.needed:,.0f} img/s waits {one.waits:.0%} of its "
                     f"time and gets {one.img_s:,.0f}.")  # fmt: skip
        if self.over is not None:
            text += f" Our stream gives {self.over:.2f} times as much in turn."
        return text


def examine_loader(
    name: str, setting: Setting | None, needed: float | None, seconds: float
) -> LoaderReport:
    """Measure a loader, and beside it the stream of a setting if there is one.

    Args:
        name: `module:function`, which returns an iterable of batches and takes no arguments.
        setting: of our stream on the same images.
        needed: images per second that a trainer takes, if known.
        seconds: measuring time of each part.

    Raises:
        DuetError: as `ForeignLoader`, or as `Stream` does.
    """
    memory_before, _ = read_memory()
    with (
        closing(ForeignLoader(name)) as loader,
        Progress("measuring", total=5, unit="parts") as progress,
    ):
        start = time.perf_counter()
        loader.take()
        loader.synchronize()
        first_batch = time.perf_counter() - start
        for _ in range(WARM_UP):
            loader.take()
        progress.advance(1)
        loader.waits.clear()
        begun, memory = loader.images, list[tuple[int, int]]()
        clock = time.perf_counter()
        rate = measure_until_steady(lambda: _measure_window(loader, seconds, memory))
        spent = rate.cpu * (time.perf_counter() - clock)
        core_us = spent / (loader.images - begun) * 1e6
        waits = loader.waits.copy()
        progress.advance(1)
        trainer = simulate_trainer(loader, needed, 2 * seconds) if needed else None
        progress.advance(1)
        assert loader.found is not None
        limits = _measure_limits(loader.found, setting, seconds)
        progress.advance(1)
        stream, over = None, None
        if setting is not None:
            stream, over = _measure_stream(loader, setting, seconds)
        progress.advance(1)
        low, _, high = statistics.quantiles(rate.windows, n=4, method="inclusive")
        return LoaderReport(
            loader=name, batch=str(loader.found), first_batch=first_batch, rate=rate,
            quartiles=(low, high), core_us=core_us,
            next_ms={"median": 1e3 * statistics.median(waits),
                     "95 %": 1e3 * float(np.quantile(waits, 0.95)), "longest": 1e3 * max(waits)},
            memory=max(one for one, _ in memory), memory_before=memory_before,
            processes=max(count for _, count in memory), passes=loader.passes, trainer=trainer,
            limits=limits, stream=stream, over=over,
            machine=describe_machine(loader.found.on_gpu), warnings=_list_warnings(rate),
        )  # fmt: skip


def _measure_window(loader: ForeignLoader, seconds: float, memory: list[tuple[int, int]]) -> float:
    """Return the images per second of a window; notes the memory after it."""
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds / 5 or not images:
        images += loader.take()
    loader.synchronize()
    rate = images / (time.perf_counter() - start)
    memory.append(read_memory())
    return rate


def _measure_limits(found: FoundArray, setting: Setting | None, seconds: float) -> dict[str, float]:
    limits = {}
    if setting is not None:
        with open_parts(setting) as parts:
            if parts.encoding == "jpeg":
                jpegs = [one for batch in parts.load_batches(4) for one in batch.input.images]
                decoded = hardware.measure_libjpeg(jpegs, setting.threads, seconds / 2)
                limits["bare libjpeg-turbo, whole images"] = decoded.best
    if found.bytes:
        copied = hardware.measure_memory(cpu_count(), seconds / 2)
        each = found.bytes / found.shape[0]
        limits["a copy of the batch in memory"] = copied.best / (2 * each)
    return limits


def _measure_stream(loader: ForeignLoader, setting: Setting, seconds: float) -> tuple[Rate, float]:
    """Return our rate, and the median over the turns of ours by the loader's."""
    with setting.open_stream() as stream:

        def take() -> int:
            return len(next(stream).ids)

        def settle() -> None:
            loader.synchronize()
            setting.synchronize()

        for _ in range(WARM_UP):
            take()
        rates = measure_in_turn({"ours": take, "its": loader.take}, seconds, settle)
    pairs = zip(rates["ours"].windows, rates["its"].windows, strict=True)
    return rates["ours"], statistics.median(ours / its for ours, its in pairs)


def _list_warnings(rate: Rate) -> tuple[str, ...]:
    found = []
    if not rate.is_steady:
        found.append(f"not steady: windows differ by ±{rate.spread:.0%}")
    if rate.others > OTHERS:
        found.append(f"other programs used {rate.others:.0%} of this machine")
    return tuple(found)


def print_loader_report(report: LoaderReport, console: rich.console.Console) -> None:
    """Print a line for each measurement, and the verdict."""
    machine, rate = report.machine, report.rate
    low, high = report.quartiles
    times = ", ".join(f"{name} {value:,.1f} ms" for name, value in report.next_ms.items())
    lines = {
        "loader": f"{report.loader}; {machine.processor}, {format_count(machine.cores, 'core')}",
        "images counted": f"first dimension of {report.batch}",
        "rate": f"{rate.median:,.0f} img/s (half of the {len(rate.windows)} windows "
                f"{low:,.0f} to {high:,.0f})",
        "first batch": f"after {report.first_batch:.2f} s",
        "a batch": times,
        "CPU": f"{rate.cpu:.2f} cores, {report.core_us:,.0f} µs of a core for an image",
        "memory": f"{human_bytes(report.memory)} in {report.processes:,} process"
                  f"{'es' if report.processes > 1 else ''}, {human_bytes(report.memory_before)} "
                  "before the loader was made",
        "passes": f"started {format_count(report.passes, 'time')}",
    }  # fmt: skip
    if report.trainer is not None:
        one = report.trainer
        lines[f"trainer at {one.needed:,.0f} img/s"] = (
            f"waits {one.waits:.0%} of its time, gets {one.img_s:,.0f} img/s"
        )
    for name, img_s in report.limits.items():
        lines[name] = f"{img_s:,.0f} img/s, {rate.median / img_s:.2f} of it reached"
    if report.stream is not None:
        lines["our stream, in turn"] = (
            f"{report.stream.median:,.0f} img/s, {report.over:.2f} times the loader"
        )
    width = max(map(len, lines))
    for name, text in lines.items():
        console.print(f"{name:<{width}}  {text}", markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    console.print(report.verdict, markup=False, highlight=False, soft_wrap=True)
