"""Command: the layer table with sizes, parameters, multiply-adds and memory of a network.

    python -m model.summary CONFIG [--classes 1000] [--batch-size 128] [--dtype float32] [--json]

CONFIG is a training config, or a preset (cluster/config/presets); its settings of other things than
the network are ignored. Bytes are per step of `--batch-size` images, in `--dtype`. Exchanged bytes
are those of one direction, a to b; as many go the other way.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from model.architecture import COLUMN_NAMES, Design, Stage, build_stages
from model.layer_table import POOLS

FLOAT32_BYTES = 4
CLASSES = 1000
"""Classes of ImageNet, where none are named."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
MIB = 2**20
TRAINER_KEYS = ("cache_size", "init_layers", "lars", "layer_rates")
"""Settings of the trainer whose names are near to one of the network's."""
PRESETS = Path(__file__).resolve().parents[1] / "cluster" / "config" / "presets"


@dataclass(frozen=True)
class ColumnRow:
    """One column of one layer. Shapes are (maps, height, width), or (units,)."""

    layer: str
    column: str
    """"a" or "b"."""
    reads: str
    """Input of its weights: the "picture", maps of its "own" column, or of "both"."""
    input: str
    """Name of the layer that it reads; "": the one before."""
    adds: tuple[str, ...]
    """Names of the layers whose outputs are added to its sums."""
    input_shape: tuple[int, ...]
    """Input of the weights, after shrinking, before padding."""
    output_shape: tuple[int, ...]
    """Output of the weights, before pooling."""
    final_shape: tuple[int, ...]
    """Output of the layer, after pooling."""
    kernel: int
    """Side of the filters in pixels; 0 for fully connected layers, as are stride and pad."""
    stride: int
    pad: int
    edge_pad: int
    """Rows and columns of zeros added on the right and at the bottom only (conv1)."""
    shrink: int
    """Side of the squares of pixels whose means are read; 1: the pixels themselves."""
    then: tuple[str, ...]
    """Operations after the weights, as in `model.architecture.Layer`."""
    weights: int
    """Number of weights, including the scales of batch normalization."""
    biases: int
    """Number of biases, including the shifts of batch normalization."""
    multiply_adds: int
    """Multiply-adds per image of the weights in the forward pass."""
    receptive_field: int
    """Side in pixels of the part of the image that a number in `output_shape` depends on."""
    crosses_forward: int
    """Numbers per image that this column sends to the other as input of this layer; for the last
    layer also its logits, which both columns need."""
    crosses_backward: int
    """Numbers per image that this column receives: gradients of what it sent."""

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.weights + self.biases

    @property
    def neurons(self) -> int:
        """Outputs per image, before pooling: what the paper counts as neurons."""
        return math.prod(self.output_shape)


@dataclass(frozen=True)
class Totals:
    """Sums over rows; see `ColumnRow`."""

    parameters: int
    parameter_bytes: int
    """Bytes of the parameters in float32."""
    multiply_adds: int
    neurons: int
    crosses: int
    """Numbers per image that the pair exchanges, forward and backward, in both directions."""


def build_table(classes: int = CLASSES, design: Design | None = None) -> list[ColumnRow]:
    """A row for each layer and column, column a first, from the image to the logits.

    With an odd number of classes column b's last layer has the unit that the network leaves out.

    Raises:
        ValueError: as `model.architecture.build_stages`.
    """
    design = design or Design()
    stages = build_stages(classes, design)
    fields = compute_receptive_fields(stages, design)
    return [
        _make_row(stage, column, field, stage is stages[-1] and design.columns == 2)
        for stage, field in zip(stages, fields, strict=True)
        for column in COLUMN_NAMES[: design.columns]
    ]


def sum_rows(rows: Iterable[ColumnRow]) -> Totals:
    """Sums over some rows of the table."""
    rows = list(rows)
    parameters = sum(row.parameters for row in rows)
    return Totals(
        parameters=parameters,
        parameter_bytes=FLOAT32_BYTES * parameters,
        multiply_adds=sum(row.multiply_adds for row in rows),
        neurons=sum(row.neurons for row in rows),
        crosses=sum(row.crosses_forward + row.crosses_backward for row in rows),
    )


def count_original_crossing(rows: Iterable[ColumnRow]) -> int:
    """Numbers per image that the pair would exchange with all of the last layer on column a.

    The original placed it there (layers-145.cfg: `fc1000 gpu=0`): b sends the input of fc8 and gets
    its gradient, a sends neither that nor logits. 117,248 numbers are 468,992 bytes in float32.
    """
    *before, _, b = rows
    return sum_rows(before).crosses + 2 * b.crosses_backward


def compute_footprint(rows: Iterable[ColumnRow], batch: int, size: int = FLOAT32_BYTES) -> int:
    """M = X(W + B + A + Z) in bytes: the memory of a network and of its activations in a step.

    Args:
        rows: of the table.
        batch: number of images; activations A and the weighted sums Z before them count for each.
        size: X, bytes of a number.
    """
    sums = sum_rows(rows)
    return size * (sums.parameters + 2 * sums.neurons * batch)


def compute_receptive_fields(stages: Iterable[Stage], design: Design) -> list[int]:
    """Sides in pixels, one a stage, of the square that a number of its output depends on.

    Normalization across maps adds nothing, that over 5x5 pixels does; zeros outside the image count
    as pixels until the square covers the image. Local contrast normalization may divide by a mean
    over the whole image; only its neighborhood counts, 9x9 pixels twice. Batch normalization reads
    other images, too, in training: they do not count.
    """
    widening = {"spatial_norm": 4, "lcn": 2 * 8}
    sides: list[int] = []
    reached = {-1: (1, 1)}  # side and pixels between neighbors behind each stage
    for index, stage in enumerate(stages):
        layer, (window, step) = stage.layer, stage.window
        side, jump = reached[stage.source]
        side += (layer.shrink - 1) * jump
        jump *= layer.shrink
        side += (layer.kernel - 1) * jump if layer.kernel else 0
        side = max([side, *(reached[other][0] for other in stage.added)])
        jump *= layer.stride
        sides.append(side if layer.kernel else design.image_size)
        for operation in layer.then:
            side += widening.get(operation, 0) * jump
            if operation in POOLS:
                side += (window - 1) * jump
                jump *= step
        reached[index] = side, jump
    return sides


def _make_row(stage: Stage, column: str, field: int, has_logits: bool) -> ColumnRow:
    layer = stage.layer

    def shape(maps: int, side: int) -> tuple[int, ...]:
        return (maps, side, side) if layer.kernel else (maps,)

    places = stage.output_size**2 if layer.kind == "local" else 1
    weights = stage.inputs * stage.outputs * max(1, layer.kernel) ** 2 * places
    scales = stage.outputs if "batch_norm" in layer.then else 0
    input_shape = shape(stage.inputs, stage.input_size)
    sent = math.prod(input_shape) // 2 if layer.reads == "both" else 0
    return ColumnRow(
        layer=layer.name,
        column=column,
        reads=layer.reads,
        input=layer.input,
        adds=layer.adds,
        input_shape=input_shape,
        output_shape=shape(stage.outputs, stage.output_size),
        final_shape=shape(stage.outputs, stage.final_size),
        kernel=layer.kernel,
        stride=layer.stride if layer.kernel else 0,
        pad=layer.pad,
        edge_pad=layer.edge,
        shrink=layer.shrink,
        then=layer.then,
        weights=weights + scales,
        biases=stage.outputs * places + scales,
        multiply_adds=weights * stage.output_size**2 // places,
        receptive_field=field,
        crosses_forward=sent + (stage.outputs if has_logits else 0),
        crosses_backward=sent,
    )


@dataclass(frozen=True, kw_only=True)
class SummaryOptions:
    """Print the layer table of a network: sizes, parameters, multiply-adds, memory, exchange."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A training config, or the name of a preset, for example paper."""
    classes: int = CLASSES
    """Number of classes."""
    batch_size: int = 128
    """Images in a step."""
    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "float32"
    """Type of activations and of exchanged numbers; parameters and velocities are float32. Nothing
    here computes in float8: its column says what it would save."""
    json: bool = False
    """Print one JSON object instead."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; wrong input ends it with exit code 2 and one line."""
    show_summary(tyro.cli(SummaryOptions, args=argv, prog="python -m model.summary"))


def show_summary(options: SummaryOptions) -> None:
    """Print the table; wrong input ends the process with exit code 2 and one line."""
    try:
        if options.batch_size < 1:
            raise ValueError(f"--batch-size is {options.batch_size}; it takes 1 or more")
        design = read_design(options.config)
        rows = build_table(options.classes, design)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    with _check_output():
        if options.json:
            sys.stdout.write(json.dumps(to_json(rows, design, options)) + "\n")
        else:
            print_table(rows, design, options)


@contextmanager
def _check_output() -> Iterator[None]:
    """End the command with one line where standard output is closed or full, in any encoding."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # Python flushes once more on exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(141) from None
        sys.stderr.write(f"error: standard output cannot be written ({error.strerror})\n")
        raise SystemExit(1) from None


def read_design(path: Path) -> Design:
    """Read the design of a network from a config file.

    Raises:
        ValueError: the file cannot be read, or holds no valid design; one line that names it.
    """
    preset = PRESETS / f"{path.name.removesuffix('.toml')}.toml"
    is_name = str(path.parent) in (".", "configs", "cluster/configs", "cluster/config/presets")
    if is_name and not path.is_file() and preset.is_file():
        path = preset
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = [one.stem for one in sorted(PRESETS.glob("*.toml"))]
        near = difflib.get_close_matches(path.stem, names, n=3) or names
        raise ValueError(
            f"config {path} cannot be read ({error.strerror}); presets are {', '.join(near)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from None
    names = [field.name for field in fields(Design)]
    for key in settings:  # other keys are the trainer's; one that is nearly ours is a typo
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
        if near and key not in names and key not in TRAINER_KEYS:
            raise ValueError(f"config {path}: no setting {key!r}; did you mean {near[0]!r}?")
    try:
        return Design.from_settings(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config {path}: {error}") from None


def to_json(rows: list[ColumnRow], design: Design, options: SummaryOptions) -> dict[str, Any]:
    """Rows and sums as plain values; bytes as in the printed table."""
    size = DTYPE_BYTES[options.dtype]
    sums = sum_rows(rows)
    return {
        "design": design.to_settings(),
        "classes": options.classes,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "rows": [
            asdict(row)
            | {"parameters": row.parameters, "neurons": row.neurons}
            | _count_bytes([row], [row], options.batch_size * size)
            for row in rows
        ],
        "totals": asdict(sums),
        "crossing_bytes_an_image": sums.crosses * size,
        "original_crossing_bytes_an_image": count_original_crossing(rows) * size,
        "footprint_bytes": compute_footprint(rows, options.batch_size, size),
    }


def print_table(rows: list[ColumnRow], design: Design, options: SummaryOptions) -> None:
    """Print the table and its sums."""
    from rich.console import Console  # here: they take longer than all the rest of --help
    from rich.table import Table

    size = options.batch_size * DTYPE_BYTES[options.dtype]
    grid = Table(
        title=_format_title(design, options), title_justify="left", pad_edge=False, box=None
    )
    for name in ("layer", "column", "reads", "input"):
        grid.add_column(name, no_wrap=True)
    for name in (
        "k/s/p", "output", "passes on", "parameters", "multiply-adds", "field",
        "activations", "optimizer", "forward ⇄", "backward ⇄",
    ):  # fmt: skip
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(
            row.layer,
            row.column,
            _format_reads(row),
            _format_shape(row.input_shape),
            _format_kernel(row),
            _format_shape(row.output_shape),
            _format_shape(row.final_shape),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
            f"{row.receptive_field}",
            *map(_format_mib, _count_bytes([row], [row], size).values()),
            end_section=row is rows[-1],
        )
    sums = sum_rows(rows)
    numbers = f"{sums.parameters:,}", f"{sums.multiply_adds:,}"
    sizes = _count_bytes(rows, [row for row in rows if row.column == "a"], size).values()
    grid.add_row("sum", *[""] * 6, *numbers, "", *map(_format_mib, sizes))
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(grid)
    for line in describe_totals(rows, design, options):
        console.print(line, soft_wrap=True)


def describe_totals(rows: list[ColumnRow], design: Design, options: SummaryOptions) -> list[str]:
    """The sums in sentences."""
    size, batch, sums = DTYPE_BYTES[options.dtype], options.batch_size, sum_rows(rows)
    lines = [
        f"{sums.parameters:,} parameters, {sums.multiply_adds:,} multiply-adds an image forward, "
        f"{sums.neurons:,} neurons",
        f"M = X(W+B+A+Z) = {compute_footprint(rows, batch, size) / MIB:,.0f} MiB: {batch} images, "
        f"{size} {'byte' if size == 1 else 'bytes'} a number, weights, biases, activations and the "
        "sums before them",
        f"optimizer: {_format_mib(sums.parameter_bytes)} of velocities, as much of gradients",
    ]
    if design.columns == 2:
        before, last = rows[-3].layer, rows[-1].layer
        ours, theirs = sums.crosses * size, count_original_crossing(rows) * size
        lines.append(
            f"the pair exchanges {ours:,} bytes an image, both ways, forward and backward "
            f"({_format_mib(ours * batch)} a step)"
        )
        lines.append(
            f"with all of {last} on column a, as in 2012, it would be {theirs:,}: here {last} is "
            f"split as every layer is, so a sends its {before}, too, and both swap their halves of "
            "the logits"
        )
    return lines


def _count_bytes(rows: list[ColumnRow], sent: list[ColumnRow], size: int) -> dict[str, int]:
    """Bytes of the activations and velocities of `rows`, and of what the rows `sent` exchange."""
    return {
        "activation_bytes": sum(row.neurons for row in rows) * size,
        "optimiser_bytes": sum(row.parameters for row in rows) * FLOAT32_BYTES,
        "forward_bytes": sum(row.crosses_forward for row in sent) * size,
        "backward_bytes": sum(row.crosses_backward for row in sent) * size,
    }


def _format_title(design: Design, options: SummaryOptions) -> str:
    plain = Design(width=design.width)
    settings = [f"width {design.width:g}"] + [
        f"{name} {f'of {len(value)} rows' if name == 'layers' else value}"
        for name, value in vars(design).items()
        if value != getattr(plain, name)
    ]
    # A config does not say how many; its data set does.
    count = f"{options.classes:,} classes{' (--classes)' if options.classes == CLASSES else ''}"
    form = f"batch {options.batch_size}, {options.dtype}"
    return f"{', '.join([*settings, count])}; {form}; bytes are a step's"


def _format_kernel(row: ColumnRow) -> str:
    if not row.kernel:
        return ""
    pad = f"{row.pad}+{row.edge_pad}" if row.edge_pad else f"{row.pad}"
    return f"{row.kernel}/{row.stride}/{pad}"


def _format_reads(row: ColumnRow) -> str:
    reads = row.reads if row.shrink == 1 else f"{row.reads}/{row.shrink}"
    return " ".join([reads, *([row.input] if row.input else []), *(f"+{one}" for one in row.adds)])


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _format_mib(size: float) -> str:
    return f"{size / MIB:,.2f} MiB" if size else ""


if __name__ == "__main__":
    main()
