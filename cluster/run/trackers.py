"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow. All get the same scalars.

--tensorboard   RUN/tensorboard
--wandb         where the environment says (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline);
                files of its own in RUN/wandb
--mlflow        MLFLOW_TRACKING_URI; RUN/mlruns without it

The name in RUN/config.toml (`run_id`) ties a run to its run at W&B, of which it is the id, and at
MLflow, of which it is the tag `duet.run`: a resumed training continues that run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from cluster.config import Config
from cluster.run.events import Publish, Tell, Warned
from cluster.run.folder import make_run_id
from pipeline.tools.errors import SetupError, summarize_error
from pipeline.tools.packages import require_package
from pipeline.tools.text import hide_credentials

PROJECT = "duet"
"""Project at W&B, experiment at MLflow, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set."""
FOLDER = "tensorboard"
RUN_TAG, STEP_TAG = "duet.run", "duet.step"
"""Tags of a run at MLflow: its name in RUN/config.toml, and the last step that was logged."""
CLOSE_TIMEOUT = 30.0
"""Seconds that the end of a training waits for a tracker to take the last rows."""
SCALARS = {
    "loss": "train/loss",
    "top1_error": "train/top1_error",
    "lr": "rates/weights",
    "lr_bias": "rates/biases",
    "img_s": "speed/img_s",
    "data_wait": "speed/data_wait",
    "stall": "speed/stall",
    "exchange": "speed/exchange_s",
    "reduce": "speed/reduce_s",
    "replicas": "speed/replicas",
    "validation_loss": "validation/loss",
    "validation_top1_error": "validation/top1_error",
    "validation_top5_error": "validation/top5_error",
}
"""Name of a scalar by the field of the rows."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run, as a tracker shows it."""

    folder: Path
    name: str
    """Name that tells the run from all others."""
    step: int
    """Step to resume from; 0 for a new run."""
    settings: Mapping[str, Any]
    """Every setting of the run."""


class Tracker(Protocol):
    """A place that receives scalars by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step; steps do not descend."""

    def close(self) -> None:
        """Record what is still held back, and let go."""


class TensorBoardTracker:
    """Scalars in RUN/tensorboard."""

    def __init__(self, run: TrackedRun) -> None:
        """Open RUN/tensorboard; entries after `run.step` are hidden.

        Raises:
            SetupError: the folder cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=run.step + 1, flush_secs=10)
        except OSError as error:
            raise SetupError(
                f"{folder} cannot be written ({error.strerror}); make room, or train with "
                "--no-tensorboard"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step.

        Raises:
            OSError: a write failed, now or some calls ago; the writer is unusable from then on.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        with suppress(OSError):  # no reason to fail a training: the rows have all numbers
            self._writer.close()


class WandbTracker:
    """A run at Weights & Biases whose id is the name of the run."""

    def __init__(self, run: TrackedRun) -> None:
        """Start or continue the run; raises whatever wandb raises."""
        os.environ.setdefault("WANDB_SILENT", "true")  # or it tells whose key it has found
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.name,
            name=run.folder.name,
            dir=str(run.folder),
            resume="allow",
            config=dict(run.settings),
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step; W&B keeps the first that it gets of each."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class MlflowTracker:
    """A run at MLflow that has the name of the run as a tag."""

    def __init__(self, run: TrackedRun) -> None:
        """Start the run, or continue the one with the tag; raises whatever mlflow raises."""
        uri = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            # mlflow-skinny has no other local store.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run.folder / "mlruns").as_uri()
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            experiment_id = self._client.create_experiment(name)
        except MlflowException:
            if (experiment := self._client.get_experiment_by_name(name)) is None:
                raise
            experiment_id = experiment.experiment_id
        found = self._client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run.name}'")
        self._last = 0
        if found:
            self._id = found[0].info.run_id
            self._last = int(found[0].data.tags.get(STEP_TAG, 0))
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(
            experiment_id, run_name=run.folder.name, tags={RUN_TAG: run.name}
        )
        self._id = created.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in run.settings.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step, unless it was sent before the run was resumed."""
        from mlflow.entities import Metric, RunTag

        if step < self._last:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=[RunTag(STEP_TAG, str(step))])

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


class BackgroundTracker:
    """A tracker that is opened, fed and closed in a thread: training never waits for a server.

    Its first error is told in one line, and then it takes nothing more.
    """

    def __init__(self, name: str, create: Callable[[], Tracker], tell: Tell) -> None:
        """Start the thread.

        Args:
            name: name of the flag, for warnings.
            create: opens the tracker.
            tell: receives the warning.
        """
        self._name, self._create, self._tell = name, create, tell
        self._has_warned = False
        self._rows: SimpleQueue[tuple[int, Mapping[str, float]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values of a step to the thread."""
        if self._thread.is_alive():
            self._rows.put((step, values))

    def close(self) -> None:
        """Wait for the thread, but not longer than `CLOSE_TIMEOUT`."""
        self._rows.put(None)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._warn(f"no answer for {CLOSE_TIMEOUT:g} s")

    def _run(self) -> None:
        try:
            with closing(self._create()) as tracker:
                while (row := self._rows.get()) is not None:
                    tracker.log(*row)
        except Exception as error:  # whatever a foreign library raises must not end the training
            self._warn(summarize_error(error))

    def _warn(self, reason: str) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        text = f"--{self._name} gets no more numbers ({reason}); the rows in RUN have them all"
        self._tell(Warned(text))


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
"""Trackers by the name of their setting, which is that of their flag, package and extra, too."""


def require_trackers(config: Config) -> None:
    """Raise unless the package of every tracker that a config names is installed.

    Raises:
        SetupError: one is not; names the extra.
    """
    for name in _list_trackers(config):
        require_package(name, name, f"--{name}")


@contextmanager
def open_trackers(
    config: Config, folder: Path, name: str, step: int, tell: Tell
) -> Iterator[list[Publish]]:
    """Open the trackers that a config names, and close them after the block.

    Args:
        config: settings of the run.
        folder: run folder.
        name: name that tells the run from all others; "": a run of an earlier version has none.
        step: step to resume from.
        tell: receives warnings.

    Raises:
        SetupError: a package is missing, or RUN/tensorboard cannot be written.
    """
    require_trackers(config)
    settings = {
        key: hide_credentials(value) if isinstance(value, str) else value
        for key, value in config.to_settings().items()
    }
    run = TrackedRun(
        folder=folder.resolve(), name=name or make_run_id(folder), step=step, settings=settings
    )
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        for tracker in _list_trackers(config):
            create = partial(TRACKERS[tracker], run)
            local = tracker == "tensorboard"
            opened = create() if local else BackgroundTracker(tracker, create, tell)
            trackers.append(stack.enter_context(closing(opened)))
        yield [partial(_publish, tracker) for tracker in trackers]


def _list_trackers(config: Config) -> list[str]:
    return [name for name in TRACKERS if getattr(config, name)]


def _publish(tracker: Tracker, step: int, numbers: Mapping[str, float]) -> None:
    """Log those numbers of a row that trackers show."""
    shown = {SCALARS[key]: float(numbers[key]) for key in SCALARS if key in numbers}
    tracker.log(step, shown)
