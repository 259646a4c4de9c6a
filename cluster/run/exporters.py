"""Exporter of metrics: Prometheus gauges, through Ray.

Every node of a Ray cluster has a Prometheus endpoint (`ray start --metrics-export-port`); Ray
prefixes the names with `ray_`. `examples/deploy/duet.json` is a Grafana dashboard of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.mesh import ProcessMesh

GAUGES = {
    "img_s": ("duet_images_per_second", "Images per second, of the whole job."),
    "data_wait": ("duet_data_wait_ratio", "Share of a step spent waiting for data."),
    "wait_storage": ("duet_wait_storage_seconds", "Seconds waiting for the disk or the store."),
    "wait_feed": ("duet_wait_feed_seconds", "Seconds waiting for checksums, order, draws."),
    "wait_decode": ("duet_wait_decode_seconds", "Seconds of a step spent waiting for pixels."),
    "wait_transfer": (
        "duet_wait_transfer_seconds",
        "Seconds waiting for their way to the network.",
    ),
    "compute": ("duet_compute_seconds", "Seconds of a step spent computing."),
    "stall": ("duet_stall_ratio", "Share of the time spent waiting for data or a checkpoint."),
    "exchange": ("duet_exchange_seconds", "Seconds of a step spent waiting for the other column."),
    "reduce": (
        "duet_reduce_seconds",
        "Seconds of a step spent waiting for the gradients of other replicas.",
    ),
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
"""Gauge name and description by the field of the rows."""
TAGS = ("run", "replica", "column")


class PrometheusGauges:
    """Publishes rows as gauges; for processes started by Ray."""

    def __init__(self, run: str, mesh: ProcessMesh) -> None:
        """Create the gauges.

        Args:
            run: name of the run, used as a tag.
            mesh: mesh of this process.
        """
        from ray.util.metrics import Gauge

        columns = "".join("ab"[column] for column in mesh.columns)
        tags = {"run": run, "replica": str(mesh.replica), "column": columns}
        self._gauges: dict[str, Any] = {}
        for key, (name, meaning) in GAUGES.items():
            self._gauges[key] = Gauge(name, description=meaning, tag_keys=TAGS)
            self._gauges[key].set_default_tags(tags)

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        """Publish the numbers of a row."""
        for key in self._gauges.keys() & numbers.keys():
            self._gauges[key].set(float(numbers[key]))
