"""Metrics of a run: times the steps, writes a row per step and validation, sends events."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.config import Config
from cluster.config.milestones import Milestone, find_shortfalls, parse_milestones
from cluster.mesh import ProcessMesh
from cluster.run.events import Publish, Stepped, Tell, Validated, Warned
from cluster.run.folder import KERNELS, LAYERS, METRICS, VALIDATION, Mark
from cluster.run.jsonl import WAITS, Rows
from cluster.run.kernels import encode_kernels
from model.exchange import Exchange
from model.optimizer import Means
from model.schedule import Rates
from model.timing import HostCopy, Instant, Span, Stopwatch, mark_time, sum_seconds
from pipeline.dataset.segments import Segments, as_segments, count_epochs
from pipeline.stream.timing import WaitTimes
from pipeline.tools.jsonl import Row

TELL_EVERY = 0.25
"""Seconds between `Stepped` events; the file has every step."""
PUBLISH_EVERY = 1.0
"""Seconds between calls of the publishers, and between looks at the memory in use."""
MEANS = (
    "loss", "top1_error", "img_s", "data_wait", *WAITS, "compute", "stall", "exchange",
    "exchange_bytes", "reduce", "saving", "seconds",
)  # fmt: skip
RESULTS = ("loss", "top1_error", "top5_error")


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A step that was launched; a GPU may still compute it."""

    mark: Mark
    rates: Rates
    batch_size: int
    values: HostCopy
    start: Instant
    end: Instant
    waited: list[Span]
    """The stream was not ready."""
    computed: list[Span]
    exchanged: list[Span]
    """The other column was not ready."""
    sent: int
    """Bytes sent to the other column."""
    reduced: list[Span]
    """The sums of gradients over the replicas were not ready."""
    waits: WaitTimes
    """Seconds that the host waited for the stream, by cause."""
    host_waited: float
    """Seconds that the host waited for the stream."""
    saved: float
    """Seconds that a checkpoint blocked training."""


class MetricsLog:
    """Times the steps and writes their rows; only the leader of the job writes.

    A row is written while the next step is running, so that a GPU never waits for the host to read
    the loss. `flush` writes the row of the last step. Times of a step are those of the device: a
    GPU that is busy with the step before does not wait for data, though the host may.
    """

    def __init__(
        self, run: Path, mesh: ProcessMesh, tell: Tell, samples: int | Segments, step: int,
        publish: Sequence[Publish] = (), keep: Callable[[str, Row], object] = lambda *_: None,
    ) -> None:  # fmt: skip
        """Open the files of `run`, first cutting off rows after `step`.

        Args:
            run: run folder.
            mesh: mesh of this process.
            tell: receives events.
            samples: number of training images, or the segments of the run, to compute epochs.
            step: step to resume from; 0 for a new run.
            publish: receive the metrics of this process about once a second.
            keep: receives each row with the name of its file, in all processes.
        """
        self._mesh, self._tell, self._segments = mesh, tell, as_segments(samples)
        self._publish, self._keep = list(publish), keep
        self._files = {
            name: Rows(run / name, step, lambda text: tell(Warned(text)))
            for name in ((METRICS, VALIDATION, LAYERS, KERNELS) if mesh.is_leader else ())
        }
        self._pending: _Pending | None = None
        self._unsent: list[dict[str, Any]] = []
        self._unpublished: list[dict[str, Any]] = []
        self._sent_at = self._published = time.monotonic()
        self._replaced = self._total = 0
        self._waiting, self._computing = Stopwatch(), Stopwatch()
        self._exchanged: list[Span] = []
        self._waits = WaitTimes()
        self._host_waited = self._saved = 0.0
        self._sent = 0
        self._memory: int | None = None
        self._looked = -PUBLISH_EVERY
        self._exchange: Exchange | None = None
        self.milestones: Sequence[Milestone] = ()
        """Published results that validations are compared with (`expect`)."""
        self._validated = 0.0
        self.reducing = Stopwatch()
        """Spans of `computing` that an update waited for the gradients of other replicas."""
        self._start = mark_time(mesh.device)

    def expect(self, milestones: Sequence[str], position: int) -> None:
        """Compare validations after `position` with published results (setting `milestones`)."""
        self.milestones = parse_milestones(milestones)
        self._validated = float(count_epochs(self._segments, position))

    @contextmanager
    def waiting(self, waits: WaitTimes) -> Iterator[None]:
        """Count the block as waiting for data; `waits` are the wait times of its stream."""
        before, start = waits.copy(), time.perf_counter()
        with self._waiting.running(self._mesh.device):
            yield
        self._host_waited += time.perf_counter() - start
        self._waits = waits.since(before)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the block as computing, except its waits for the other column and replicas."""
        with self._computing.running(self._mesh.device):
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the block as time that training was blocked by a checkpoint."""
        start = time.perf_counter()
        with self.paused():
            yield
        self._saved += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block (validation, checkpoint) from the time of the steps."""
        self.flush()
        exchanged, sent = _take_waits(self._exchange), _sum_bytes(self._exchange)
        yield
        self._start = mark_time(self._mesh.device)
        self._waiting.take()
        self._computing.take()
        self._host_waited = 0.0
        _take_waits(self._exchange)
        self._exchanged += exchanged
        self._sent += _sum_bytes(self._exchange) - sent

    def step(
        self, mark: Mark, config: Config, rates: Rates, values: Tensor,
        exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        """Record a step that was launched; its row is written by the next `flush`.

        Args:
            mark: number of the step, from 1, and position after it.
            config: settings of the run.
            rates: learning rates of the step.
            values: float [3] on the device: mean loss and top-1 error of the batch, and number of
                its images that replace damaged ones.
            exchange: exchange with the other column, if there is one.
        """
        self.flush()
        end, sent = mark_time(self._mesh.device), _sum_bytes(exchange)
        self._pending = _Pending(
            mark=mark,
            rates=rates,
            batch_size=config.batch_size,
            values=HostCopy(values),
            start=self._start,
            end=end,
            waited=self._waiting.take(),
            computed=self._computing.take(),
            exchanged=self._exchanged + _take_waits(exchange),
            sent=sent - self._sent,
            reduced=self.reducing.take(),
            waits=self._waits,
            host_waited=self._host_waited,
            saved=self._saved,
        )
        self._start, self._exchanged, self._host_waited, self._saved = end, [], 0.0, 0.0
        self._exchange, self._sent = exchange, sent
        self._total = config.total_steps(self._segments)

    def flush(self) -> None:
        """Write the row of the last step, unless it is written; waits for the device to end it."""
        if self._pending is None:
            return
        row, self._pending = self._finish_row(self._pending), None
        self._replaced += row["replaced"]
        self._add(METRICS, row)
        now = time.monotonic()
        if self._mesh.is_leader:
            self._unsent.append(row)
            if now - self._sent_at >= TELL_EVERY:
                self._tell(Stepped(_average_rows(self._unsent)))
                self._sent_at = now
                self._unsent.clear()
        if self._publish:
            self._unpublished.append(row)
            if now - self._published >= PUBLISH_EVERY:
                self._publish_rows()
                self._published = now

    def _finish_row(self, step: _Pending) -> dict[str, Any]:
        """Return the row of a step that was launched, when the device has computed it."""
        # Its values were copied after all that is timed: when they are here, so are the events.
        loss, top1_error, replaced = (round(value, 6) for value in step.values.read())
        seconds, saved = sum_seconds([(step.start, step.end)]), step.saved
        waited, exchanged = sum_seconds(step.waited), sum_seconds(step.exchanged)
        reduced = sum_seconds(step.reduced)
        return self._begin_row(step.mark) | {
            "loss": loss,
            "top1_error": top1_error,
            "replaced": round(replaced),
            "lr": step.rates.weights,
            "lr_bias": step.rates.biases,
            "img_s": round(step.batch_size / seconds, 2),
            "data_wait": round(waited / seconds, 4),
            **split_wait(waited, step.waits, step.host_waited),
            "compute": round(sum_seconds(step.computed) - exchanged - reduced, 5),
            "stall": round((waited + saved) / (seconds + saved), 4),
            "exchange": round(exchanged, 5),
            "exchange_bytes": step.sent,
            "reduce": round(reduced, 5),
            "saving": round(saved, 5),
            "seconds": round(seconds, 5),
            "replicas": self._mesh.replicas,
            "memory": self._look_at_memory(),
        }

    def _look_at_memory(self) -> int | None:
        """Return the bytes of memory in use when it was last looked at, about a second ago."""
        now = time.monotonic()
        if now - self._looked >= PUBLISH_EVERY:
            self._memory, self._looked = read_memory(self._mesh.device), now
        return self._memory

    def _publish_rows(self) -> None:
        """Publish the means of the rows since the last call."""
        if self._unpublished:
            totals = {"replaced": self._replaced, "total": self._total}
            mean = _average_rows(self._unpublished) | totals
            self._publish_all(mean["step"], mean)
            self._unpublished.clear()

    def _publish_all(self, step: int, numbers: Mapping[str, float]) -> None:
        for publish in list(self._publish):
            try:
                publish(step, numbers)
            except Exception as error:  # a monitor must not end the training
                self._publish.remove(publish)
                self._tell(
                    Warned(f"numbers are published no more ({type(error).__name__}: {error})")
                )

    def statistics(self, mark: Mark, means: Sequence[Mapping[str, Means]]) -> None:
        """Write mean |weight|, |update| and |gradient| of each layer, column and parameter kind.

        Args:
            mark: step after which they were computed.
            means: `model.optimizer.compute_layer_statistics` of every process, in rank order.
        """
        layers = {
            key: [float(f"{value:.4g}") for value in found]
            for part in means[: self._mesh.size]  # replica 0; the others hold the same
            for key, found in part.items()
        }
        self._add(LAYERS, self._begin_row(mark) | {"layers": layers})

    def kernels(self, mark: Mark, parts: Sequence[Mapping[str, npt.NDArray[np.float16]]]) -> None:
        """Write a snapshot of conv1's kernels.

        Args:
            mark: step after which it was taken.
            parts: `cluster.run.kernels.copy_first_kernels` of every process, in rank order.
        """
        columns = encode_kernels(parts[: self._mesh.size])  # the other replicas hold the same
        self._add(KERNELS, self._begin_row(mark) | {"columns": columns})

    def validation(self, mark: Mark, validate: Callable[[], dict[str, float]]) -> float:
        """Run a validation outside the time of the steps, and write its row.

        Returns:
            top-1 error, 0 to 1.
        """
        with self.paused():
            results = validate()
        row = self._begin_row(mark) | results
        self._add(VALIDATION, row)
        if self._mesh.is_leader:
            self._tell(Validated(row))
            for text in find_shortfalls(self.milestones, self._validated, row):
                self._tell(Warned(text))
            self._validated = row["epoch"]
            self._publish_all(mark.step, {f"validation_{key}": results[key] for key in RESULTS})
        return results["top1_error"]

    def _add(self, name: str, row: Row) -> None:
        """Write a row, in the leader; every process keeps it."""
        self._keep(name, row)
        if self._mesh.is_leader:
            self._files[name].add(row)

    def _begin_row(self, mark: Mark) -> dict[str, Any]:
        epoch = round(float(count_epochs(self._segments, mark.position)), 4)
        return {"position": mark.position, "epoch": epoch, "step": mark.step}

    def sync(self) -> None:
        """Write all rows to disk; call it before a checkpoint of their steps counts.

        Raises:
            SetupError: the disk refuses them.
        """
        for file in self._files.values():
            file.sync()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._mesh.device.type == "cpu":  # a GPU may have failed
                self.flush()
            if kind is None:
                self.flush()
                self._publish_rows()
                self.sync()
        finally:
            for file in self._files.values():
                file.close()


def read_memory(device: torch.device) -> int | None:
    """Return the bytes of memory in use; None where the system does not say.

    Of a GPU: by all that runs on it, decoder and collectives too. Without one: by this process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def split_wait(waited: float, waits: WaitTimes, host_waited: float) -> dict[str, float]:
    """Split the seconds waited for data by cause; see `WAITS`. They add up to `waited`.

    Args:
        waited: seconds that the device waited.
        waits: seconds that the host waited, by cause.
        host_waited: seconds that the host waited, by its clock. The same as `waited` on a CPU; a
            GPU waits as long or less, for the same causes.
    """
    part = min(1.0, waited / host_waited) if host_waited else 0.0
    storage, feed = part * (waits.fetch + waits.storage), part * (waits.checksum + waits.feed)
    decode = part * waits.decode
    causes = (storage, feed, decode, max(0.0, waited - storage - feed - decode))
    return {name: round(value, 5) for name, value in zip(WAITS, causes, strict=True)}


def _average_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last row with the means of the fields that vary from step to step."""
    return rows[-1] | {key: sum(row[key] for row in rows) / len(rows) for key in MEANS}


def _take_waits(exchange: Exchange | None) -> list[Span]:
    """Return when the device waited for the other column since the last call."""
    return exchange.waits.take() if exchange else []


def _sum_bytes(exchange: Exchange | None) -> int:
    """Return the bytes sent to the other column so far."""
    places = exchange.traffic.values() if exchange else ()
    return sum(one.forward + one.backward for one in places)
