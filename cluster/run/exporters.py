"""The numbers of a run for TensorBoard, in RUN/tensorboard.

The numbers of a worker where Ray's Prometheus endpoint shows them.

Every node of a Ray cluster has one (`ray start --metrics-export-port`); Ray puts `ray_` before the
names. `cluster/deploy/duet.json` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.mesh import ProcessMesh
from pipeline.tools.errors import SetupError

GAUGES = {
    "img_s": ("duet_images_per_second", "Images per second, of the whole job."),
    "data_wait": ("duet_data_wait_ratio", "Share of a step spent waiting for data."),
    "wait_storage": (
        "duet_wait_storage_seconds",
        "Seconds waiting for the disk or the store.",
    ),
    "wait_feed": (
        "duet_wait_feed_seconds",
        "Seconds waiting for checksums, order, draws.",
    ),
    "wait_decode": ("duet_wait_decode_seconds", "Seconds of a step spent waiting for pixels."),
    "wait_transfer": (
        "duet_wait_transfer_seconds",
        "Seconds waiting for their way to the network.",
    ),
    "compute": ("duet_compute_seconds", "Seconds of a step spent computing."),
    "stall": ("duet_stall_ratio", "Share of the time spent waiting for data or a checkpoint."),
    "exchange": ("duet_exchange_seconds", "Seconds of a step spent waiting for the other column."),
    "exchange_bytes": ("duet_exchange_bytes", "Bytes sent to the other column in a step."),
    "saving": ("duet_saving_seconds", "Seconds that training stood still for a checkpoint."),
    "seconds": ("duet_step_seconds", "Seconds of a step."),
    "loss": ("duet_loss", "Mean loss of the batch."),
    "top1_error": ("duet_top1_error_ratio", "Top-1 error of the batch."),
    "lr": ("duet_learning_rate", "Learning rate of the weights."),
    "epoch": ("duet_epoch", "Passes over the training images."),
    "step": ("duet_step", "Steps made."),
    "total": ("duet_steps", "Steps of the whole run."),
    "replicas": ("duet_replicas", "Copies of the network that train now."),
    "replaced": ("duet_quarantined_pictures", "Damaged images replaced since the last start."),
    "validation_loss": ("duet_validation_loss", "Loss of the validation images."),
    "validation_top1_error": ("duet_validation_top1_error_ratio", "Their top-1 error."),
    "validation_top5_error": ("duet_validation_top5_error_ratio", "Their top-5 error."),
}
"""Name and meaning of what is shown, by the name in the rows."""
TAGS = ("run", "replica", "column")


class PrometheusGauges:
    """Publishes rows as gauges; for processes that Ray has started."""

    def __init__(self, run: str, mesh: ProcessMesh) -> None:
        """Make the gauges.

        Args:
            run: name of the run, for the tag.
            mesh: of this process.
        """
        from ray.util.metrics import Gauge

        columns = "".join("ab"[column] for column in mesh.columns)
        tags = {"run": run, "replica": str(mesh.replica), "column": columns}
        self._gauges: dict[str, Any] = {}
        for key, (name, meaning) in GAUGES.items():
            self._gauges[key] = Gauge(name, description=meaning, tag_keys=TAGS)
            self._gauges[key].set_default_tags(tags)

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show numbers of a row."""
        for key in self._gauges.keys() & numbers.keys():
            self._gauges[key].set(float(numbers[key]))


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


class TensorBoardWriter:
    """Writes scalars; the leader of the job has one."""

    def __init__(self, run: Path, step: int) -> None:
        """Open RUN/tensorboard; what is there of steps after `step` is hidden.

        Raises:
            SetupError: the package is missing, or nothing can be written there.
        """
        require_tensorboard()
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

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # no reason for a training to fail; the rows have it all
            self._writer.close()


def require_tensorboard() -> None:
    """Look whether there is the package.

    Raises:
        SetupError: there is not.
    """
    if find_spec("tensorboard") is None:
        raise SetupError(
            "--tensorboard needs the package tensorboard; pip install 'duet[tensorboard]'"
        )
