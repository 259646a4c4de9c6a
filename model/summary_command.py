"""What `python -m model.summary` prints."""

from __future__ import annotations

import difflib
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from model.architecture import Design
from model.summary import (
    FLOAT32,
    Row,
    Totals,
    footprint,
    original_crossing,
    table,
    totals,
)

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Print the layer table of a network: sizes, parameters, multiply-adds, memory, crossings."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A training config, for example cluster/configs/paper.toml."""
    classes: int = 1000
    """Classes to tell apart."""
    batch_size: int = 128
    """Pictures in a step."""
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
        rows = table(options.classes, design)
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
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config {path} cannot be read ({error.strerror}); see configs/") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from None
    names = [field.name for field in fields(Design)]
    for key in settings:  # other keys are the trainer's; one that is nearly ours is a slip
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
        if near and key not in names:
            raise ValueError(f"config {path}: no setting {key!r}; did you mean {near[0]!r}?")
    try:
        return Design.of(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config {path}: {error}") from None


def as_json(rows: list[Row], design: Design, options: Summary) -> dict[str, Any]:
    """Rows and sums as plain values; bytes as the printed table has them."""
    size = SIZES[options.dtype]
    sums = totals(rows)
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


def show(rows: list[Row], design: Design, options: Summary) -> None:
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
    sums = totals(rows)
    grid.add_row(
        *["sum", "", "", "", "", "", ""],
        f"{sums.parameters:,}",
        f"{sums.multiply_adds:,}",
        "",
        _mib(sums.neurons * batch * size),
        _mib(FLOAT32 * sums.parameters),
        *_sums(rows, batch * size),
    )
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(grid)
    for line in sentences(rows, totals(rows), design, options):
        console.print(line, soft_wrap=True)


def sentences(rows: list[Row], sums: Totals, design: Design, options: Summary) -> list[str]:
    """The sums in words."""
    size, batch = SIZES[options.dtype], options.batch_size
    found = [
        f"{sums.parameters:,} parameters, {sums.multiply_adds:,} multiply-adds an image forward, "
        f"{sums.neurons:,} neurons",
        f"M = X(W+B+A+Z) = {footprint(rows, batch, size) / MIB:,.0f} MiB: {batch} pictures, "
        f"{size} bytes a number, weights, biases, activations and the sums before them",
        f"optimiser: {_mib(FLOAT32 * sums.parameters)} of velocities, as much of gradients",
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


def _sums(rows: list[Row], size: int) -> tuple[str, str]:
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


def _kernel(row: Row) -> str:
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
