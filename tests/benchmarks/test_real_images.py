"""The check on photographs, with drawn images and a network that names the nearest color."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.tools.errors import UsageError
from tests.helpers.training_processes import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

import real_images

COLORS = ((210, 50, 60), (60, 50, 210), (30, 30, 30), (157, 157, 157), (40, 120, 40), (90, 90, 0))
"""Red is blue with the colors in the wrong order; dark is light where no mean is subtracted."""
SYNSETS = tuple(f"n0000000{number}" for number in range(len(COLORS)))


def name_color(images: Tensor) -> Tensor:
    """Logits: the nearer a color to the image's mean, the larger."""
    seen = images.mean((2, 3)) * real_images.DIVISOR + real_images.MEAN
    return -torch.cdist(seen, torch.tensor(COLORS, dtype=torch.float32))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    for color, synset in zip(COLORS, SYNSETS, strict=True):
        (folder / synset).mkdir(parents=True)
        Image.new("RGB", (300, 280), color).save(folder / synset / "x.png")
    return folder


def test_the_stream_is_as_good_as_pillow_and_mistakes_show(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(real_images, "EVERY", 1)
    (tmp_path / "work").mkdir()
    files = real_images.list_files(photographs, SYNSETS)
    data = real_images.pack(files, SYNSETS, tmp_path / "work")
    scores = real_images.measure(name_color, files, data)
    assert scores["Pillow"].top1_error == scores["stream"].top1_error == 0
    assert scores["stream"].agreement == 1
    assert scores["numbering"].top1_error == 1
    assert scores["colors"].top1_error > 0.3
    assert scores["mean"].top1_error > 0.1
    # Drawn images are the same upside down: the one mistake that does not show is told.
    assert real_images.judge(scores) == ["broken geometry adds less than 5% to the top-1 error"]
    bad = replace(scores["stream"], top1_error=0.5, agreement=0.5)
    assert len(real_images.judge(scores | {"stream": bad})) == 3
    third = replace(scores[real_images.THIRD], top1_error=0.9)  # what mistakes are compared with
    assert len(real_images.judge(scores | {real_images.THIRD: third})) == len(real_images.CONTROLS)


def test_folders_that_are_no_synsets_are_refused(photographs, tmp_path):
    with pytest.raises(UsageError, match="n00000005 is no synset of the 1,000"):
        real_images.list_files(photographs, SYNSETS[:5])
    Image.new("RGB", (9, 9)).save(photographs / SYNSETS[0] / "y.png")
    with pytest.raises(UsageError, match="several images of a class"):
        real_images.list_files(photographs, SYNSETS)
    with pytest.raises(UsageError, match="has no folders with images"):
        real_images.list_files(tmp_path / "nowhere", SYNSETS)
