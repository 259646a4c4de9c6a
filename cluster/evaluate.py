"""Error rates of a trained network on a split, every image once.

    python -m cluster.evaluate RUN [--views 1|10] [--best | --checkpoint STEP] [--json]

One process with both columns, on the newest complete checkpoint unless another is named. Views as
in the paper (section 4.1): the centre crop, or the mean over four corners, centre and their mirror
images. Writes RUN/evaluation-1.json or RUN/evaluation-10.json and, for
`cluster.experiments.ensemble`, RUN/probabilities-1.safetensors or RUN/probabilities-10.safetensors.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.checkpoint.format import Checkpoint, choose_checkpoint, load_checkpoint
from cluster.cli.options import EvaluateOptions
from cluster.config import Config, fit_images, read_run_config
from cluster.launch.session import refuse_relative
from cluster.run.console import print_warning
from cluster.run.events import Warned
from cluster.run.folder import CONFIG, QUARANTINE
from cluster.run.probabilities import (
    ProbabilityInfo,
    ProbabilityWriter,
    open_writer,
    probability_path,
)
from cluster.training.precision import autocast, choose_device, compute_dtype, prepare_device
from model.alexnet import AlexNet
from model.metrics import average_views, sum_metrics
from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest, identity
from pipeline.dataset.record import read_segments
from pipeline.dataset.segments import Segments
from pipeline.remote.dataset import choose_versions, locate_dataset
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write, ensure_writable
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

MOST_CONFUSED = 50
"""Most classes for which the confusion matrix is counted and written: its size is their square."""
BATCH = 64


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(EvaluateOptions, argv, "python -m cluster.evaluate")
    for name, path in (("RUN", options.run), ("DATA", options.data)):
        if path:
            refuse_relative(name, path, missing=True)
    read_run_config(options.run / CONFIG)
    ensure_writable(options.run, "run folder")
    result = evaluate(options)
    path = options.run / f"evaluation-{options.views}.json"
    with atomic_write(path) as file:
        file.write((json.dumps(result) + "\n").encode())
    out = sys.stderr if options.json else sys.stdout
    views = "centre view" if options.views == 1 else "ten views"
    out.write(
        f"{options.split}, {result['samples']:,} images, {views}, "
        f"step {result['step']} ({result['chosen']}): top-1 error {result['top1_error']:.2%}, "
        f"top-5 error {result['top5_error']:.2%}, loss {result['loss']:.4f} "
        f"({result['img_s']:,.0f} img/s) -> {path}\n"
    )
    if options.save_probabilities:
        out.write(f"probabilities -> {probability_path(options.run, options.views)}\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Return what goes into evaluation-<views>.json; errors are fractions.

    Raises:
        UsageError: no run, no checkpoint, or a data set that does not fit.
    """
    config, trained_on = read_run_config(options.run / CONFIG)
    found = choose_checkpoint(
        options.run, config.store, print_warning, options.checkpoint, options.best
    )
    data, folder = locate_dataset(
        options.run, options.data, version=options.data_version, **config.cached
    )
    options = replace(options, data=data)
    manifest = Manifest.load(folder)
    samples = manifest.split(options.split, folder).samples
    data_sha256 = identity(folder)
    if data_sha256 not in (trained_on, *(one.version for one in read_segments(options.run))):
        text = f"{options.data} is not the data set of the training; its own mean is subtracted"
        print_warning(Warned(text))
    if fit_images(config, manifest.side, options.data).design != config.design:
        raise UsageError(
            f"the network of {options.run} reads images of {config.design.image_size} pixels, "
            f"and {options.data} holds others; name the data set of the training"
        )
    if options.views == 10 and manifest.side == config.design.image_size:
        raise UsageError(f"ten views of {options.data} would all be the same; use --views 1")
    device = choose_device(options.device)
    prepare_device(device, cpu_count())
    net = AlexNet(classes=_count_classes(found, manifest, options), design=config.design).to(device)
    load_checkpoint(found.path, net)
    stream = _open_stream(options, config, device, choose_versions(options.run, folder))
    about = ProbabilityInfo(
        views=options.views,
        split=options.split,
        samples=samples,
        classes=manifest.classes,
        data_sha256=data_sha256,
        step=found.mark.step,
    )
    path = probability_path(options.run, options.views)
    saving = open_writer(path, about) if options.save_probabilities else nullcontext()
    with saving as writer, autocast(compute_dtype(config.dtype, device), device):
        counts, seconds = _count(net, stream, options, writer)
    return {
        "views": options.views,
        "split": options.split,
        "step": found.mark.step,
        "chosen": _name_choice(options),
        "position": found.mark.position,
        **_summarize(counts, manifest.classes),
        "img_s": round(stream.samples / seconds, 1),
        "seconds": round(seconds, 2),
    }


def _name_choice(options: EvaluateOptions) -> str:
    """Return in a word why the checkpoint is the one: best, named or newest."""
    return "best" if options.best else "newest" if options.checkpoint is None else "named"


def _open_stream(
    options: EvaluateOptions, config: Config, device: torch.device, version: str | Segments
) -> Stream:
    crop: Literal["center", "whole"] = "center" if options.views == 1 else "whole"
    return Stream(
        options.data,
        split=options.split,
        version=version,
        batch_size=BATCH,
        device="gpu" if device.type == "cuda" else "cpu",
        crop=crop,
        size=config.design.image_size,
        mean=config.mean,
        once=True,
        quarantine=options.run / QUARANTINE,
        strict=config.strict,
        **config.cached,
    )


@dataclass(frozen=True)
class AnswerCounts:
    """Answers of a network to the images of a split, counted."""

    sums: Tensor
    """float64 [4], see `model.metrics.sum_metrics`."""
    images: Tensor
    """int64 [classes]: images of each class."""
    right: Tensor
    """int64 [classes]: those of them whose class got the highest probability."""
    confusion: Tensor | None
    """int64 [classes, classes]: images by class and answer; None with more than `MOST_CONFUSED`."""

    @classmethod
    def zeros(cls, classes: int) -> AnswerCounts:
        """Return the counts of no images."""
        is_small = classes <= MOST_CONFUSED
        return cls(
            sums=torch.zeros(4, dtype=torch.float64),
            images=torch.zeros(classes, dtype=torch.int64),
            right=torch.zeros(classes, dtype=torch.int64),
            confusion=torch.zeros(classes, classes, dtype=torch.int64) if is_small else None,
        )

    def add(self, probabilities: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add a batch; the arguments are those of `model.metrics.sum_metrics`."""
        self.sums.add_(sum_metrics(probabilities, labels, weights).cpu())
        real = weights > 0
        labels, answers = labels[real].cpu(), probabilities[real].argmax(1).cpu()
        ones = torch.ones_like(labels)
        self.images.index_add_(0, labels, ones)
        self.right.index_add_(0, labels, (labels == answers).long())
        if self.confusion is not None:
            self.confusion.index_put_((labels, answers), ones, accumulate=True)


def _count(
    net: AlexNet, stream: Stream, options: EvaluateOptions, writer: ProbabilityWriter | None
) -> tuple[AnswerCounts, float]:
    """Return the counted answers, and the seconds they took."""
    counts = AnswerCounts.zeros(net.classes)
    start = time.perf_counter()
    what = f"evaluating, {options.views} view{'s' if options.views > 1 else ''}"
    with stream, Progress(what, total=stream.samples, unit="img") as progress:
        mean = stream.view_mean
        if mean is not None:
            mean = mean.to(next(net.parameters()).device)
        for batch in stream:
            images, crop = batch.images.float(), net.design.image_size
            probabilities = average_views(net, images, options.views, mean, crop)
            counts.add(probabilities, batch.labels, batch.weights)
            if writer is not None:
                writer.add(probabilities, batch.labels, batch.weights)
            progress.advance(int(batch.weights.sum()))
    return counts, time.perf_counter() - start


def _summarize(counts: AnswerCounts, names: tuple[str, ...]) -> dict[str, Any]:
    loss, top1, top5, samples = counts.sums.tolist()
    per_class = zip(names, counts.images.tolist(), counts.right.tolist(), strict=True)
    result: dict[str, Any] = {
        "samples": round(samples),
        "top1_error": top1 / samples,
        "top5_error": top5 / samples,
        "loss": loss / samples,
        "classes": {name: 1 - right / images for name, images, right in per_class if images},
    }
    if counts.confusion is not None:
        result["confusion"] = counts.confusion.tolist()
    return result


def _count_classes(found: Checkpoint, manifest: Manifest, options: EvaluateOptions) -> int:
    trained = found.classes
    if manifest.classes != trained:
        raise UsageError(
            f"data set {options.data} has {len(manifest.classes)} classes, not the {len(trained)} "
            f"of the run in {options.run} or not in that order; name the data set of the training"
        )
    return len(trained)


if __name__ == "__main__":
    run(main)
