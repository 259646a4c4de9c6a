"""Figure 3: the sheets with their bars, what was learned, the strip, and what may be missing."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cluster.checkpoint.format import Checkpoint
from cluster.report.images import KERNEL_SCALE, MissingFigure
from cluster.report.kernels import (
    BAR,
    COLOUR_BAR,
    ORIENTATION_BAR,
    describe_first_layer,
    draw_scored_sheet,
    pick_snapshots,
    score_kernels,
)
from cluster.run.folder import Mark
from cluster.run.kernels import KernelSnapshot

RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=(12, 3, 11, 11)).astype(np.float32) for name in "ab"}
RAMP = np.linspace(-1, 1, 11, dtype=np.float32)
LEARNED = {
    "a": np.broadcast_to(RAMP, (12, 3, 11, 11)),  # grey, all along one direction
    "b": np.broadcast_to(RAMP * np.array([1, -1, 0], np.float32)[:, None, None], (12, 3, 11, 11)),
}
END = {name: START[name] + 0.3 * LEARNED[name] for name in "ab"}


def checkpoint(folder: Path, kernels: dict[str, np.ndarray], step: int = 500) -> Checkpoint:
    for name, weights in kernels.items():
        file = folder / f"column-{name}.safetensors"
        save_file({f"weights/{name}.conv1.weight": np.ascontiguousarray(weights)}, file)
    return Checkpoint(path=folder, mark=Mark(step=step, position=128 * step), classes=("x",))


def image(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_what_was_learned_is_told_apart_though_noise_hides_it(tmp_path):
    layer = describe_first_layer(checkpoint(tmp_path, END), [KernelSnapshot(1, START)])
    a, b = layer.changes
    assert (round(a.colour, 3), round(b.colour, 3)) == (0, 1)
    assert min(a.orientation, b.orientation) > 0.99
    assert layer.change_colour is not None
    assert (layer.change_colour.apart, layer.change_colour.ahead) == (1, "b")
    assert layer.change_colour.is_significant
    lengths = [np.linalg.norm(0.3 * LEARNED[name][0]) / np.linalg.norm(kernel)
               for name in "ab" for kernel in END[name]]  # fmt: skip
    assert layer.change_length == pytest.approx(np.median(lengths), rel=1e-4)
    assert layer.colour is not None
    assert layer.colour.apart < 1


def test_bars_are_as_long_as_the_scores_say():
    rated = score_kernels(END["a"])
    sheet = draw_scored_sheet(END["a"], rated)
    side = 11 * KERNEL_SCALE
    pitch = side + KERNEL_SCALE
    for place in range(4):
        for paint, value, row in (
            (COLOUR_BAR, rated.colour[place], side + 1),
            (ORIENTATION_BAR, rated.orientation[place], side + BAR + 2),
        ):
            line = sheet[row, place * pitch : place * pitch + side]
            assert (line == paint).all(axis=1).sum() == round(value * side)


def test_strip_goes_through_the_moments_with_the_most_colourful_kernel_first(tmp_path):
    moments = [KernelSnapshot(1, START), KernelSnapshot(2, START)]
    layer = describe_first_layer(checkpoint(tmp_path, END), moments)
    assert [strip.steps for strip in layer.strips] == [("1", "2", "500")] * 2
    sheet = image(layer.strips[1].uri)[::KERNEL_SCALE, ::KERNEL_SCALE]
    assert sheet.shape[:2] == (8 * 12 - 1, 3 * 12 - 1)
    top = int(np.argmax(score_kernels(END["b"]).colour))
    for place, weights in enumerate((START["b"], START["b"], END["b"])):
        shown = sheet[:11, 12 * place : 12 * place + 11, :3].transpose(2, 0, 1)
        expected = 127.5 * (1 + weights[top] / np.abs(weights[top]).max())
        np.testing.assert_allclose(shown, expected, atol=0.51)


def test_at_most_twelve_moments_with_the_first_and_the_last():
    moments = [KernelSnapshot(2**power, START) for power in range(20)]
    steps = [one.step for one in pick_snapshots(moments)]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (1, 2**19)
    assert steps == sorted(set(steps))


def test_moments_after_the_checkpoint_or_of_another_network_do_not_count(tmp_path):
    other = {name: weights[:4] for name, weights in START.items()}
    moments = [KernelSnapshot(1, other), KernelSnapshot(512, START)]
    layer = describe_first_layer(checkpoint(tmp_path, END), moments)
    assert (layer.strips, layer.charts, layer.changes) == ((), (), ())
    assert layer.colour is not None


def test_a_network_of_one_column_is_not_compared(tmp_path):
    layer = describe_first_layer(
        checkpoint(tmp_path, {"a": END["a"]}), [KernelSnapshot(1, {"a": START["a"]})]
    )
    assert [column.name for column in layer.columns] == ["a"]
    assert (layer.colour, layer.orientation, layer.change_colour) == (None, None, None)
    assert len(layer.charts) == 2


def test_a_checkpoint_without_conv1_is_told(tmp_path):
    save_file({"weights/a.fc8.bias": np.zeros(1)}, tmp_path / "column-a.safetensors")
    with pytest.raises(MissingFigure, match="No kernels"):
        describe_first_layer(
            Checkpoint(path=tmp_path, mark=Mark(step=1, position=1), classes=("x",))
        )
