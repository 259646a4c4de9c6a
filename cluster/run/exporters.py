"""The numbers of a run for TensorBoard, in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.tools.errors import SetupError

FOLDER = "tensorboard"
SCALARS = {
    "loss": "train/loss",
    "top1_error": "train/top1_error",
    "lr": "rates/weights",
    "lr_bias": "rates/biases",
    "img_s": "speed/img_s",
    "data_wait": "speed/data_wait",
    "stall": "speed/stall",
    "exchange": "speed/exchange_s",
    "replicas": "speed/replicas",
    "validation_loss": "validation/loss",
    "validation_top1_error": "validation/top1_error",
    "validation_top5_error": "validation/top5_error",
}
"""Names there, by those in the rows."""


class Board:
    """Writes scalars; the leader of the job has one."""

    def __init__(self, run: Path, step: int) -> None:
        """Open RUN/tensorboard; what is there of steps after `step` is hidden.

        Raises:
            SetupError: the package is missing, or nothing can be written there.
        """
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        folder = run / FOLDER
        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)
        except OSError as error:
            raise SetupError(
                f"{folder} cannot be written ({error.strerror}); make room, or train with "
                "--no-tensorboard"
            ) from error

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of a row.

        Raises:
            OSError: the disk does not take them, now or some calls ago; it takes none any more.
        """
        for key in SCALARS.keys() & numbers.keys():
            self._writer.add_scalar(SCALARS[key], float(numbers[key]), step)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # no reason for a training to fail; the rows have it all
            self._writer.close()


def check_installed() -> None:
    """Look whether there is the package.

    Raises:
        SetupError: there is not.
    """
    if find_spec("tensorboard") is None:
        raise SetupError(
            "--tensorboard needs the package tensorboard; pip install 'duet[tensorboard]'"
        )
