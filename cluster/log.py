"""What a run writes down as it goes: a row a step, a row a validation, the same to the watcher."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from cluster.config import Config
from cluster.events import Stepped, Tell, Validated
from cluster.place import Place
from cluster.run_folder import Mark
from model.optim import Means
from model.schedule import Rates

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
LAYERS = "layers.jsonl"
TELL_EVERY = 0.25
"""Seconds between steps told to the watcher; every step goes into the file."""


class Log:
    """Times the steps and writes their rows; only the leader of the job writes.

    A row is written while the next step is already under way, so that a GPU never waits for the
    host to read the loss. `flush` writes the row that is still owed.
    """

    def __init__(self, run: Path, place: Place, tell: Tell, samples: int, step: int) -> None:
        """Open the files of `run`, first cutting off rows after `step`.

        Args:
            run: folder of the run.
            place: of this process.
            tell: the watcher.
            samples: training pictures, to count epochs.
            step: step the run goes on from; 0 for a new one.
        """
        self._place, self._tell, self._samples = place, tell, samples
        self._files: dict[str, IO[str]] = {}
        if place.leads:
            for name in (METRICS, VALIDATION, LAYERS):
                cut(run / name, step)
                self._files[name] = (run / name).open("a", encoding="utf-8")
        self._owed: tuple[dict[str, Any], Tensor] | None = None
        self._window: list[dict[str, Any]] = []
        self._told = time.monotonic()
        self._waited = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the block (validation, checkpoint) out of the time of the steps."""
        self.flush()
        yield
        self._start = time.perf_counter()
        self._waited = 0.0

    def step(self, mark: Mark, config: Config, rates: Rates, values: Tensor) -> None:
        """Note a step that was launched.

        Args:
            mark: its number, from 1, and the samples consumed by the job after it.
            config: the settings.
            rates: its learning rates.
            values: float [3] on the device: mean loss and top-1 error of the batch, and how many
                of its pictures replace damaged ones (means over the replicas).
        """
        self.flush()
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        waited, self._waited = self._waited, 0.0
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
            "seconds": round(seconds, 5),
        }
        self._owed = row, values

    def flush(self) -> None:
        """Write the row that is still owed."""
        if self._owed is None:
            return
        row, values = self._owed
        self._owed = None
        row["loss"], row["top1_error"], replaced = (round(value, 6) for value in values.tolist())
        row["replaced"] = round(replaced * self._place.replicas)
        if self._place.leads:
            self._write(METRICS, row)
            self._window.append(row)
            if time.monotonic() - self._told >= TELL_EVERY:
                self._tell(Stepped(_mean(self._window)))
                self._told = time.monotonic()
                self._window.clear()

    def statistics(self, mark: Mark, means: Sequence[Mapping[str, Means]]) -> None:
        """Note mean |weight|, |update| and |gradient| of each layer, column and kind of parameter.

        Args:
            mark: the step after which they were taken.
            means: `model.optim.layer_statistics` of every process, in rank order.
        """
        if self._place.leads:
            row = {
                "position": mark.position,
                "epoch": self._epoch(mark.position),
                "step": mark.step,
                "layers": {
                    key: [float(f"{value:.4g}") for value in found]
                    for part in means[: self._place.size]  # replica 0; the others hold the same
                    for key, found in part.items()
                },
            }
            self._write(LAYERS, row)

    def validation(self, mark: Mark, validate: Callable[[], dict[str, float]]) -> float:
        """Make a pass over the validation pictures, outside the time of the steps, and note it.

        Returns:
            its top-1 error, 0 to 1.
        """
        with self.paused():
            results = validate()
        if self._place.leads:
            row = {
                "position": mark.position,
                "epoch": self._epoch(mark.position),
                "step": mark.step,
            }
            self._write(VALIDATION, row | results)
            self._tell(Validated(row | results))
        return results["top1_error"]

    def _epoch(self, position: int) -> float:
        return round(position / self._samples, 4)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(row) + "\n")
        self._files[name].flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            for file in self._files.values():
                file.close()


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row with the mean of what varies from step to step."""
    means = {
        key: sum(row[key] for row in rows) / len(rows)
        for key in ("loss", "top1_error", "img_s", "data_wait", "seconds")
    }
    return {**rows[-1], **means}


def cut(path: Path, step: int) -> None:
    """Shorten a file of rows so that none is after `step`, nor half written.

    One truncation: whoever reads meanwhile sees whole rows only, and a crash leaves the old
    file or the new one.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            row = _step_of(line)
            if row is None or row > step:
                break
            end += len(line)
    os.truncate(path, end)


def _step_of(line: bytes) -> int | None:
    """Step of a whole row; None for anything else."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
