"""Class probabilities of every image of a split, saved so that networks can be averaged.

    RUN/probabilities-1.safetensors      centre view
    RUN/probabilities-10.safetensors     ten views

        ids            int64 [N]             index in the split's stored order, 0..N-1
        labels         int64 [N]             index in `classes`
        weights        float32 [N]           1; 0 where the image is damaged
        probabilities  float32 [N, classes]  rows sum to 1; zeros where the weight is 0
        metadata       "about": JSON of `ProbabilityInfo`

Reading runs no code and loads only the requested rows. Rows are written as they come, too: 50,000
images of 1,000 classes are 200 MB.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import atomic_write
from pipeline.tools.jsonl import parse_json

VERSION = 1
ALIGNMENT = 8
"""The header ends at a multiple of so many bytes."""


@dataclass(frozen=True, kw_only=True)
class ProbabilityInfo:
    """Metadata of a probabilities file."""

    views: int
    """Number of views, 1 or 10."""
    split: str
    samples: int
    """Number N of images in the split."""
    classes: tuple[str, ...]
    """Class names in the order of the columns."""
    data_sha256: str
    """Identity of the data set (`pipeline.dataset.manifest.identity`)."""
    step: int
    """Step of the checkpoint."""

    @classmethod
    def parse(cls, text: str) -> ProbabilityInfo:
        """Parse the JSON that `text` returns.

        Raises:
            ValueError: the text is something else; the message says why.
        """
        facts = parse_json(text)
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        try:
            known = {field.name: facts[field.name] for field in fields(cls)}
        except KeyError as error:
            raise ValueError(f"its metadata lack {error}") from error
        return cls(**known | {"classes": tuple(known["classes"])})

    def text(self) -> str:
        """Return the metadata as JSON."""
        return json.dumps({"version": VERSION, **asdict(self)})


def probability_path(run: Path, views: int) -> Path:
    """Return the path of a run's probabilities."""
    return run / f"probabilities-{views}.safetensors"


def suggest_evaluation(run: Path, views: int) -> str:
    """Return the hint that names the command which makes them."""
    return f"duet evaluate {run} --views {views} --save-probabilities makes it"


class ProbabilityWriter:
    """Writes rows in stored order as they come; see `open_writer`."""

    def __init__(self, file: IO[bytes], about: ProbabilityInfo) -> None:
        """Write the header of a safetensors file: the sizes of all tensors are known."""
        self._file, self._done = file, 0
        self._labels = torch.zeros(about.samples, dtype=torch.int64)
        self._weights = torch.zeros(about.samples)
        n, classes, start = about.samples, len(about.classes), 0
        header: dict[str, Any] = {"__metadata__": {"about": about.text()}}
        for name, dtype, shape, size in (
            ("ids", "I64", [n], 8 * n),
            ("labels", "I64", [n], 8 * n),
            ("weights", "F32", [n], 4 * n),
            ("probabilities", "F32", [n, classes], 4 * n * classes),
        ):
            offsets = [start, start + size]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            start += size
        line = json.dumps(header).encode()
        line += b" " * (-len(line) % ALIGNMENT)
        file.write(struct.pack("<Q", len(line)) + line)
        self._columns = file.tell()
        file.seek(header["probabilities"]["data_offsets"][0], os.SEEK_CUR)

    def add(self, probabilities: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Write the next rows.

        Args:
            probabilities: float32 [b, classes].
            labels: int64 [b].
            weights: [b], 0 for damaged images; rows beyond N are padding and are skipped.
        """
        rows = slice(self._done, min(self._done + len(labels), len(self._labels)))
        count = rows.stop - rows.start
        self._labels[rows] = labels[:count].cpu()
        self._weights[rows] = weights[:count].cpu()
        sound = self._weights[rows, None] > 0
        self._write(torch.where(sound, probabilities[:count].float().cpu(), 0.0), "<f4")
        self._done = rows.stop

    def finish(self) -> None:
        """Write ids, labels and weights, which are kept until the last row.

        Raises:
            ValueError: rows are missing.
        """
        samples = len(self._labels)
        if self._done != samples:
            raise ValueError(f"{self._done} rows were written, not {samples}")
        self._file.seek(self._columns)
        self._write(torch.arange(samples), "<i8")
        self._write(self._labels, "<i8")
        self._write(self._weights, "<f4")

    def _write(self, values: Tensor, dtype: str) -> None:
        self._file.write(values.numpy().astype(dtype, copy=False).tobytes())


@contextmanager
def open_writer(path: Path, about: ProbabilityInfo) -> Iterator[ProbabilityWriter]:
    """Open a file for all N rows; it gets its name when the block ends without an error.

    Raises:
        ValueError: rows are missing at the end of the block.
    """
    with atomic_write(path) as file:
        writer = ProbabilityWriter(file, about)
        yield writer
        writer.finish()


class SavedProbabilities:
    """Probabilities of a run; rows are read on request."""

    def __init__(self, run: Path, views: int) -> None:
        """Open the file of `run`.

        Raises:
            UsageError: there is no such file; names the command that makes it.
            DataError: the file is damaged or of other views.
        """
        self.run = run
        path = probability_path(run, views)
        if not path.is_file():
            raise UsageError(f"there is no {path}; {suggest_evaluation(run, views)}")
        try:
            self._file: Any = safe_open(path, framework="pt")
            self.about = ProbabilityInfo.parse((self._file.metadata() or {}).get("about", "null"))
            """Metadata of the file."""
            self.labels: Tensor = self._file.get_tensor("labels")
            """int64 [N]."""
            self.weights: Tensor = self._file.get_tensor("weights")
            """float32 [N], 0 where the image is damaged."""
            self._rows: Any = self._file.get_slice("probabilities")
            self._check(views)
        except (SafetensorError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path} cannot be used ({reason}); {suggest_evaluation(run, views)} anew"
            ) from error

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), float32 [stop - start, classes]."""
        return self._rows[start:stop]

    def _check(self, views: int) -> None:
        about = self.about
        shape = [about.samples, len(about.classes)]
        if about.views != views or self._rows.get_shape() != shape:
            raise ValueError(f"its rows are {self._rows.get_shape()}, not {shape} of {views} views")
        kinds = self.labels.dtype, self.weights.dtype, self._rows.get_dtype()
        if kinds != (torch.int64, torch.float32, "F32"):
            raise ValueError(f"its numbers are of the kinds {kinds}")
        wrong = (self.labels < 0) | (self.labels >= len(about.classes))
        if len(self.labels) != about.samples or wrong.any():
            raise ValueError("its labels are not those of its rows")
        if len(self.weights) != about.samples or not self.weights.sum() > 0:
            raise ValueError("it counts no image")
