"""The training loop. Start reading here: it needs no Ray, and one process can run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint.memory import Memory
from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Ended, Finished, Publish, Started, Tell
from cluster.run.folder import UNKNOWN, Mark, RunIdentity
from cluster.run.kernels import copy_first_kernels, is_snapshot_step
from cluster.training.components import Training, describe_workers, open_stream, prepare_training
from cluster.training.finite_check import check_finite
from cluster.training.pair_batches import PairBatches
from cluster.training.precision import prepare_for
from model.metrics import count_errors, round_shares
from model.optimizer import compute_layer_statistics
from model.timing import HostCopy
from pipeline.dataset.segments import find_segment


def train(
    config: Config, data: str, run: Path, mesh: ProcessMesh, tell: Tell, *,
    identity: RunIdentity = UNKNOWN, is_stopping: Callable[[], bool] = lambda: False,
    publish: Sequence[Publish] = (), memory: Memory | None = None,
) -> None:  # fmt: skip
    """Train to the end of the run, resuming from its newest checkpoint if there is one.

    All processes of the job call this together. The state of a run is the weights, the velocities,
    and two integers: the step and the position in the stream of samples.

    Args:
        config: the settings.
        data: folder or address of the sealed data set.
        run: run folder for checkpoints and rows, the same on every node.
        mesh: mesh of this process.
        tell: receives events, mostly from the leader of the job.
        identity: of the run and its data set; refused are checkpoints and data of another.
        is_stopping: returns whether to save and return after this step; one process suffices.
        publish: receive the metrics of this process about once a second.
        memory: keeps the state of this process for the next call, should another process fail.

    Raises:
        NotFinite: the loss is NaN or infinite; both columns of the replica whose loss it is raise
            it, and the other replicas lose them.
        DataError, SetupError: from the stream, or the last checkpoint cannot be written.
    """
    prepare_for(config, mesh)
    with prepare_training(config, data, run, mesh, tell, publish, identity, memory) as training:
        if mesh.is_leader:
            step, saved = training.mark.step, training.checkpoints.last_step
            tell(Started(step, training.total, describe_workers(config, mesh), saved))
        mark = make_steps(training, is_stopping)
    if mesh.is_leader:
        tell(Finished(mark.step) if mark.step >= training.total else Ended(mark.step))


def make_steps(t: Training, is_stopping: Callable[[], bool]) -> Mark:
    """Train until the last step or until a stop is requested.

    Returns:
        the last step made; it has a checkpoint.
    """
    config, mesh, mark, total = t.config, t.mesh, t.mark, t.total
    if not t.checkpoints.is_ended:  # its state is one from memory
        end_step(t, mark, lambda: [False, False])
    for step in range(mark.step + 1, total + 1):
        with t.log.waiting(t.feed.waits):
            batch = next(t.feed)
        # The all-reduce runs while we compute.
        flags = mesh.reduce_max(is_stopping(), t.checkpoints.is_busy)
        t.rates.note(step - 1)
        with t.log.computing():  # forward pass, backward pass, update: see step.py
            first = batch.position - config.batch_size + mesh.replica * len(batch.labels)
            values = t.train_step(batch, first, t.rates.at(step), partial(review_loss, t, step))

        mark = Mark(step=step, position=batch.position)
        t.log.step(mark, config, t.rates.at(step), values, t.net.exchange)
        if is_due(step, config.statistics_every, total):
            t.log.statistics(mark, mesh.gather(compute_layer_statistics(t.net, t.optimizer)))
        if config.statistics_every and is_snapshot_step(step, total):
            t.log.kernels(mark, mesh.gather(copy_first_kernels(t.net)))
        t.memory.keep(mark, is_ended=False)
        if end_step(t, mark, flags):
            break
    with t.log.saving():
        t.checkpoints.finish(must=True)
    return mark


def end_step(t: Training, mark: Mark, flags: Callable[[], Sequence[int]]) -> bool:
    """Validate, review the rates and save after a step, where it is due.

    Args:
        t: the training, with the weights of that step.
        mark: the step.
        flags: returns whether to stop, and whether a checkpoint is still being written.

    Returns:
        whether to stop.
    """
    step, error = mark.step, None
    if is_due(step, t.config.validate_every, t.total):
        error = t.log.validation(mark, partial(validate, t, mark.position))
    stops, busy = flags()
    saves = bool(stops) or is_due(step, t.config.checkpoint_every, t.total)
    if saves or error is not None:
        t.rates.review(step, error)
    if t.checkpoints.is_pending and not busy:
        t.checkpoints.finish()
    if saves:
        with t.log.saving():
            t.feed.flush()
            t.checkpoints.begin(mark, t.net, t.optimizer, error)
    t.memory.keep(mark, is_ended=True)
    return bool(stops)


def review_loss(t: Training, step: int, values: HostCopy, images: Tensor) -> None:
    """Write the row of the step before, then look at the loss of this one.

    The backward pass is launched, and the weights are not yet updated.
    """
    t.log.flush()
    check_finite(t, values.read()[0], images, step)


@torch.no_grad()
def validate(t: Training, position: int = 0) -> dict[str, float]:
    """Return mean loss and errors over all sound validation images, centre view, once each.

    They are those of the version of the data set that training reads at `position`.
    """
    start, mesh = time.perf_counter(), t.mesh
    sums = torch.zeros(4, device=mesh.device, dtype=torch.float64)
    t.net.eval()
    stream = open_stream(
        t.config, t.data, t.run, mesh, t.segments[: find_segment(t.segments, position) + 1],
        split="val", crop="center", once=True, ledger=None,
    )  # fmt: skip
    with stream, PairBatches(stream, mesh) as feed:
        for batch in feed:
            logits = t.train_step.infer(batch.images)
            losses = round_shares(F.cross_entropy(logits, batch.labels, reduction="none"))
            top1, top5 = count_errors(logits, batch.labels, batch.weights)
            sums += torch.stack(((losses * batch.weights).sum(), top1, top5, batch.weights.sum()))
    t.net.train()
    loss, top1_error, top5_error, samples = mesh.mean(sums).tolist()
    return {
        "loss": round(loss / samples, 6),
        "top1_error": round(top1_error / samples, 6),
        "top5_error": round(top5_error / samples, 6),
        "samples": round(samples * mesh.replicas),
        "seconds": round(time.perf_counter() - start, 3),
    }


def is_due(step: int, every: int, total: int) -> bool:
    """Return whether `step` is a multiple of `every` (0: never) or the last step."""
    return every > 0 and (step % every == 0 or step == total)
