"""The layer table: sizes, parameters, multiply-adds and memory of a network, from its design.

    python -m model.summary CONFIG [--classes 1000] [--batch-size 128] [--dtype float32] [--json]

CONFIG is a training config (cluster/configs); what it says of other things than the network is
passed over. Bytes are per step of `--batch-size` images, in `--dtype`. What crosses the pair is
said of one direction, a to b; as much goes the other way.

What `python -m model.summary` prints.
"""

from __future__ import annotations

import difflib
import json
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from model.architecture import COLUMN_NAMES, IMAGE_SIZE, POOLS, Design, Stage, build_stages

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ColumnRow:
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
    """Side in pixels of the part of the image that a number in `output_shape` depends on."""
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
        return FLOAT32_BYTES * self.parameters

    @property
    def neurons(self) -> int:
        """Outputs per image, before pooling: what the paper counts as neurons."""
        return _count(self.output_shape)

    @property
    def optimiser_bytes(self) -> int:
        """A velocity for each parameter, float32."""
        return FLOAT32_BYTES * self.parameters


@dataclass(frozen=True)
class Totals:
    """Sums over rows."""

    parameters: int
    parameter_bytes: int
    multiply_adds: int
    neurons: int
    crosses: int
    """Numbers an image that cross the pair, forward and backward, both directions."""


def build_table(classes: int = 1000, design: Design | None = None) -> list[ColumnRow]:
    """Every layer, column a then column b, from the image to the logits.

    With an odd number of classes column b's fc8 has the unit that the network cuts off.

    Raises:
        ValueError: as `model.architecture.build_stages`.
    """
    design = design or Design()
    found = build_stages(classes, design)
    fields = receptive_fields(found, design)
    rows = []
    for stage, field in zip(found, fields, strict=True):
        last = stage is found[-1]
        for column in COLUMN_NAMES[: design.columns]:
            rows.append(_row(stage, column, field, last and design.columns == 2))
    return rows


def sum_rows(rows: Iterable[ColumnRow]) -> Totals:
    """Parameters, their bytes in float32, and per image multiply-adds, neurons, crossings."""
    rows = list(rows)
    return Totals(
        parameters=sum(row.parameters for row in rows),
        parameter_bytes=sum(row.parameter_bytes for row in rows),
        multiply_adds=sum(row.multiply_adds for row in rows),
        neurons=sum(row.neurons for row in rows),
        crosses=sum(row.crosses_forward + row.crosses_backward for row in rows),
    )


def original_crossing(rows: Iterable[ColumnRow]) -> int:
    """Numbers an image that would cross with all of the last layer on column a.

    So the original placed it (layers-145.cfg: `fc1000 gpu=0`): b sends what fc8 reads and gets its
    gradient, a sends neither that nor logits. 117,248 numbers are 468,992 bytes in float32.
    """
    rows = list(rows)
    last = rows[-1].layer
    return sum(
        row.crosses_forward + row.crosses_backward for row in rows if row.layer != last
    ) + sum(2 * row.crosses_backward for row in rows if row.layer == last and row.column == "b")


def footprint(rows: Iterable[ColumnRow], batch: int, size: int = FLOAT32_BYTES) -> int:
    """M = X(W + B + A + Z) in bytes: the memory of a network with what a step computes.

    Args:
        rows: of the table.
        batch: images; activations A and the weighted sums Z before them count for each.
        size: X, bytes of a number.
    """
    sums = sum_rows(rows)
    return size * (sums.parameters + 2 * sums.neurons * batch)


def receptive_fields(found: Iterable[Stage], design: Design) -> list[int]:
    """For each stage the side, in pixels, of what a number of its output depends on.

    Response normalisation across maps adds none, that over 5x5 pixels does; zeros outside the
    image count as pixels until the image is all in. Local contrast normalisation divides by a
    mean over the whole image at most; here counts what lies around, 9x9 pixels twice. Batch
    normalisation looks at other images, too, in training: that does not count.
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


def _row(stage: Stage, column: str, field: int, logits: bool) -> ColumnRow:
    layer = stage.layer
    weights = stage.inputs * stage.outputs * max(1, layer.kernel) ** 2
    scales = stage.outputs if "batch_norm" in layer.then else 0
    sent = _count(_shape(layer.kernel, stage.inputs, stage.input_size)) // 2
    sent = sent if layer.reads == "both" else 0
    return ColumnRow(
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


SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 2**20
PRESETS = Path(__file__).resolve().parents[1] / "cluster" / "configs"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Print the layer table of a network: sizes, parameters, multiply-adds, memory, crossings."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A training config, or the name of a preset, for example paper."""
    classes: int = 1000
    """Classes to tell apart."""
    batch_size: int = 128
    """Images in a step."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of activations and of what crosses; parameters and velocities are float32."""
    json: bool = False
    """Print one JSON object instead."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; wrong input leaves with exit code 2 and one line."""
    options = tyro.cli(Summary, args=argv, prog="python -m model.summary")
    try:
        if options.batch_size < 1:
            raise ValueError(f"--batch-size is {options.batch_size}; it takes 1 or more")
        design = read_design(options.config)
        rows = build_table(options.classes, design)
    except ValueError as error:
        _leave(str(error))
    if options.json:
        sys.stdout.write(json.dumps(as_json(rows, design, options)) + "\n")
    else:
        show(rows, design, options)


def read_design(path: Path) -> Design:
    """The network that a config file describes.

    Raises:
        ValueError: the file cannot be read, or describes no network; one line that names it.
    """
    preset = PRESETS / f"{path.stem}.toml"
    if not path.is_file() and preset.is_file():
        path = preset
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = [one.stem for one in sorted(PRESETS.glob("*.toml"))]
        near = difflib.get_close_matches(path.stem, names, n=3) or names
        raise ValueError(
            f"config {path} cannot be read ({error.strerror}); presets are {', '.join(near)}"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from None
    names = [field.name for field in fields(Design)]
    for key in settings:  # other keys are the trainer's; one that is nearly ours is a slip
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
        if near and key not in names:
            raise ValueError(f"config {path}: no setting {key!r}; did you mean {near[0]!r}?")
    try:
        return Design.from_settings(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config {path}: {error}") from None


def as_json(rows: list[ColumnRow], design: Design, options: Summary) -> dict[str, Any]:
    """Rows and sums as plain values; bytes as the printed table has them."""
    size = SIZES[options.dtype]
    sums = sum_rows(rows)
    return {
        "design": asdict(design),
        "classes": options.classes,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "rows": [
            asdict(row)
            | {
                "parameters": row.parameters,
                "neurons": row.neurons,
                "activation_bytes": row.neurons * options.batch_size * size,
                "optimiser_bytes": row.optimiser_bytes,
                "forward_bytes": row.crosses_forward * options.batch_size * size,
                "backward_bytes": row.crosses_backward * options.batch_size * size,
            }
            for row in rows
        ],
        "totals": asdict(sums),
        "crossing_bytes_an_image": sums.crosses * size,
        "original_crossing_bytes_an_image": original_crossing(rows) * size,
        "footprint_bytes": footprint(rows, options.batch_size, size),
    }


def show(rows: list[ColumnRow], design: Design, options: Summary) -> None:
    """Print the table and what it adds up to."""
    size, batch = SIZES[options.dtype], options.batch_size
    grid = Table(title=_title(design, options), title_justify="left", pad_edge=False, box=None)
    for name in ("layer", "column", "reads", "input"):
        grid.add_column(name, no_wrap=True)
    for name in (
        "k/s/p", "output", "passes on", "parameters", "multiply-adds", "field",
        "activations", "optimiser", "forward ⇄", "backward ⇄",
    ):  # fmt: skip
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(
            row.layer,
            row.column,
            row.reads if row.shrink == 1 else f"{row.reads}/{row.shrink}",
            _by(row.input_shape),
            _kernel(row),
            _by(row.output_shape),
            _by(row.final_shape),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
            f"{row.receptive_field}",
            _mib(row.neurons * batch * size),
            _mib(row.optimiser_bytes),
            _mib(row.crosses_forward * batch * size) if row.crosses_forward else "",
            _mib(row.crosses_backward * batch * size) if row.crosses_backward else "",
            end_section=row is rows[-1],
        )
    sums = sum_rows(rows)
    grid.add_row(
        *["sum", "", "", "", "", "", ""],
        f"{sums.parameters:,}",
        f"{sums.multiply_adds:,}",
        "",
        _mib(sums.neurons * batch * size),
        _mib(FLOAT32_BYTES * sums.parameters),
        *_sums(rows, batch * size),
    )
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(grid)
    for line in sentences(rows, sum_rows(rows), design, options):
        console.print(line, soft_wrap=True)


def sentences(rows: list[ColumnRow], sums: Totals, design: Design, options: Summary) -> list[str]:
    """The sums in words."""
    size, batch = SIZES[options.dtype], options.batch_size
    found = [
        f"{sums.parameters:,} parameters, {sums.multiply_adds:,} multiply-adds an image forward, "
        f"{sums.neurons:,} neurons",
        f"M = X(W+B+A+Z) = {footprint(rows, batch, size) / MIB:,.0f} MiB: {batch} images, "
        f"{size} bytes a number, weights, biases, activations and the sums before them",
        f"optimiser: {_mib(FLOAT32_BYTES * sums.parameters)} of velocities, as much of gradients",
    ]
    if design.columns == 2:
        before, last = rows[-3].layer, rows[-1].layer
        ours, theirs = sums.crosses * size, original_crossing(rows) * size
        found.append(
            f"the pair exchanges {ours:,} bytes an image, both ways, forward and backward "
            f"({_mib(ours * batch)} a step)"
        )
        found.append(
            f"with all of {last} on column a, as in 2012, it would be {theirs:,}: here {last} is "
            f"cut as every layer is, so a sends its {before}, too, and both swap their halves of "
            "the logits"
        )
    return found


def _sums(rows: list[ColumnRow], size: int) -> tuple[str, str]:
    """What crosses for one direction, forward and backward."""
    a = [row for row in rows if row.column == "a"]
    forward, backward = sum(r.crosses_forward for r in a), sum(r.crosses_backward for r in a)
    return (_mib(forward * size), _mib(backward * size)) if forward else ("", "")


def _title(design: Design, options: Summary) -> str:
    plain = Design(width=design.width)
    told = [f"width {design.width:g}"] + [
        f"{name} {value}" for name, value in asdict(design).items() if value != getattr(plain, name)
    ]
    return f"{', '.join(told)}; batch {options.batch_size}, {options.dtype}; bytes are a step's"


def _kernel(row: ColumnRow) -> str:
    if not row.kernel:
        return ""
    pad = f"{row.pad}+{row.edge_pad}" if row.edge_pad else f"{row.pad}"
    return f"{row.kernel}/{row.stride}/{pad}"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _mib(size: float) -> str:
    return f"{size / MIB:,.2f} MiB"


def _leave(text: str) -> NoReturn:
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
