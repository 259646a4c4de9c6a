"""Error rates of a trained network on a split, every image once.

    python -m cluster.evaluate RUN [--views 1|10] [--best | --checkpoint STEP|FOLDER] [--json]
    python -m cluster.evaluate RUN --data DATA --submission FILE --class-list KIT

One process with both columns, on the newest complete checkpoint unless another is named. Views as
in the paper (section 4.1): the centre crop, or the mean over four corners, centre and their mirror
images. Writes RUN/evaluation-1.json or RUN/evaluation-10.json, of another split than val
RUN/evaluation-SPLIT-1.json or -10, and, for `cluster.experiments.ensemble`,
RUN/probabilities-1.safetensors or RUN/probabilities-10.safetensors.

A submission is the text file that ILSVRC's server takes (the readme of its development kits): a
line for each image in the order of the file names, with the numbers of the five most probable
classes, the most probable first. It is all that is written for images without labels.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
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
from pipeline.batches import Batch, Stream
from pipeline.dataset.manifest import Manifest, identity
from pipeline.dataset.record import read_segments
from pipeline.dataset.segments import Segments
from pipeline.remote.dataset import choose_versions, locate_dataset
from pipeline.sources.imagenet import parse_image_name, read_class_numbers
from pipeline.sources.paths import base_name
from pipeline.stream.config import Mean, Triple
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write, ensure_writable
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

MOST_CONFUSED = 50
"""Most classes for which the confusion matrix is counted and written: its size is their square."""
BATCH = 64
GUESSES = 5
"""Classes that a submission names for an image."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(EvaluateOptions, argv, "python -m cluster.evaluate")
    options.check()
    for name, path in (("RUN", options.run), ("DATA", options.data)):
        if path:
            refuse_relative(name, path, missing=True)
    read_run_config(options.run / CONFIG)
    ensure_writable(options.run, "run folder")
    if options.submission is not None:
        ensure_writable(options.submission.parent, "folder of the submission")
    result = evaluate(options)
    out = sys.stderr if options.json else sys.stdout
    views = "centre view" if options.views == 1 else "ten views"
    about = (
        f"{options.split}, {result['samples']:,} images, {views}, "
        f"step {result['step']} ({result['chosen']})"
    )
    if "top1_error" in result:
        path = evaluation_path(options)
        with atomic_write(path) as file:
            file.write((json.dumps(result) + "\n").encode())
        out.write(
            f"{about}: top-1 error {result['top1_error']:.2%}, top-5 error "
            f"{result['top5_error']:.2%}, loss {result['loss']:.4f} "
            f"({result['img_s']:,.0f} img/s) -> {path}\n"
        )
    if options.submission is not None:
        out.write(f"{about}: submission -> {options.submission}\n")
    if options.save_probabilities:
        out.write(f"probabilities -> {probability_path(options.run, options.views)}\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def evaluation_path(options: EvaluateOptions) -> Path:
    """Return the file with the errors; those of validation are what reports and tables read."""
    split = "" if options.split == "val" else f"{options.split}-"
    return options.run / f"evaluation-{split}{options.views}.json"


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Return what goes into the file of `evaluation_path`; errors are fractions.

    Of images without labels it has no errors. The submission is written, if there is to be one.

    Raises:
        UsageError: no run, no checkpoint, or a data set or class list that does not fit.
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
    predictions = None
    if options.submission is not None and options.class_list is not None:
        numbers = find_numbers(options.class_list, found.classes)
        predictions = Predictions(numbers, samples)
    data_sha256 = identity(folder)
    mean: Mean | Triple = config.mean
    if data_sha256 not in (trained_on, *(one.version for one in read_segments(options.run))):
        mean = _choose_mean(config, found, options.data)
    _check_size(options, config, manifest)
    device = choose_device(options.device)
    prepare_device(device, cpu_count())
    net = AlexNet(classes=_count_classes(found, manifest, options), design=config.design).to(device)
    load_checkpoint(found.path, net)
    stream = _open_stream(options, config, device, choose_versions(options.run, folder), mean)
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
        counts, seconds = _count(net, stream, options, writer, predictions)
    if predictions is not None and options.submission is not None:
        predictions.save(options.submission)
    return {
        "views": options.views,
        "split": options.split,
        "step": found.mark.step,
        "chosen": _name_choice(options),
        "position": found.mark.position,
        **(_summarize(counts, manifest.classes) if manifest.classes else {"samples": samples}),
        "img_s": round(stream.samples / seconds, 1),
        "seconds": round(seconds, 2),
    }


def _name_choice(options: EvaluateOptions) -> str:
    """Return in a word why the checkpoint is the one: best, named or newest."""
    return "best" if options.best else "newest" if options.checkpoint is None else "named"


def _choose_mean(config: Config, found: Checkpoint, data: str) -> Mean | Triple:
    """Return the mean to subtract from images of another data set than the training's; tell it."""
    mean = find_mean(config, found)
    whose = "its own mean" if isinstance(mean, str) else "the mean of the training"
    text = f"{data} is not the data set of the training; {whose} is subtracted"
    print_warning(Warned(text))
    return mean


def find_mean(config: Config, found: Checkpoint) -> Mean | Triple:
    """Return the mean of the training by channel if the checkpoint has it, else the setting."""
    if config.mean == "channel" and (known := found.table.get("channel_mean")):
        red, green, blue = known
        return red, green, blue
    return config.mean


def _check_size(options: EvaluateOptions, config: Config, manifest: Manifest) -> None:
    """Refuse images of another size than the network's, and ten views that are one."""
    if fit_images(config, manifest.side, options.data).design != config.design:
        raise UsageError(
            f"the network of {options.run} reads images of {config.design.image_size} pixels, "
            f"and {options.data} holds others; name the data set of the training"
        )
    if options.views == 10 and manifest.side == config.design.image_size:
        raise UsageError(f"ten views of {options.data} would all be the same; use --views 1")


def _open_stream(
    options: EvaluateOptions,
    config: Config,
    device: torch.device,
    version: str | Segments,
    mean: Mean | Triple,
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
        mean=mean,
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
    net: AlexNet,
    stream: Stream,
    options: EvaluateOptions,
    writer: ProbabilityWriter | None,
    predictions: Predictions | None,
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
            if stream.classes:
                counts.add(probabilities, batch.labels, batch.weights)
            if predictions is not None:
                predictions.add(batch, probabilities)
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


class Predictions:
    """The most probable classes of every image of a split."""

    def __init__(self, numbers: Tensor, samples: int) -> None:
        """Prepare for so many images, and classes with these numbers, int64 [classes]."""
        self._numbers, self._samples = numbers, samples
        self._names: list[str] = []
        self._first: list[Tensor] = []
        self._sound: list[Tensor] = []
        self._sum = torch.zeros(len(numbers), dtype=torch.float64)

    def add(self, batch: Batch, probabilities: Tensor) -> None:
        """Add a batch with its probabilities, [b, classes]; rows beyond the images are skipped."""
        count = min(len(batch.ids), self._samples - len(self._names))
        answers = probabilities[:count].double().cpu()
        sound = batch.weights[:count].cpu() > 0
        self._names += (batch.keys if batch.names is None else batch.names)[:count]
        self._first.append(self._rank(answers))
        self._sound.append(sound)
        self._sum += answers[sound].sum(0)

    def _rank(self, values: Tensor) -> Tensor:
        """Return the numbers of the classes with the highest values, [..., 5]; ties in order."""
        order = values.sort(dim=-1, descending=True, stable=True).indices
        return self._numbers[order[..., :GUESSES]]

    def save(self, path: Path) -> None:
        """Write a line for each image, in the order of the file names.

        An image that is damaged, or that is missing among numbered ones of ILSVRC's, gets the
        classes that are the most probable on average, so that the lines keep their images.

        Raises:
            UsageError: the file cannot be written.
        """
        sound, rows = torch.cat(self._sound).tolist(), torch.cat(self._first).tolist()
        answers = {
            name: row
            for name, row, is_sound in zip(self._names, rows, sound, strict=True)
            if is_sound
        }
        average, names = self._rank(self._sum).tolist(), list(_complete_names(self._names))
        lines = (" ".join(map(str, answers.get(name, average))) + "\n" for name in names)
        try:
            with atomic_write(path) as file:
                file.writelines(map(str.encode, lines))
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot write {path}: {reason}; name another --submission") from error
        if lacking := [name for name in names if name not in answers]:
            text = (
                f"{len(lacking):,} images are damaged or missing, such as {lacking[0]}; their "
                f"lines in {path} name the classes that are the most probable on average"
            )
            print_warning(Warned(text))


def _complete_names(names: list[str]) -> Iterator[str]:
    """Yield names by their last part; between numbered ones of ILSVRC's also those that lack."""
    numbered = {name: parse_image_name(name) for name in names}
    stems = {one.stem for one in numbered.values() if one is not None}
    if None in numbered.values() or len(stems) != 1:
        yield from sorted(names, key=lambda name: (base_name(name), name))
        return
    by_number = {one.number: name for name, one in numbered.items() if one is not None}
    for number in range(1, max(by_number) + 1):
        yield by_number.get(number, f"{min(stems)}_{number:08d}")


def find_numbers(path: Path, classes: tuple[str, ...]) -> Tensor:
    """Return the number of each class in a class list, int64 [classes].

    Raises:
        UsageError: the list cannot be read, or lacks a class.
    """
    numbers = read_class_numbers(path)
    if lacking := [name for name in classes if name not in numbers]:
        others = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        raise UsageError(
            f"class list {path} lacks {lacking[0]!r}{others} of the run's {len(classes):,} "
            "classes; give the list of the data set of the training"
        )
    return torch.tensor([numbers[name] for name in classes])


def _count_classes(found: Checkpoint, manifest: Manifest, options: EvaluateOptions) -> int:
    trained = found.classes
    if not manifest.classes:
        if options.submission is None:
            raise UsageError(
                f"data set {options.data} has no classes to count errors by; give --submission "
                "FILE --class-list FILE for predictions, or name a set with labels"
            )
        if options.save_probabilities:
            raise UsageError(
                f"data set {options.data} has no classes, which --save-probabilities needs; leave "
                "it out"
            )
        return len(trained)
    if manifest.classes != trained:
        raise UsageError(
            f"data set {options.data} has {len(manifest.classes)} classes, not the {len(trained)} "
            f"of the run in {options.run} or not in that order; name the data set of the training"
        )
    return len(trained)


if __name__ == "__main__":
    run(main)
