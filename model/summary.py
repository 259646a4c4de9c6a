"""The layer table: sizes, parameters, multiply-adds and memory of a network, from its design.

    python -m model.summary CONFIG [--classes 1000] [--batch-size 128] [--dtype float32] [--json]

CONFIG is a training config (configs/*.toml); what it says of other things than the network is
passed over. Bytes are per step of `--batch-size` pictures, in `--dtype`. What crosses the pair is
said of one direction, a to b; as much goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.architecture import COLUMN_NAMES, IMAGE_SIZE, POOLS, Design, Stage, stages

FLOAT32 = 4


@dataclass(frozen=True)
class Row:
    """One column's part of one layer. Shapes are (maps, height, width), or (units,)."""

    layer: str
    column: str
    """"a" or "b"."""
    reads: str
    """Whose maps its weights read: "picture", "own" column or "both"."""
    input_shape: tuple[int, ...]
    """What the weights read, shrunk, before any padding."""
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
    shrink: int
    """Side of the squares of pixels whose means are read; 1: the pixels themselves."""
    then: tuple[str, ...]
    """What follows the weights, as `model.architecture.Layer` has it."""
    weights: int
    """With the scales of batch normalisation, as the biases with its shifts."""
    biases: int
    multiply_adds: int
    """Per image, forward pass, weights only."""
    receptive_field: int
    """Side in pixels of the part of the picture that a number in `output_shape` depends on."""
    crosses_forward: int
    """Numbers an image that this column sends to the other for this layer to read; for the last
    layer its logits, too, which both columns need."""
    crosses_backward: int
    """Numbers an image that come back to this column: gradients of what it sent."""

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + self.biases

    @property
    def parameter_bytes(self) -> int:
        """In float32."""
        return FLOAT32 * self.parameters

    @property
    def neurons(self) -> int:
        """Outputs per image, before pooling: what the paper counts as neurons."""
        return _count(self.output_shape)

    @property
    def optimiser_bytes(self) -> int:
        """A velocity for each parameter, float32."""
        return FLOAT32 * self.parameters


@dataclass(frozen=True)
class Totals:
    """Sums over rows."""

    parameters: int
    parameter_bytes: int
    multiply_adds: int
    neurons: int
    crosses: int
    """Numbers an image that cross the pair, forward and backward, both directions."""


def table(classes: int = 1000, design: Design | None = None) -> list[Row]:
    """Every layer, column a then column b, from the picture to the logits.

    With an odd number of classes column b's fc8 has the unit that the network cuts off.

    Raises:
        ValueError: as `model.architecture.stages`.
    """
    design = design or Design()
    found = stages(classes, design)
    fields = receptive_fields(found, design)
    rows = []
    for stage, field in zip(found, fields, strict=True):
        last = stage is found[-1]
        for column in COLUMN_NAMES[: design.columns]:
            rows.append(_row(stage, column, field, last and design.columns == 2))
    return rows


def totals(rows: Iterable[Row]) -> Totals:
    """Parameters, their bytes in float32, and per image multiply-adds, neurons, crossings."""
    rows = list(rows)
    return Totals(
        parameters=sum(row.parameters for row in rows),
        parameter_bytes=sum(row.parameter_bytes for row in rows),
        multiply_adds=sum(row.multiply_adds for row in rows),
        neurons=sum(row.neurons for row in rows),
        crosses=sum(row.crosses_forward + row.crosses_backward for row in rows),
    )


def original_crossing(rows: Iterable[Row]) -> int:
    """Numbers an image that would cross with all of the last layer on column a.

    So the original placed it (layers-145.cfg: `fc1000 gpu=0`): b sends what fc8 reads and gets its
    gradient, a sends neither that nor logits. 117,248 numbers are 468,992 bytes in float32.
    """
    rows = list(rows)
    last = rows[-1].layer
    return sum(
        row.crosses_forward + row.crosses_backward for row in rows if row.layer != last
    ) + sum(2 * row.crosses_backward for row in rows if row.layer == last and row.column == "b")


def footprint(rows: Iterable[Row], batch: int, size: int = FLOAT32) -> int:
    """M = X(W + B + A + Z) in bytes: the memory of a network with what a step computes.

    Args:
        rows: of the table.
        batch: pictures; activations A and the weighted sums Z before them count for each.
        size: X, bytes of a number.
    """
    sums = totals(rows)
    return size * (sums.parameters + 2 * sums.neurons * batch)


def receptive_fields(found: Iterable[Stage], design: Design) -> list[int]:
    """For each stage the side, in pixels, of what a number of its output depends on.

    Response normalisation across maps adds none, that over 5x5 pixels does; zeros outside the
    picture count as pixels until the picture is all in. Local contrast normalisation divides by a
    mean over the whole picture at most; here counts what lies around, 9x9 pixels twice. Batch
    normalisation looks at other pictures, too, in training: that does not count.
    """
    window, step = design.pool_window
    wider = {"spatial_norm": 4, "lcn": 2 * 8}
    side, jump, sides = 1, 1, []
    for stage in found:
        layer = stage.layer
        side += (layer.shrink - 1) * jump
        jump *= layer.shrink
        side += (layer.kernel - 1) * jump if layer.kernel else 0
        jump *= layer.stride
        sides.append(side if layer.kernel else IMAGE_SIZE)
        for operation in layer.then:
            side += wider.get(operation, 0) * jump
            if operation in POOLS:
                side += (window - 1) * jump
                jump *= step
    return sides


def _row(stage: Stage, column: str, field: int, logits: bool) -> Row:
    layer = stage.layer
    weights = stage.inputs * stage.outputs * max(1, layer.kernel) ** 2
    scales = stage.outputs if "batch_norm" in layer.then else 0
    sent = _count(_shape(layer.kernel, stage.inputs, stage.input_size)) // 2
    sent = sent if layer.reads == "both" else 0
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
        edge_pad=layer.edge,
        shrink=layer.shrink,
        then=layer.then,
        weights=weights + scales,
        biases=stage.outputs + scales,
        multiply_adds=weights * stage.output_size**2,
        receptive_field=field,
        crosses_forward=sent + (stage.outputs if logits else 0),
        crosses_backward=sent,
    )


def _shape(kernel: int, maps: int, size: int) -> tuple[int, ...]:
    return (maps, size, size) if kernel else (maps,)


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


if __name__ == "__main__":
    from model.summary_command import main

    main()
