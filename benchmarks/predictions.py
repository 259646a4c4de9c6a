"""Predicted beside measured gains of changes: how well the profiler predicts.

    python benchmarks/predictions.py DATA [--seconds 2] [--json]

DATA is a JPEG set in a folder. Three changes:

    threads   1 -> 2 (or as many as there are cores)
    raw       the set packed raw, all of it, against the trial on some of its images
    store     the set behind an HTTP server on this machine that answers late and slowly: the
              first epoch against one from the cache, predicted from a few shards

Gains are compared: rates before and after are measured in turn.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import tyro
from harness.report import Figure, Options, Report, Table, start

from pipeline.throughput import stages, stream_rate
from pipeline.throughput.model import Costs, predict_rate, sweep_threads
from pipeline.throughput.stages import Setting, measure_reading, open_parts
from pipeline.throughput.stream_rate import measure_fetching, open_measured_stream
from pipeline.tools.units import cpu_count

TURNS = 5


@dataclass(frozen=True, kw_only=True)
class PredictionOptions(Options):
    """Measure the gains that the profiler predicts."""

    data: Annotated[str, tyro.conf.Positional]
    """A JPEG data set in a folder."""
    seconds: float = 2.0
    """Seconds of a measurement."""
    latency: float = 0.05
    """Seconds before the server answers."""
    bandwidth: float = 20e6
    """Bytes a second of all its connections together."""


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured gain of a change."""

    name: str
    predicted: float
    """Predicted rate after the change over that before it."""
    measured: float

    @property
    def off(self) -> float:
        """Predicted over measured gain, minus 1."""
        return self.predicted / self.measured - 1


def measure_gain(before: Setting, after: Setting, seconds: float) -> float:
    """Measure two streams in turn; return the median of their ratios."""
    ratios = []
    with open_measured_stream(before) as first, open_measured_stream(after) as second:
        for run in (first, second):  # a first epoch of raw images copies them
            run.measure_window(seconds)
        for _ in range(TURNS):
            rates = []
            for run in (first, second):
                run.measure_window(0, 8)
                rates.append(run.measure_window(seconds / TURNS))
            ratios.append(rates[1] / rates[0])
    return statistics.median(ratios)


def measure_costs(setting: Setting, seconds: float, counts: list[int]) -> Costs:
    """Measure the stages alone."""
    with open_parts(setting) as parts:
        alone = stages.measure_stages(parts, seconds / 2, 40)
        return sweep_threads(parts, alone, counts, seconds)


def threads(setting: Setting, seconds: float) -> Outcome:
    """Compare one decoding thread with one a core."""
    most = cpu_count()
    costs = measure_costs(setting, seconds, [1, most])
    gain = predict_rate(replace(costs, threads=most)) / predict_rate(replace(costs, threads=1))
    real = measure_gain(replace(setting, threads=1), replace(setting, threads=most), seconds)
    return Outcome(f"threads 1 -> {most}", gain, real)


def raw(setting: Setting, seconds: float) -> Outcome:
    """Compare JPEG with raw images."""
    with open_parts(setting) as parts:
        need = -(-stream_rate.RAW_IMAGES // setting.batch_size)
        loaded = parts.load_batches(need)
        with open_measured_stream(setting) as run:
            run.measure_window(seconds / 2)
            now = statistics.median(run.measure_window(seconds / TURNS) for _ in range(TURNS))
        trial, _ = stream_rate.measure_raw(setting, loaded, seconds)
    with tempfile.TemporaryDirectory(prefix="duet-predict-") as scratch:
        source, packed = Path(scratch) / "jpegs", Path(scratch) / "raw"
        with open_parts(setting) as parts:
            everything = len(parts.shard_reader)
            stream_rate.unpack_images(parts.read_batches(0), source, everything)
        subprocess.run(
            [sys.executable, "-m", "pipeline.build_shards", str(packed), "--train", str(source),
             "--encoding", "raw"], check=True, capture_output=True,
        )  # fmt: skip
        with open_parts(replace(setting, data=str(packed))) as parts:
            measure_reading(parts, 1.0, everything // setting.batch_size)
        real = measure_gain(setting, replace(setting, data=str(packed)), 2 * seconds)
    return Outcome("jpeg -> raw", trial.median / now, real)


class SlowServer(ThreadingHTTPServer):
    """Serves a folder on loopback; all connections share a bandwidth."""

    daemon_threads = True

    def __init__(self, folder: Path, latency: float, bandwidth: float) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.latency, self.bandwidth = latency, bandwidth
        self._lock, self._free = threading.Lock(), time.monotonic()

    def handle_error(self, *_: object) -> None:
        """Ignore clients that hang up: a measurement that ends does."""

    @property
    def address(self) -> str:
        """Address of the data set."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def pay(self, size: int) -> None:
        """Wait until the wire has carried `size` more bytes."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self.bandwidth
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlowServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while block := source.read(2**16):
            self.server.pay(len(block))
            outputfile.write(block)


@contextmanager
def start_slow_server(folder: Path, latency: float, bandwidth: float) -> Iterator[SlowServer]:
    """Start a server, which ends after the block."""
    server = SlowServer(folder, latency, bandwidth)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def store(setting: Setting, options: PredictionOptions) -> Outcome:
    """Compare the first epoch, from a store, with epochs from the cache."""
    with (
        start_slow_server(Path(setting.data), options.latency, options.bandwidth) as server,
        tempfile.TemporaryDirectory(prefix="duet-predict-") as scratch,
    ):
        remote = replace(
            setting, data=server.address, shuffle="block", window=4, cache=f"{scratch}/cache"
        )
        fetched = measure_fetching(remote, 2 * options.seconds)
        if fetched is None:
            raise SystemExit("too few shards: pack DATA with --samples-per-shard 250")
        costs = measure_costs(
            replace(setting, shuffle="block", window=4), options.seconds, [setting.threads]
        )
        with open_parts(setting) as parts:
            rate, each = fetched.together / parts.bytes_each, parts.bytes_each
            samples = len(parts.shard_reader)
        slow = replace(costs, store=rate, fetch_cpu=fetched.cpu / rate)
        gain = predict_rate(costs) / predict_rate(slow)
        # The first epoch, from where the first window has arrived to the last shard; then others.
        with remote.stream() as stream:
            first = take_samples(stream, setting.batch_size, samples // 4)
            start = time.perf_counter()
            batches = int(samples * 0.45) // setting.batch_size
            for _ in range(batches):
                next(stream)
            cold = batches * setting.batch_size / (time.perf_counter() - start)
            for _ in range((samples - first) // setting.batch_size - batches):
                next(stream)
            start = time.perf_counter()
            for _ in range(2 * batches):
                next(stream)
            warm = 2 * batches * setting.batch_size / (time.perf_counter() - start)
    assert each > 0
    return Outcome(
        f"store ({options.latency * 1e3:.0f} ms, {options.bandwidth / 1e6:.0f} MB/s) -> cache",
        gain, warm / cold,
    )  # fmt: skip


def take_samples(stream: Any, size: int, samples: int) -> int:
    """Take the first samples; return how many that were."""
    taken = 0
    while taken < samples:
        next(stream)
        taken += size
    return taken


def report(options: PredictionOptions) -> Report:
    """Predict and measure all three changes."""
    setting = Setting(data=options.data)
    outcomes = [
        threads(setting, options.seconds), raw(setting, options.seconds), store(setting, options)
    ]  # fmt: skip
    rows = [
        (one.name, f"{one.predicted:.2f}x", f"{one.measured:.2f}x", f"{one.off:+.0%}")
        for one in outcomes
    ]
    return Report(
        tables={"predictions": Table(("change", "predicted", "measured", "off"), rows)},
        figures={f"{one.name}, predicted over measured": Figure([one.off + 1], "x")
                 for one in outcomes},
        facts={"predictions": [dataclasses.asdict(one) | {"off": one.off} for one in outcomes]},
    )  # fmt: skip


if __name__ == "__main__":
    start(PredictionOptions, report, __doc__)
