"""What a run writes down as it goes: a row a step, a row a validation, the same to the watcher."""

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
"""Seconds between steps told to the watcher; every step goes into the file."""
PUBLISH_EVERY = 1.0
"""Seconds between numbers published."""
MEANS = (
    "loss", "top1_error", "img_s", "data_wait", *WAITS, "compute", "stall", "exchange",
    "exchange_bytes", "saving", "seconds",
)  # fmt: skip
RESULTS = ("loss", "top1_error", "top5_error")


class MetricsLog:
    """Times the steps and writes their rows; only the leader of the job writes.

    A row is written while the next step is already under way, so that a GPU never waits for the
    host to read the loss. `flush` writes the row that is still owed.
    """

    def __init__(
        self, run: Path, mesh: ProcessMesh, tell: Tell, samples: int, step: int,
        publish: Sequence[Publish] = (), keep: list[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        """Open the files of `run`, first cutting off rows after `step`.

        Args:
            run: folder of the run.
            mesh: of this process.
            tell: the watcher.
            samples: training images, to count epochs.
            step: step the run goes on from; 0 for a new one.
            publish: get the numbers of this process about once a second.
            keep: gets every row of this process.
        """
        self._keep = keep
        self._mesh, self._tell, self._samples = mesh, tell, samples
        self._publish = list(publish)
        self._files: dict[str, Rows] = {}
        if mesh.is_leader:
            for name in (METRICS, VALIDATION, LAYERS, KERNELS):
                self._files[name] = Rows(run / name, step, lambda text: tell(Warned(text)))
        self._owed: tuple[dict[str, Any], Tensor] | None = None
        self._untold: list[dict[str, Any]] = []
        self._unpublished: list[dict[str, Any]] = []
        self._told = self._published = time.monotonic()
        self._replaced = self._total = 0
        self._waited = self._saved = self._exchanged = self._computed = 0.0
        self._waits = WaitTimes()
        self._sent = 0
        self._exchange: Exchange | None = None
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self, waits: WaitTimes) -> Iterator[None]:
        """Count the block as waiting for data; `waits` is what its stream counts."""
        before, start = waits.copy(), time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._waits = waits.since(before)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the block as computing, but for what it waits for the other column."""
        start = time.perf_counter()
        yield
        self._computed += time.perf_counter() - start

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the block as standing still for a checkpoint."""
        start = time.perf_counter()
        with self.paused():
            yield
        self._saved += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the block (validation, checkpoint) out of the time of the steps."""
        self.flush()
        before = _traffic(self._exchange)
        yield
        self._start = time.perf_counter()
        self._waited = self._computed = 0.0
        after = _traffic(self._exchange)
        self._exchanged += after[0] - before[0]
        self._sent += after[1] - before[1]

    def step(
        self, mark: Mark, config: Config, rates: Rates, values: Tensor,
        exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        """Note a step that was launched.

        Args:
            mark: its number, from 1, and the samples consumed by the job after it.
            config: the settings.
            rates: its learning rates.
            values: float [3] on the device: mean loss and top-1 error of the batch, and how many
                of its images replace damaged ones (means over the replicas).
            exchange: the link to the other column, if there is one.
        """
        self.flush()
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        waited, self._waited = self._waited, 0.0
        saved, self._saved = self._saved, 0.0
        computed, self._computed = self._computed, 0.0
        exchanged, sent = _traffic(exchange)
        row = {
            "position": mark.position,
            "epoch": self._epoch(mark.position),
            "step": mark.step,
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
        self._owed, self._total = (row, values), config.total_steps(self._samples)

    def flush(self) -> None:
        """Write the row that is still owed."""
        if self._owed is None:
            return
        row, values = self._owed
        self._owed = None
        row["loss"], row["top1_error"], replaced = (round(value, 6) for value in values.tolist())
        row["replaced"] = round(replaced * self._mesh.replicas)
        self._replaced += row["replaced"]
        if self._keep is not None:
            self._keep.append(row)
        now = time.monotonic()
        if self._mesh.is_leader:
            self._files[METRICS].add(row)
            self._untold.append(row)
            if now - self._told >= TELL_EVERY:
                self._tell(Stepped(_mean(self._untold)))
                self._told = now
                self._untold.clear()
        if self._publish:
            self._unpublished.append(row)
            if now - self._published >= PUBLISH_EVERY:
                self._publish_rows()
                self._published = now

    def _publish_rows(self) -> None:
        """Publish the means of the rows since the last time."""
        if self._unpublished:
            more = {"replaced": self._replaced, "total": self._total}
            mean = _mean(self._unpublished) | more
            self._publish_all(mean["step"], mean)
            self._unpublished.clear()

    def _publish_all(self, step: int, numbers: Mapping[str, float]) -> None:
        for publish in list(self._publish):
            try:
                publish(step, numbers)
            except Exception as error:  # whoever looks on must not end the training
                self._publish.remove(publish)
                self._tell(
                    Warned(f"numbers are published no more ({type(error).__name__}: {error})")
                )

    def statistics(self, mark: Mark, means: Sequence[Mapping[str, Means]]) -> None:
        """Note mean |weight|, |update| and |gradient| of each layer, column and kind of parameter.

        Args:
            mark: the step after which they were taken.
            means: `model.optimizer.compute_layer_statistics` of every process, in rank order.
        """
        if self._mesh.is_leader:
            row = {
                "position": mark.position,
                "epoch": self._epoch(mark.position),
                "step": mark.step,
                "layers": {
                    key: [float(f"{value:.4g}") for value in found]
                    for part in means[: self._mesh.size]  # replica 0; the others hold the same
                    for key, found in part.items()
                },
            }
            self._files[LAYERS].add(row)

    def kernels(self, mark: Mark, parts: Sequence[Mapping[str, npt.NDArray[np.float16]]]) -> None:
        """Keep the kernels of conv1.

        Args:
            mark: the step after which they are so.
            parts: `cluster.run.kernels.copy_first_kernels` of every process, in rank order.
        """
        if self._mesh.is_leader:
            row = {
                "position": mark.position,
                "epoch": self._epoch(mark.position),
                "step": mark.step,
                "columns": encode_kernels(
                    parts[: self._mesh.size]
                ),  # the other replicas hold the same
            }
            self._files[KERNELS].add(row)

    def validation(self, mark: Mark, validate: Callable[[], dict[str, float]]) -> float:
        """Make a pass over the validation images, outside the time of the steps, and note it.

        Returns:
            its top-1 error, 0 to 1.
        """
        with self.paused():
            results = validate()
        if self._mesh.is_leader:
            row = {
                "position": mark.position,
                "epoch": self._epoch(mark.position),
                "step": mark.step,
            }
            self._files[VALIDATION].add(row | results)
            self._tell(Validated(row | results))
            self._publish_all(mark.step, {f"validation_{key}": results[key] for key in RESULTS})
        return results["top1_error"]

    def _epoch(self, position: int) -> float:
        return round(position / self._samples, 4)

    def sync(self) -> None:
        """Put the rows on the disk; a checkpoint must not know of steps that have none.

        Raises:
            SetupError: the disk does not take them.
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
    """Seconds of waiting for data by what was not ready; see `WAITS`. They add up to `waited`."""
    storage, feed = waits.fetch + waits.storage, waits.checksum + waits.feed
    causes = (storage, feed, waits.decode, max(0.0, waited - storage - feed - waits.decode))
    return {name: round(value, 5) for name, value in zip(WAITS, causes, strict=True)}


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row with the mean of what varies from step to step."""
    means = {key: sum(row[key] for row in rows) / len(rows) for key in MEANS}
    return {**rows[-1], **means}


def _traffic(exchange: Exchange | None) -> tuple[float, int]:
    """Seconds that this process has waited for the other column, and bytes sent there, so far."""
    places = exchange.traffic.values() if exchange else ()
    return sum(one.waited for one in places), sum(one.forward + one.backward for one in places)
