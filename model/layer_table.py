"""The table of layers: a row's fields, the tables that Duet has, and those that a file gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args, get_type_hints

Net = Literal["paper", "four", "local11", "local13"]
Kind = Literal["conv", "local", "fc"]
Reads = Literal["own", "both", "picture"]

ACTIVATIONS = ("relu", "tanh", "sigmoid")
POOLS = ("pool", "mean_pool")
MAP_OPERATIONS = ("norm", "scale", "spatial_norm", "lcn", "batch_norm", *POOLS)
OPERATIONS = (*ACTIVATIONS, *MAP_OPERATIONS, "dropout")
"""Operations that may follow a layer's weights."""
MOST_LAYERS = 100
LARGEST_NUMBER = 100_000
"""Largest number in a row of a file."""
NAME = re.compile("[a-z]+_?[0-9]+[a-z]?")
"""Names that a file may give to its layers; modules of torch have none such but `RESERVED`."""
RESERVED = ("bfloat16",)
_WINDOW = re.compile("([1-9][0-9]?)/([1-9][0-9]?)")
_TAKES: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    int | None: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    tuple[str, ...]: ((list, tuple), "a list of texts"),
}


@dataclass(frozen=True)
class Layer:
    """A row of the table of layers; counts are for ONE column, at width 1."""

    name: str
    maps: int | None
    """Output maps or units; None: the classes of a column (with two columns half, rounded up)."""
    kernel: int = 0
    """Side of the filter in pixels; 0: fully connected."""
    kind: Kind = "conv"
    """conv: convolution; local: locally connected, a convolution with filters and biases of its own
    at each pixel; fc: fully connected."""
    stride: int = 1
    pad: int = 0
    reads: Reads = "own"
    """Input of the weights: "own" column's maps, "both" columns', or the image ("picture")."""
    input: str = ""
    """Name of the layer that it reads; "": the one in the row before."""
    adds: tuple[str, ...] = ()
    """Names of layers whose outputs are added to its weighted sums, before `then`."""
    edge: int = 0
    """Zeros added on the right and at the bottom of the image: see `model.layers.ImageConv`."""
    shrink: int = 1
    """Side of the squares of pixels whose means the layer reads; 1: it reads the pixels."""
    deviation: float = 0.01
    bias: float = 0.0
    then: tuple[str, ...] = ("relu",)
    """Operations after the weights, in order: relu, tanh or sigmoid; norm (local response), scale
    (by a constant), spatial_norm, lcn or batch_norm; pool (maximum) or mean_pool; dropout."""
    pool: str = ""
    """Side and stride of its pooling windows, "3/2"; "": those of the setting pool."""


def _fc(name: str, units: int | None, **fields: Any) -> Layer:
    """A row of a fully connected layer that reads both columns."""
    return Layer(name, units, kind="fc", reads="both", **fields)


# Sizes: paper section 3.5. Order of relu and norm: paper section 3.3. Initial values: the original
# source (layers-145.cfg), which has .03 in conv3 to conv5 where the paper prints .01; with .01 the
# image hardly affects the output of the fresh network.
LAYERS = (
    Layer("conv1", 48, 11, stride=4, reads="picture", edge=3, then=("relu", "norm", "pool")),
    Layer("conv2", 128, kernel=5, pad=2, bias=1.0, then=("relu", "norm", "pool")),
    Layer("conv3", 192, kernel=3, pad=1, reads="both", deviation=0.03),
    Layer("conv4", 192, kernel=3, pad=1, deviation=0.03, bias=1.0),
    Layer("conv5", 128, kernel=3, pad=1, deviation=0.03, bias=1.0, then=("relu", "pool")),
    _fc("fc6", 2048, bias=1.0, then=("relu", "dropout")),
    _fc("fc7", 2048, bias=1.0, then=("relu", "dropout")),
    _fc("fc8", None, then=()),
)
# The sixth convolution of the pre-trained networks (layers-146-2012-2011.cfg): over the last
# pooling, with the initial values of the layers before it.
CONV6 = Layer("conv6", 128, kernel=3, pad=1, reads="both", deviation=0.03, bias=1.0)

# The four-layer network of figure 1: layers-18pct.cfg (with norm = "none": layers-19pct.cfg), whose
# 32, 32 and 64 maps are two columns' here. It was made for images of 32x32 pixels, which it reads
# where they are stored so. The means of squares of 8x8 take a crop of 224 out of 256 to what it was
# in such an image, 28x28.
FOUR = (
    Layer("conv1", 16, 5, pad=2, reads="picture", shrink=8, deviation=1e-4,
          then=("pool", "relu", "norm")),
    Layer("conv2", 16, kernel=5, pad=2, then=("relu", "mean_pool", "norm")),
    Layer("conv3", 32, kernel=5, pad=2, reads="both", then=("relu", "mean_pool")),
    _fc("fc4", None, then=()),
)  # fmt: skip
# The networks of CIFAR-10 with locally connected layers, whose 64, 64, 64 and 32 maps are two
# columns' here: cuda-convnet2's layers-cifar10-11pct.cfg, and, with 32 maps in local3 and norm =
# "none", layers-conv-local-13pct.cfg of the release. As `FOUR`, they read images of 32x32.
LOCAL = (
    Layer("conv1", 32, 5, pad=2, reads="picture", shrink=8, deviation=1e-4,
          then=("relu", "pool", "norm")),
    Layer("conv2", 32, kernel=5, pad=2, then=("relu", "norm", "pool")),
    Layer("local3", 32, kernel=3, pad=1, kind="local", deviation=0.04),
    Layer("local4", 16, kernel=3, pad=1, kind="local", deviation=0.04),
    _fc("fc5", None, then=()),
)  # fmt: skip
TABLES: Mapping[Net, tuple[Layer, ...]] = {
    "paper": LAYERS,
    "four": FOUR,
    "local11": LOCAL,
    "local13": (*LOCAL[:2], replace(LOCAL[2], maps=16), *LOCAL[3:]),
}
"""Rows of each network, for one of two columns."""


def parse_layers(tables: Sequence[object]) -> tuple[Layer, ...]:
    """Return the rows of a table as a TOML file has them, and check each against the others.

    In a file the first row reads the image, and the last has no operations, unless they say so.
    Sizes are checked in `model.architecture.build_stages`.

    Args:
        tables: a mapping of the fields of `Layer` each; `Layer`s are checked alike.

    Raises:
        ValueError: one line that names layer, field and value, and what would do.
    """
    if not 2 <= len(tables) <= MOST_LAYERS:
        raise ValueError(f"layers has {len(tables)} rows; it takes from 2 to {MOST_LAYERS}")
    last = len(tables) - 1
    rows = [
        table if isinstance(table, Layer) else _parse_row(table, index, index == last)
        for index, table in enumerate(tables)
    ]
    places: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row.name in places:
            raise ValueError(f"layers: two rows are called {row.name!r}; give each its own name")
        places[row.name] = index
    for index, row in enumerate(rows):
        _check_row(row, is_last=index == last)
        _check_sources(rows, index, places)
    read = {name for row in rows for name in (row.input, *row.adds)}
    for row, after in pairwise(rows):
        if row.name not in read and (after.input or after.reads == "picture"):
            raise ValueError(f"layers: {row.name} is read by no layer; leave it out, or name it")
    return tuple(rows)


def format_layer(layer: Layer) -> dict[str, Any]:
    """Return a row as `parse_layers` takes it: the fields that are not as by default."""
    defaults = {one.name: one.default for one in fields(Layer)}
    values = {name: getattr(layer, name) for name in defaults}
    return {
        name: [*value] if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not None and (value != defaults[name] or defaults[name] is MISSING)
    }


def parse_window(text: str) -> tuple[int, int]:
    """Return side and stride of the pooling windows "3/2".

    Raises:
        ValueError: it is no such text, or the stride is larger than the side.
    """
    hit = _WINDOW.fullmatch(text)
    window, stride = map(int, hit.groups()) if hit else (0, 1)
    if stride > window:
        raise ValueError('it takes "SIDE/STRIDE" with a stride up to the side, such as "3/2"')
    return window, stride


@lru_cache(maxsize=1)
def _row_types() -> dict[str, Any]:
    return get_type_hints(Layer)


def _parse_row(table: object, index: int, is_last: bool) -> Layer:
    """A row of a file; checks names and types of its fields."""
    if not isinstance(table, Mapping):
        raise ValueError(
            f"layers: row {index + 1} is {table!r:.40}; it takes a table, {{name = …}}"
        )
    name = table.get("name")
    if not (isinstance(name, str) and NAME.fullmatch(name)) or name in RESERVED:
        raise ValueError(
            f"layers: the name of row {index + 1} is {name!r:.40}; it takes letters and a number, "
            "such as 'conv1'"
        )
    types, values = _row_types(), {"maps": None} | dict(table)
    for key, value in table.items():
        if key not in types:
            raise ValueError(f"layers: {name} has {key!r:.40}; a row takes {', '.join(types)}")
        accepted, words = _TAKES.get(types[key], ((str,), ""))
        choices = get_args(types[key]) if not words else ()
        fits = isinstance(value, accepted) and not isinstance(value, bool)
        if choices:
            fits, words = value in choices, " or ".join(map(repr, choices))
        elif isinstance(value, list | tuple):
            fits = fits and all(isinstance(one, str) for one in value)
            values[key] = tuple(value)
        if not fits:
            raise ValueError(f"layers: {name}: {key} is {value!r:.40}; it takes {words}")
    if index == 0:
        values = {"reads": "picture"} | values
    if is_last:
        values = {"then": ()} | values
    return Layer(**values)


def _check_row(row: Layer, is_last: bool) -> None:
    """Refuse values of a row that do not go together; the `ValueError` names one."""

    def require(field: str, holds: bool, hint: str) -> None:
        if not holds:
            value = getattr(row, field)
            shown = [*value] if isinstance(value, tuple) else value
            raise ValueError(f"layers: {row.name}: {field} is {shown!r:.60}; it {hint}")

    if is_last:
        require("kind", row.kind == "fc", "must be 'fc' in the last row, which gives the logits")
        require("maps", row.maps is None, "is left out in the last row: it has the classes")
        require("then", not row.then, "is left out in the last row, which gives the logits")
        require("adds", not row.adds, "is left out in the last row, as long as the classes")
    else:
        require("maps", row.maps is not None, "is given in all rows but the last")
        require("maps", 1 <= (row.maps or 0) <= LARGEST_NUMBER, f"is from 1 to {LARGEST_NUMBER}")
    if row.kind == "fc":
        for field, plain in (("kernel", 0), ("stride", 1), ("pad", 0), ("edge", 0), ("shrink", 1)):
            require(field, getattr(row, field) == plain, "goes with kind = 'conv' or 'local'")
    else:
        require("kernel", 1 <= row.kernel <= LARGEST_NUMBER, f"is from 1 to {LARGEST_NUMBER}")
        require("stride", 1 <= row.stride <= LARGEST_NUMBER, f"is from 1 to {LARGEST_NUMBER}")
        require("pad", 0 <= row.pad < row.kernel, "is from 0 up, and below kernel")
    if row.kind == "local":
        require("kernel", row.kernel % 2 == 1, "is odd in a local layer")
        require("pad", row.pad == row.kernel // 2, f"is {row.kernel // 2}, for the size to stay")
        require("stride", row.stride == 1, "is 1 in a local layer")
        require("reads", row.reads == "own", "is 'own' in a local layer")
    is_plain = row.reads != "picture"
    require("shrink", row.shrink == 1 if is_plain else row.shrink >= 1, "goes with the picture")
    require("edge", row.edge == 0 or (not is_plain and row.pad == 0 and row.shrink == 1),
            "goes with the picture, pad = 0 and shrink = 1")  # fmt: skip
    if row.kind != "fc":
        require("edge", 0 <= row.edge < row.kernel, "is from 0 up, and below kernel")
    most = LARGEST_NUMBER
    require("deviation", 0 <= row.deviation <= most, f"is a number from 0 to {most}")
    require("bias", -most <= row.bias <= most, f"is a number from -{most} to {most}")
    _check_operations(row, require)


def _check_operations(row: Layer, require: Any) -> None:
    known = ", ".join(OPERATIONS)
    require("then", set(row.then) <= set(OPERATIONS), f"takes {known}")
    require("then", len({*row.then}) == len(row.then), "has each operation once at most")
    pools = [one for one in row.then if one in POOLS]
    require("then", len(pools) < 2, "has one pooling at most")
    require("then", "dropout" not in row.then[:-1], "has dropout at its end")
    if row.kind == "fc":
        has_maps = set(row.then) & set(MAP_OPERATIONS)
        require("then", not has_maps, "has, after an fc layer, only an activation and dropout")
    if row.pool:
        require("pool", bool(pools), "goes with pool or mean_pool in then")
        try:
            parse_window(row.pool)
        except ValueError as error:
            require("pool", False, str(error).removeprefix("it "))


def _check_sources(rows: Sequence[Layer], index: int, places: Mapping[str, int]) -> None:
    """Refuse a row that reads no layer, or one that is not before it."""
    row = rows[index]
    if row.reads == "picture":
        if row.input:
            raise ValueError(
                f"layers: {row.name}: input is {row.input!r}; it goes with reads = 'own' or 'both'"
            )
    elif index == 0:
        raise ValueError(
            f"layers: {row.name}: reads is {row.reads!r}; the first row reads the 'picture'"
        )
    for field, names in (("input", (row.input,)), ("adds", row.adds)):
        for name in names:
            if (name or field == "adds") and name not in places:
                raise ValueError(
                    f"layers: {row.name}: {field} is {name!r:.40}; the layers before it are "
                    f"{', '.join(one.name for one in rows[:index])}"
                )
            if name and places[name] >= index:
                circle = _find_circle(rows, places, row.name, name)
                raise ValueError(
                    f"layers: {row.name}: {field} is {name!r}, "
                    + (f"a circle ({circle}); let it read" if circle else "a later row; name")
                    + " one of an earlier row"
                )
    before = rows[places.get(row.input, index - 1)]
    if row.kind != "fc" and row.reads != "picture" and before.kind == "fc":
        raise ValueError(
            f"layers: {row.name}: kind is {row.kind!r}; it reads {before.name}, which has units, "
            "no maps; an fc layer can"
        )


def _find_circle(rows: Sequence[Layer], places: Mapping[str, int], goal: str, start: str) -> str:
    """The way from a layer back to the one that reads it; "" if there is none."""
    ways, seen = [[goal, start]], {start}
    while ways:
        way = ways.pop()
        if way[-1] == goal:
            return " <- ".join(way)
        index = places[way[-1]]
        row = rows[index]
        before = row.input or (rows[index - 1].name if index and row.reads != "picture" else "")
        for name in (before, *row.adds):
            if name in places and name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return ""
