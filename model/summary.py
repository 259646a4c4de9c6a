"""Sizes, parameters and multiply-adds of every layer, from the table the network is built from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.alexnet import COLUMN_NAMES, EDGE_PAD, Stage, stages


@dataclass(frozen=True)
class Row:
    """One column's part of one layer. Shapes are (maps, height, width), or (units,)."""

    layer: str
    column: str
    """"a" or "b"."""
    reads: str
    """Whose maps its weights read: "picture", "own" column or "both"."""
    input_shape: tuple[int, ...]
    """What the weights read, before any padding."""
    output_shape: tuple[int, ...]
    """What the weights give, before pooling."""
    final_shape: tuple[int, ...]
    """What the next layer gets of it."""
    kernel: int
    """Side of the filters in pixels; 0 for fully connected layers, as stride and pad."""
    stride: int
    pad: int
    edge_pad: int
    """Rows and columns of zeros added on the right and at the bottom only (conv1)."""
    then: tuple[str, ...]
    """What follows the weights: relu, norm, pool, dropout."""
    weights: int
    biases: int
    multiply_adds: int
    """Per image, forward pass, weights only."""

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + self.biases

    @property
    def parameter_bytes(self) -> int:
        """In float32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Totals:
    """Sums over rows."""

    parameters: int
    parameter_bytes: int
    multiply_adds: int


def table(classes: int = 1000, width: float = 1.0) -> list[Row]:
    """Every layer, column a then column b, from the picture to the logits.

    With an odd number of classes column b's fc8 has the unit that the network cuts off.

    Raises:
        ValueError: as `model.alexnet.stages`.
    """
    return [_row(stage, column) for stage in stages(classes, width) for column in COLUMN_NAMES]


def totals(rows: Iterable[Row]) -> Totals:
    """Parameters, their bytes in float32 and multiply-adds per image of the rows together."""
    rows = list(rows)
    return Totals(
        parameters=sum(row.parameters for row in rows),
        parameter_bytes=sum(row.parameter_bytes for row in rows),
        multiply_adds=sum(row.multiply_adds for row in rows),
    )


def _row(stage: Stage, column: str) -> Row:
    layer = stage.layer
    weights = stage.inputs * stage.outputs * max(1, layer.kernel) ** 2
    return Row(
        layer=layer.name,
        column=column,
        reads=layer.reads,
        input_shape=_shape(layer.kernel, stage.inputs, stage.input_size),
        output_shape=_shape(layer.kernel, stage.outputs, stage.output_size),
        final_shape=_shape(layer.kernel, stage.outputs, stage.final_size),
        kernel=layer.kernel,
        stride=layer.stride if layer.kernel else 0,
        pad=layer.pad,
        edge_pad=EDGE_PAD if layer.reads == "picture" else 0,
        then=layer.then,
        weights=weights,
        biases=stage.outputs,
        multiply_adds=weights * stage.output_size**2,
    )


def _shape(kernel: int, maps: int, size: int) -> tuple[int, ...]:
    return (maps, size, size) if kernel else (maps,)
