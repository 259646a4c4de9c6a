"""The training loop. Read this first; it needs no Ray, and one process is enough to run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint_writer import Checkpoints
from cluster.compute import autocast, compute_dtype, keep_memory
from cluster.config import Config
from cluster.events import Ended, Finished, Publish, Started, Tell
from cluster.feed import Feed, Whole
from cluster.gradients import GradientAverage
from cluster.health import check_finite
from cluster.log import Log
from cluster.place import Place
from cluster.rate_events import Recipe
from cluster.rates import RateControl
from cluster.run_folder import LEDGER, QUARANTINE, Mark
from cluster.run_mirror import Mirror, mirror_of
from cluster.tensorboard import Board
from model.alexnet import AlexNet
from model.evaluate import errors
from model.exchange import Exchange
from model.optim import Sgd2012, layer_statistics
from pipeline.batches import Stream, View
from pipeline.dataset import metadata
from pipeline.manifest import Manifest, identity
from pipeline.pixel_stats import Statistics


def train(
    config: Config, data: str, run: Path, place: Place, tell: Tell, *,
    ending: Callable[[], bool] = lambda: False, publish: Sequence[Publish] = (),
) -> None:  # fmt: skip
    """Train to the end of the run, from its newest checkpoint if there is one.

    Every process of the job calls this at the same time. The state of a run is the weights, the
    velocities, and two integers: the step and the position in the stream of samples.

    Args:
        config: the settings.
        data: folder or address of the sealed data set.
        run: folder for checkpoints and rows, the same on every node.
        place: of this process.
        tell: gets events, mostly from the leader of the job.
        ending: whether to save and return after this step; one process that wants it is enough.
        publish: get the numbers of this process about once a second.

    Raises:
        NotFinite: the loss is no number any more; all processes raise it.
        DataError, SetupError: from the stream, or the last checkpoint cannot be written.
    """
    keep_memory()
    torch.set_num_threads(place.cores)
    samples, about = look_up(config, data)
    total = config.total_steps(samples)

    net = network(config, len(about["classes"]), place)
    optimiser = Sgd2012(net.named_parameters(), config.momentum, config.weight_decay)
    checkpoints = Checkpoints(
        run, place, about, tell,
        keep=config.keep, keep_best=config.keep_best, store=config.store,
    )  # fmt: skip
    mark = checkpoints.resume(net, optimiser)
    rates = RateControl(
        Recipe(config=config, samples=samples, total=total), run, place, tell, mark.step
    )

    stream = open_stream(config, data, run, place, position=mark.position)
    feed = Feed(stream, place, batches=total - mark.step)
    average = GradientAverage(net, place)
    board = Board(run, mark.step) if config.tensorboard and place.leads else None
    log = Log(run, place, tell, samples, mark.step, [*publish, board] if board else publish)
    join_rows(checkpoints, log, mirror_of(run, config.store) if place.leads else None)
    with stream, feed, average, closing(checkpoints), board or nullcontext(), log:
        if place.leads:
            tell(Started(mark.step, total, describe(config, place)))
        for step in range(mark.step + 1, total + 1):
            with log.waiting():
                batch = next(feed)
            asked = place.poll(ending(), checkpoints.busy)  # the answers come while we compute
            rates.note(step - 1)
            optimiser.zero_grad()
            values = learn(step, net, batch, average, log, config, run, place)
            average.finish()
            optimiser.step(rates.at(step))

            mark = Mark(step=step, position=batch.position)
            log.step(mark, config, rates.at(step), place.mean(values), net.exchange)
            if due(step, config.statistics_every, total):
                log.statistics(mark, place.gather(layer_statistics(net, optimiser)))
            error = None
            if due(step, config.validate_every, total):
                error = log.validation(mark, lambda: validate(net, config, data, run, place))
            ends, busy = asked()
            saves = ends or due(step, config.checkpoint_every, total)
            if saves or error is not None:
                rates.review(step, error)
            if checkpoints.pending and not busy:
                checkpoints.finish()
            if saves:
                with log.saving():
                    checkpoints.begin(mark, net, optimiser, error)
            if ends:
                break
        with log.saving():
            checkpoints.finish(must=True)
    if place.leads:
        tell(Finished(mark.step) if mark.step >= total else Ended(mark.step))


def join_rows(checkpoints: Checkpoints, log: Log, mirror: Mirror | None) -> None:
    """Let no checkpoint count before the rows up to it are on the disk, and in the store."""
    checkpoints.before = log.sync
    if mirror is not None:
        mirror.begin()
        checkpoints.alongside = mirror.push


def learn(
    step: int, net: AlexNet, batch: Whole, average: GradientAverage, log: Log,
    config: Config, run: Path, place: Place,
) -> Tensor:  # fmt: skip
    """Leave the gradient of the batch's mean loss in the network, part by part.

    Returns:
        float [3]: mean loss and top-1 error of this replica's share of the batch, and how many of
        its pictures stand for damaged ones.
    """
    own, most = len(batch.labels), config.micro(place.replicas)
    first = batch.position - config.batch_size + place.replica * own
    dtype = compute_dtype(config.dtype, place.device)
    values = torch.zeros(2, device=place.device)
    for row, part in batch.parts(most):
        net.set_position(first + row)
        share = len(part.labels) / own
        loss, wrong = forward(net, part, config, place)
        with average.held(row + most < own):
            (loss * share).backward()
        log.flush()  # the row of the step before
        check_finite(loss, net, part.images, dtype, place, step, run)
        values += torch.stack((loss.detach(), wrong)) * share
    return torch.cat((values, batch.replaced.sum()[None]))


def look_up(config: Config, data: str) -> tuple[int, dict[str, Any]]:
    """Return how many training pictures there are, and what a checkpoint says of its origin."""
    folder = metadata(data, **config.cached)
    manifest = Manifest.load(folder)
    return manifest.split("train", folder).samples, {
        "config": asdict(config),
        "data_sha256": identity(folder),
        "classes": manifest.classes,
        "channel_mean": Statistics.load(folder, manifest.stats_sha256).channel_mean.tolist(),
    }


def network(config: Config, classes: int, place: Place) -> AlexNet:
    """Return the columns of the network that belong to this place, as they were drawn."""
    wire = torch.bfloat16 if config.exchange_dtype == "bfloat16" else None
    return AlexNet(
        columns=place.columns if place.pair else None,
        classes=classes,
        design=config.design,
        exchange=Exchange(place.pair, wire) if place.pair else None,
        seed=config.seed,
    ).to(place.device)


def forward(net: AlexNet, batch: Whole, config: Config, place: Place) -> tuple[Tensor, Tensor]:
    """Return mean loss (with its gradient) and top-1 error of a batch."""
    logits = net_output(net, batch, config, place)
    wrong, _ = errors(logits.detach(), batch.labels, batch.weights)
    return F.cross_entropy(logits, batch.labels), wrong / len(batch.labels)


@torch.no_grad()
def validate(net: AlexNet, config: Config, data: str, run: Path, place: Place) -> dict[str, float]:
    """Return loss and errors of the centre view of every sound validation picture, once each."""
    start = time.perf_counter()
    sums = torch.zeros(4, device=place.device, dtype=torch.float64)
    net.eval()
    stream = open_stream(config, data, run, place, split="val", view="centre", once=True)
    with stream, Feed(stream, place) as feed:
        for batch in feed:
            logits = net_output(net, batch, config, place)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            top1, top5 = errors(logits, batch.labels, batch.weights)
            sums += torch.stack(((losses * batch.weights).sum(), top1, top5, batch.weights.sum()))
    net.train()
    loss, top1_error, top5_error, samples = place.mean(sums).tolist()
    return {
        "loss": round(loss / samples, 6),
        "top1_error": round(top1_error / samples, 6),
        "top5_error": round(top5_error / samples, 6),
        "samples": round(samples * place.replicas),
        "seconds": round(time.perf_counter() - start, 3),
    }


def net_output(net: AlexNet, batch: Whole, config: Config, place: Place) -> Tensor:
    """Return the logits, float32 [b, classes]."""
    with autocast(compute_dtype(config.dtype, place.device), place.device):
        logits: Tensor = net(batch.images.float())
    return logits.float()


def open_stream(
    config: Config, data: str, run: Path, place: Place, *, split: str = "train",
    view: View = "random", position: int = 0, once: bool = False,
) -> Stream:  # fmt: skip
    """Open this process's share of the pictures; `once` is for an evaluation."""
    return Stream(
        data,
        split=split,
        view=view,
        position=position,
        once=once,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=place.rank,
        world_size=place.world_size,
        device="gpu" if place.device.type == "cuda" else "cpu",
        shuffle=config.shuffle,
        window=config.window,
        colour=config.colours,
        colour_divide=config.colour_divide,
        mean=config.mean,
        threads=config.threads or place.cores,
        strict=config.strict,
        quarantine=run / QUARANTINE,
        ledger=run / LEDGER if config.ledger and not once else None,
        **config.cached,
    )


def describe(config: Config, place: Place) -> str:
    """Return the workers in words."""
    if place.pair:
        each = "a column each"
    else:
        each = "both columns" if config.columns == 2 else "the one column"
        each += " each" if place.replicas > 1 else ""
    device = place.device.type if place.device.type == "cpu" else torch.cuda.get_device_name()
    many = "workers" if place.world_size > 1 else "worker"
    threads = f"{place.cores} thread{'s' if place.cores > 1 else ''}"
    return (
        f"{place.world_size} {many} ({each}, {threads}), {device}, "
        f"{compute_dtype(config.dtype, place.device)}"
    ).replace("torch.", "")


def due(step: int, every: int, total: int) -> bool:
    """Whether something done `every` steps (0: never) and at the end is due after `step`."""
    return every > 0 and (step % every == 0 or step == total)
