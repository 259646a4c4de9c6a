"""Metrics of a run: times the steps, writes a row per step and validation, sends events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Publish, Stepped, Tell, Validated, Warned
from cluster.run.folder import KERNELS, LAYERS, METRICS, VALIDATION, Mark
from cluster.run.jsonl import WAITS, Rows
from cluster.run.kernels import encode_kernels
from model.exchange import Exchange
from model.optimizer import Means
from model.schedule import Rates
from pipeline.stream.timing import WaitTimes

TELL_EVERY = 0.25
"""Seconds between `Stepped` events; the file has every step."""
PUBLISH_EVERY = 1.0
"""Seconds between calls of the publishers."""
MEANS = (
    "loss", "top1_error", "img_s", "data_wait", *WAITS, "compute", "stall", "exchange",
    "exchange_bytes", "saving", "seconds",
)  # fmt: skip
RESULTS = ("loss", "top1_error", "top5_error")


class MetricsLog:
    """Times the steps and writes their rows; only the leader of the job writes.

    A row is written while the next step is running, so that a GPU never waits for the host to read
    the loss. `flush` writes the row of the last step.
    """

    def __init__(
        self, run: Path, mesh: ProcessMesh, tell: Tell, samples: int, step: int,
        publish: Sequence[Publish] = (), keep: list[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        """Open the files of `run`, first cutting off rows after `step`.

        Args:
            run: run folder.
            mesh: mesh of this process.
            tell: receives events.
            samples: number of training images, to compute epochs.
            step: step to resume from; 0 for a new run.
            publish: receive the metrics of this process about once a second.
            keep: list that collects every row of this process.
        """
        self._mesh, self._tell, self._samples = mesh, tell, samples
        self._publish, self._keep = list(publish), keep
        self._files = {
            name: Rows(run / name, step, lambda text: tell(Warned(text)))
            for name in ((METRICS, VALIDATION, LAYERS, KERNELS) if mesh.is_leader else ())
        }
        self._pending: tuple[dict[str, Any], Tensor] | None = None
        self._unsent: list[dict[str, Any]] = []
        self._unpublished: list[dict[str, Any]] = []
        self._sent_at = self._published = time.monotonic()
        self._replaced = self._total = 0
        self._waited = self._saved = self._exchanged = self._computed = 0.0
        self._waits = WaitTimes()
        self._sent = 0
        self._exchange: Exchange | None = None
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self, waits: WaitTimes) -> Iterator[None]:
        """Count the block as waiting for data; `waits` are the wait times of its stream."""
        before, start = waits.copy(), time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._waits = waits.since(before)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the block as computing, except its waits for the other column."""
        start = time.perf_counter()
        yield
        self._computed += time.perf_counter() - start

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
        exchanged, sent = _sum_traffic(self._exchange)
        yield
        self._start = time.perf_counter()
        self._waited = self._computed = 0.0
        after = _sum_traffic(self._exchange)
        self._exchanged += after[0] - exchanged
        self._sent += after[1] - sent

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
                its images that replace damaged ones (means over the replicas).
            exchange: exchange with the other column, if there is one.
        """
        self.flush()
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        waited, saved, computed = self._waited, self._saved, self._computed
        self._waited = self._saved = self._computed = 0.0
        exchanged, sent = _sum_traffic(exchange)
        row = self._begin_row(mark) | {
            "loss": 0.0,
            "top1_error": 0.0,
            "replaced": 0,
            "lr": rates.weights,
            "lr_bias": rates.biases,
            "img_s": round(config.batch_size / seconds, 2),
            "data_wait": round(waited / seconds, 4),
            **split_wait(waited, self._waits),
            "compute": round(computed - (exchanged - self._exchanged), 5),
            "stall": round((waited + saved) / (seconds + saved), 4),
            "exchange": round(exchanged - self._exchanged, 5),
            "exchange_bytes": sent - self._sent,
            "saving": round(saved, 5),
            "seconds": round(seconds, 5),
            "replicas": self._mesh.replicas,
        }
        self._exchange, self._exchanged, self._sent = exchange, exchanged, sent
        self._pending, self._total = (row, values), config.total_steps(self._samples)

    def flush(self) -> None:
        """Write the row of the last step, unless it is written."""
        if self._pending is None:
            return
        row, values = self._pending
        self._pending = None
        row["loss"], row["top1_error"], replaced = (round(value, 6) for value in values.tolist())
        row["replaced"] = round(replaced * self._mesh.replicas)
        self._replaced += row["replaced"]
        if self._keep is not None:
            self._keep.append(row)
        now = time.monotonic()
        if self._mesh.is_leader:
            self._files[METRICS].add(row)
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
        if self._mesh.is_leader:
            layers = {
                key: [float(f"{value:.4g}") for value in found]
                for part in means[: self._mesh.size]  # replica 0; the others hold the same
                for key, found in part.items()
            }
            self._files[LAYERS].add(self._begin_row(mark) | {"layers": layers})

    def kernels(self, mark: Mark, parts: Sequence[Mapping[str, npt.NDArray[np.float16]]]) -> None:
        """Write a snapshot of conv1's kernels.

        Args:
            mark: step after which it was taken.
            parts: `cluster.run.kernels.copy_first_kernels` of every process, in rank order.
        """
        if self._mesh.is_leader:
            columns = encode_kernels(parts[: self._mesh.size])  # the other replicas hold the same
            self._files[KERNELS].add(self._begin_row(mark) | {"columns": columns})

    def validation(self, mark: Mark, validate: Callable[[], dict[str, float]]) -> float:
        """Run a validation outside the time of the steps, and write its row.

        Returns:
            top-1 error, 0 to 1.
        """
        with self.paused():
            results = validate()
        if self._mesh.is_leader:
            row = self._begin_row(mark) | results
            self._files[VALIDATION].add(row)
            self._tell(Validated(row))
            self._publish_all(mark.step, {f"validation_{key}": results[key] for key in RESULTS})
        return results["top1_error"]

    def _begin_row(self, mark: Mark) -> dict[str, Any]:
        epoch = round(mark.position / self._samples, 4)
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
            if kind is None:
                self.flush()
                self._publish_rows()
                self.sync()
        finally:
            for file in self._files.values():
                file.close()


def split_wait(waited: float, waits: WaitTimes) -> dict[str, float]:
    """Split the seconds waited for data by cause; see `WAITS`. They add up to `waited`."""
    storage, feed = waits.fetch + waits.storage, waits.checksum + waits.feed
    causes = (storage, feed, waits.decode, max(0.0, waited - storage - feed - waits.decode))
    return {name: round(value, 5) for name, value in zip(WAITS, causes, strict=True)}


def _average_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last row with the means of the fields that vary from step to step."""
    return rows[-1] | {key: sum(row[key] for row in rows) / len(rows) for key in MEANS}


def _sum_traffic(exchange: Exchange | None) -> tuple[float, int]:
    """Return total seconds waited for the other column, and total bytes sent to it."""
    places = exchange.traffic.values() if exchange else ()
    return sum(one.waited for one in places), sum(one.forward + one.backward for one in places)
