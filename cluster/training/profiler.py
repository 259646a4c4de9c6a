"""Profiler: splits the time of a step, and compares steps on streamed and on prepared batches.

Real and replayed steps are made in turn by the training loop itself; nothing is saved. Replayed
steps take batches from memory, so their speed-up is the most that a faster stream could gain: the
headspace.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from cluster.checkpoint.writer import CheckpointManager
from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Measured, Tell
from cluster.run.folder import Mark
from cluster.run.jsonl import WAITS
from cluster.run.metrics import MetricsLog
from cluster.training.components import Training, prepare_training, read_origin
from cluster.training.loop import make_steps
from cluster.training.pair_batches import PairBatches
from cluster.training.precision import prepare_for
from cluster.training.step import ReplicaBatch
from model.exchange import Exchange
from pipeline.dataset.segments import Segments
from pipeline.stream.timing import WaitTimes
from pipeline.throughput import hardware
from pipeline.throughput.clock import CpuLoad, Rate, StageRow, make_row
from pipeline.throughput.diagnosis import examine
from pipeline.throughput.nvidia_smi import find_watts, query_smi
from pipeline.throughput.stages import Setting
from pipeline.tools.files import read_text

WARM_UP = 5
"""Warm-up steps before the first measurement."""
TURNS = 3
"""Number of turns of real and replayed steps."""
SECONDS = 8.0
"""Seconds of real steps in all turns together."""
FEWEST = 4
"""Least number of steps in a turn."""
KEPT = 3
"""Number of batches that are replayed."""
AGREE = 0.2
"""Largest difference between the utilizations of turns, 0..1, that allow a verdict."""
LAG = 1.0
"""Seconds of a turn before its first power reading: drivers may tell the mean of a second."""
POWERCAP = Path("/sys/class/powercap")
"""Folder of the kernel's energy counters (RAPL); since Linux 5.10 only root may read them."""
EVERY = 0.5
"""Seconds between power readings; each starts nvidia-smi, which takes part of a core."""
PARTS = ("compute", "exchange", "reduce", *WAITS)
"""Parts of a step's wall time; the rest is bookkeeping."""


@dataclass(frozen=True, kw_only=True)
class LoopTiming:
    """Timing of some steps: means in seconds."""

    steps: int
    wall: float
    """Wall time of a step, by a clock around all of them."""
    parts: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Headspace:
    """Measurement of one process."""

    real: LoopTiming
    replayed: LoopTiming
    ratios: tuple[float, ...]
    """Replayed over real wall time of each turn."""
    alone_img_s: float
    """Images a second of the whole job's stream while nothing computes."""
    exchange_bytes: int
    """Bytes sent to the other column in a step."""
    exchange_rate: float
    """Bytes a second of the exchange alone; 0 without a pair."""
    others: float
    """Fraction of the machine that other programs used meanwhile, 0..1."""
    watts: float | None
    """Mean power of the worker's device over the real steps; None without a reading."""
    meter: str
    """Id of the power meter: a GPU's uuid, or the boot id of the host, whose workers share it."""


def measure(config: Config, data: str, mesh: ProcessMesh, tell: Tell) -> None:
    """Measure a training of these settings; all processes of the job call it together.

    The leader sends a `Measured` event. Files are written in a temporary folder only.

    Raises:
        DuetError: from the data set.
    """
    prepare_for(config, mesh)
    # A rate near 0: so many steps on the same few batches could end in a loss that is NaN.
    config = replace(
        config, validate_every=0, statistics_every=0, store="", ledger=False, tensorboard=False,
        wandb=False, mlflow=False,
        schedule="dexp", warmup=0.0, warmup_lr=0.0, changes=(), layer_rates=(), lr=1e-9,
        steps=10**7, epochs=1.0, init="",
    )  # fmt: skip
    segments, _ = read_origin(config, data)
    with (
        tempfile.TemporaryDirectory(prefix="duet-measure-") as scratch,
        prepare_training(config, data, Path(scratch), mesh, lambda _: None, ()) as training,
    ):
        found = _measure_headspace(training, segments, Path(scratch))
    everybody: Sequence[Headspace] = mesh.gather(found)
    if mesh.is_leader:
        tell(Measured(_build_result(config, data, mesh, everybody)))
    mesh.gather(None)  # the other processes leave their cores to the leader's measurements


def _measure_headspace(t: Training, segments: Segments, scratch: Path) -> Headspace:
    steps = _Steps(t, segments, scratch)
    kept = []
    for whole in itertools.islice(t.feed, KEPT):
        tensors = "images", "labels", "weights", "replaced"
        kept.append(replace(whole, **{name: getattr(whole, name).clone() for name in tensors}))
    ready = cast(PairBatches, _Replay(kept))
    steps.make(t.feed, WARM_UP)
    wall = steps.make(t.feed, WARM_UP).wall
    each = max(t.mesh.gather(wall))  # so that all processes make the same number of steps
    count = max(FEWEST, round(SECONDS / TURNS / each))
    real, replayed, load = list[LoopTiming](), list[LoopTiming](), CpuLoad()
    meter, name = create_meter(t.mesh.device)
    for _ in range(TURNS):
        with meter:
            real.append(steps.make(t.feed, count))
        steps.make(ready, 1)
        replayed.append(steps.make(ready, count))
        for _ in range(KEPT):  # batches prefetched meanwhile cost nothing
            next(t.feed)
    others = load.others()
    sent, rate = int(steps.rows[-1]["exchange_bytes"]), 0.0
    if t.net.exchange is not None:
        rate = _measure_exchange(t.net.exchange, sent, t.mesh)
    return Headspace(
        real=_average_timings(real), replayed=_average_timings(replayed),
        ratios=tuple(fast.wall / slow.wall for fast, slow in zip(replayed, real, strict=True)),
        alone_img_s=_measure_stream(t, count), exchange_bytes=sent, exchange_rate=rate,
        others=others, watts=meter.watts, meter=name,
    )  # fmt: skip


class _Steps:
    """Runs steps of the training loop and collects their rows."""

    def __init__(self, t: Training, segments: Segments, scratch: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        log = MetricsLog(
            scratch, t.mesh, lambda _: None, segments, 0, keep=lambda _, row: self.rows.append(row)
        )
        log.reducing = t.log.reducing
        self._t = replace(t, log=log, checkpoints=cast(CheckpointManager, _NoCheckpoints()))
        self._mark = t.mark

    def make(self, feed: PairBatches, count: int) -> LoopTiming:
        first = self._mark.step
        training = replace(self._t, feed=feed, mark=self._mark, total=first + count)
        before, start = len(self.rows), time.perf_counter()
        self._mark = Mark(step=make_steps(training, lambda: False).step, position=0)
        self._t.log.flush()
        if self._t.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / count
        rows = self.rows[before:]
        parts = {name: fmean(row[name] for row in rows) for name in PARTS}
        return LoopTiming(steps=count, wall=wall, parts=parts)


def read_cpu_energy(root: Path = POWERCAP) -> list[tuple[int, int]]:
    """Return the energy counter of each CPU package, and where it starts again, in microjoules.

    The list is empty where a counter cannot be read. Zones within a package are parts of it.
    """
    counters = []
    for zone in sorted(root.glob("intel-rapl:*")):  # AMD's have this name, too
        if read_text(zone / "name").startswith("package"):
            now, top = (read_text(zone / f"{x}_uj") for x in ("energy", "max_energy_range"))
            if not now.isdecimal() or not top.isdecimal():
                return []
            counters.append((int(now), int(top)))
    return counters


class GpuMeter:
    """Reads a GPU's power in a thread during the turns that it is entered for."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read, self._found = read, list[float]()

    def __enter__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        pause = LAG
        while not self._ended.wait(pause):
            watts, pause = self._read(), EVERY
            if watts is None or self._ended.is_set():
                return
            self._found.append(watts)

    @property
    def watts(self) -> float | None:
        """Mean of the readings; None without one."""
        return fmean(self._found) if self._found else None


class CpuMeter:
    """Reads the energy counters of the CPU packages around the turns that it is entered for."""

    def __init__(self, read: Callable[[], list[tuple[int, int]]] = read_cpu_energy) -> None:
        self._read, self._joules, self._seconds = read, 0.0, 0.0

    def __enter__(self) -> None:
        self._before, self._start = self._read(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds, after = time.perf_counter() - self._start, self._read()
        if after and len(after) == len(self._before):
            pairs = zip(self._before, after, strict=True)
            self._joules += sum((new - old) % top for (old, top), (new, _) in pairs) / 1e6
            self._seconds += seconds

    @property
    def watts(self) -> float | None:
        """Joules over seconds of all turns; None without counters."""
        return self._joules / self._seconds if self._seconds else None


def create_meter(device: torch.device) -> tuple[GpuMeter | CpuMeter, str]:
    """Return the power meter of a device, and the name of what it reads."""
    if device.type != "cuda":
        return CpuMeter(), read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return GpuMeter(lambda: find_watts(query_smi("--query-gpu=uuid,power.draw"), uuid)), uuid


def sum_power(everybody: Sequence[Headspace]) -> float | None:
    """Return the watts of a job; None where a worker's device has no reading.

    What several workers read, a shared GPU or the CPUs of their host, counts once.
    """
    if any(one.watts is None for one in everybody):
        return None
    by_meter = {one.meter: one.watts for one in everybody}
    return sum(watts for watts in by_meter.values() if watts is not None)


class _NoCheckpoints:
    """Stands in for the checkpoints; writes none."""

    is_pending = is_busy = False
    is_ended = True

    def begin(self, *_: object) -> None:
        pass

    def finish(self, must: bool = False) -> None:
        pass


class _Replay:
    """Yields the same batches again and again."""

    def __init__(self, kept: Sequence[ReplicaBatch]) -> None:
        self.waits = WaitTimes()
        self._turns: Iterator[ReplicaBatch] = itertools.cycle(kept)

    def __next__(self) -> ReplicaBatch:
        return next(self._turns)

    def flush(self) -> None:
        """Do nothing: there is no ledger."""


def _average_timings(loops: Sequence[LoopTiming]) -> LoopTiming:
    return LoopTiming(
        steps=sum(one.steps for one in loops),
        wall=fmean(one.wall for one in loops),
        parts={name: fmean(one.parts[name] for one in loops) for name in PARTS},
    )


def _measure_stream(t: Training, count: int) -> float:
    """Return images a second of the job's stream while nothing computes."""
    for _ in range(KEPT):
        next(t.feed)
    start = time.perf_counter()
    for _ in range(2 * count):
        next(t.feed)
    rate = 2 * count * t.config.batch_size / (time.perf_counter() - start)
    return min(t.mesh.gather(rate))


def _measure_exchange(exchange: Exchange, size: int, mesh: ProcessMesh) -> float:
    """Bytes a second that cross between columns, in messages of a layer's size."""
    message = torch.zeros(max(1, size // 8), dtype=torch.uint8, device=mesh.device)
    exchange.join_batch(message)
    start, turns = time.perf_counter(), 20
    for _ in range(turns):
        exchange.join_batch(message)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return turns * len(message) / (time.perf_counter() - start)


def _build_result(
    config: Config, data: str, mesh: ProcessMesh, everybody: Sequence[Headspace]
) -> dict[str, Any]:
    """Build the result for the driver: the split of a step, and the report on the stream."""
    slowest = max(everybody, key=lambda one: one.real.wall)
    au = sorted(ratio for one in everybody for ratio in one.ratios)
    au_median = au[len(au) // 2]
    replayed = config.batch_size / slowest.replayed.wall
    extra: list[StageRow] = []
    if slowest.exchange_rate:
        each = slowest.exchange_bytes / (config.batch_size // mesh.replicas)
        gpu = mesh.device.type == "cuda"
        copy = hardware.measure_upload(0.5) if gpu else hardware.measure_memory(1, 0.5)
        best, rate = copy.best / 2 / each, Rate((slowest.exchange_rate / each,), 0.0, 0.0)
        extra.append(make_row("pair exchange", rate, each,
                         limit=2 * best if gpu else best,
                         against="PCIe, pinned blocks" if gpu else "memory, copied by 1 thread",
                         note="alone: what crosses between the columns, both ways"))  # fmt: skip
    setting = Setting.of(
        data, config.stream, version=config.version,
        device="gpu" if mesh.device.type == "cuda" else "cpu",
        batch_size=config.batch_size // mesh.world_size,
        threads=config.threads or mesh.cores, cores=mesh.cores,
    )  # fmt: skip
    steady, needed = au[-1] - au[0] <= AGREE, replayed / mesh.world_size
    table = examine(setting, needed if steady else None, extra=extra).to_table()
    table["needed"] = needed
    img_s, watts = config.batch_size / slowest.real.wall, sum_power(everybody)
    if mesh.world_size > 1:
        table["verdict"] = f"One worker of {mesh.world_size}, alone: {table['verdict']}"
    return {
        "report": table,
        "workers": mesh.world_size,
        "step": {"wall": slowest.real.wall, "parts": slowest.real.parts,
                 "accounted": sum(slowest.real.parts.values()) / slowest.real.wall},
        "replayed": {"wall": slowest.replayed.wall, "parts": slowest.replayed.parts},
        "img_s": img_s, "replayed_img_s": replayed,
        "watts": watts, "joules_per_image": None if watts is None else watts / img_s,
        "stream_img_s": min(one.alone_img_s for one in everybody),
        "au": min(1.0, au_median), "stall": max(0.0, 1 - au_median),
        "spread": (au[0], au[-1]), "steady": steady,
        "others": max(one.others for one in everybody),
        "each": [asdict(one) for one in everybody],
    }  # fmt: skip
