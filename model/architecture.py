"""The settings of the network: the paper's, those it was compared with, and tables of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from model.layer_table import (
    ACTIVATIONS,
    CONV6,
    LAYERS,
    POOLS,
    TABLES,
    Layer,
    Net,
    format_layer,
    parse_layers,
    parse_window,
)

COLUMN_NAMES = "ab"
IMAGE_MAPS = 3
SMALL_IMAGE: Literal[32] = 32
"""Side of the images of CIFAR-10, which the network of figure 1 was made for, in pixels."""
SMALL_CROP: Literal[24] = 24
"""Side of the crops of them that the network of 11 % was trained on, in pixels."""

CAFFE_IMAGE: Literal[227] = 227
"""Side of the images of Caffe's copy of the network, in pixels: 55 windows of conv1 with no zeros
beside them."""

Norm = Literal["lrn", "scale", "spatial", "lcn", "batch", "none"]
Pool = Literal["3/2", "2/2"]
Activation = Literal["relu", "tanh", "sigmoid"]
Without = Literal["none", "conv3", "conv4", "conv5", "fc7", "dense"]


MIDDLE = ("conv3", "conv4", "conv5", "conv6")
"""Layers whose initial deviation is the setting `middle_std`."""
DENSE = ("fc6", "fc7")
"""Hidden layers that are fully connected."""
SMALL_NETS = tuple(net for net in TABLES if net != "paper")
"""Networks for images of CIFAR-10."""
WIDEST = 32
"""Largest factor on the maps and units: with it, a network has 60 billion weights."""
NORMS: Mapping[Norm, tuple[str, ...]] = {
    "lrn": ("norm",), "scale": ("scale",), "spatial": ("spatial_norm",), "lcn": ("lcn",),
    "batch": ("batch_norm",), "none": (),
}  # fmt: skip
"""Setting `norm` -> operations that replace "norm" in the table."""
LARGEST_BOTTLENECK = 1_000_000
LARGEST_WINDOW = 99
"""Largest window of the response normalization, in maps."""

_ACCEPTED: dict[Any, tuple[type, ...]] = {float: (float, int), int: (int,), bool: (bool,)}
_WORDS = {float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Design:
    """Settings of the network. The defaults are the paper's; every other value is an ablation.

    Raises:
        ValueError: a value that a setting does not take, or values that give no network.
    """

    width: float = 1.0
    """Factor on all maps and units."""
    columns: int = 2
    """2: the paper's network; 1: the single column it was compared with (layers-145-half.cfg: as
    wide as one of two, except for 256 maps in conv5 and 4,096 units in fc6 and fc7)."""
    net: Net = "paper"
    """paper: eight layers; four: the network of figure 1, three convolutions of 5x5 and the output,
    on the image shrunk by 8, or on one of 32 pixels as it is; local11, local13: as four, with two
    convolutions and two locally connected layers (the release's 11 % and 13 % on CIFAR-10)."""
    layers: Annotated[tuple[Layer, ...], tyro.conf.Suppress, tyro.conf.Fixed] = ()
    """Table of layers of one's own in place of net's, for one of the columns."""
    image_size: Literal[224, 227, 32, 24] = 224
    """Side of the image that the network reads, in pixels. 227: as Caffe's copy does, with no zeros
    at the edge; 32 only with the networks other than paper, for which a training on stored images
    of 32x32 sets it by itself, and 24, crops of them, where it is asked for."""
    norm: Norm = "lrn"
    """Normalization after conv1 and conv2. lrn: local response; scale: the constant lrn_k **
    -lrn_beta, which is what lrn does to small activations, as a control; spatial: the source's,
    over 5x5 pixels of a map; lcn: local contrast (Jarrett et al. 2009); batch: over the batch
    (Ioffe and Szegedy 2015); none: no normalization, not even spatial_norm (layers-148.cfg)."""
    norm_layers: tuple[str, ...] = ()
    """Normalization of single convolutions, "conv2=none" each, in place of norm; also of those that
    have none in the paper."""
    lrn_k: float = 2.0
    """Constant k of the response normalization (paper section 3.3)."""
    lrn_size: int = 5
    """Its n: maps in the window, an odd number."""
    lrn_alpha: float = 1e-4
    """Its alpha, which is divided by lrn_size, as in the source; the paper's formula as printed is
    lrn_alpha = 5e-4."""
    lrn_beta: float = 0.75
    """Its exponent beta."""
    lrn_across: bool = False
    """Let its windows reach from the last map of a column to the first of the other one, as in
    networks of Caffe; each worker then holds both columns."""
    relu_first: bool = True
    """The paper's order, ReLU before normalization. False: the source's (layers-145.cfg), where
    conv1 and conv5 have ReLU after the pooling, so that conv1 is normalized with its signs."""
    spatial_norm: bool = False
    """The source's second normalization in layer 2, over 5x5 pixels of a map (`cnorm2`)."""
    pool: Pool = "3/2"
    """Side and stride of the max-pooling windows. 2/2 as in layers-147.cfg: conv2 padded by 1 and
    conv5 by 0, so that fc6 still reads 6x6."""
    activation: Activation = "relu"
    """Function after each layer but the last: ReLU, or tanh or the logistic sigmoid as networks had
    before."""
    without: Without = "none"
    """A layer left out. Without conv3, conv4 reads both columns; without conv5, conv4 has its 128
    maps, so that fc6 stays as it is. Without fc7, fc8 reads fc6; dense: without both, so that it
    reads the last pooling."""
    conv6: bool = False
    """Adds a sixth convolution over the last pooling, which reads both columns."""
    bottleneck: int = 0
    """Units of a column in a linear layer before the last one, which keeps the weights of many
    classes few (layers-146-2011.cfg: 1024); 0: no such layer."""
    communication: bool = True
    """False: columns read only their own maps before the last layer; conv2 then has 160 maps and
    fc6 4,096 units in a column, for about as many weights (layers-150.cfg)."""
    middle_std: float = 0.03
    """Standard deviation of the initial weights of conv3 to conv6, as in the source; the paper's
    text has 0.01, with which the image hardly reaches the output."""
    dropout: bool = True
    """False: all units of fc6 and fc7 are used, in training and in testing, and none is halved."""

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name)
        if self.columns not in (1, 2):
            raise ValueError(f"columns is {self.columns}; a network has 1 or 2")
        self._check_small_net()
        smallest = 1 / min(layer.maps for layer in self._select_rows() if layer.maps)
        if not self.width <= WIDEST:  # a NaN is no number to compare with
            raise ValueError(f"width is {self.width!r:.40}; it must be finite, {WIDEST} at most")
        if self.width < smallest:
            raise ValueError(
                f"width is {self.width}; the smallest that makes sense is {smallest:.3f}"
            )
        self._check_norms()
        if not 0 <= self.middle_std < math.inf:
            raise ValueError(f"middle_std is {self.middle_std}; it is a number from 0 up")
        if not 0 <= self.bottleneck <= LARGEST_BOTTLENECK:
            raise ValueError(
                f"bottleneck is {self.bottleneck}; it is from 0 to {LARGEST_BOTTLENECK}"
            )
        if self.columns == 1 and not self.communication:
            raise ValueError("communication is False; that goes with columns = 2")
        if self.layers:
            build_stages(2, self)

    def _check_type(self, name: str) -> None:
        """Refuse a value of another type than its setting's; a list of texts becomes a tuple."""
        value, kind = getattr(self, name), _design_types()[name]
        is_list = isinstance(value, list | tuple)
        if kind == tuple[Layer, ...]:
            if not is_list:
                raise ValueError(f"{name} is {value!r:.40}; it takes a list of tables")
            object.__setattr__(self, name, parse_layers(value) if value else ())
        elif kind == tuple[str, ...]:
            if not is_list or not all(isinstance(one, str) for one in value):
                raise ValueError(f"{name} is {value!r}; it takes a list of texts")
            object.__setattr__(self, name, tuple(value))
        elif choices := get_args(kind):
            if value not in choices:
                known = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name} is {value!r}; it takes {known}")
        elif not isinstance(value, _ACCEPTED[kind]) or (type(value) is bool) != (kind is bool):
            raise ValueError(f"{name} is {value!r}; it takes {_WORDS[kind]}")

    def _check_norms(self) -> None:
        """Refuse constants and norms of layers that cannot work; the `ValueError` names one."""
        for name in ("lrn_k", "lrn_alpha", "lrn_beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number from 0 up")
        if self.lrn_k == 0:
            raise ValueError("lrn_k is 0; it must be above 0, or maps of zeros have no quotient")
        if not (1 <= self.lrn_size <= LARGEST_WINDOW and self.lrn_size % 2):
            raise ValueError(f"lrn_size is {self.lrn_size}; it is odd, from 1 to {LARGEST_WINDOW}")
        second = self.layer_norms.get("conv2", "lrn")
        if self.spatial_norm and second != "lrn":
            raise ValueError(f"spatial_norm goes with norm = 'lrn'; conv2's norm is {second!r}")
        if double := [row.name for row in self.rows() if row.then.count("batch_norm") > 1]:
            raise ValueError(
                f"layers: {double[0]}: then has batch_norm, and so has the setting norm or "
                "norm_layers; give one of them"
            )
        if self.lrn_across and self.columns == 1:
            raise ValueError("lrn_across is True; that goes with columns = 2")

    @property
    def layer_norms(self) -> dict[str, Norm]:
        """Normalization of each convolution by its name: `norm` where the table has one, or none.

        Raises:
            ValueError: an entry of `norm_layers` that names no convolution, or no normalization.
        """
        rows = [row for row in self._select_rows() if row.kind == "conv" or "norm" in row.then]
        norms: dict[str, Norm] = {
            row.name: self.norm if "norm" in row.then else "none" for row in rows
        }
        seen = set()
        for entry in self.norm_layers:
            layer, equals, norm = (part.strip() for part in entry.partition("="))
            start = f"norm_layers: {entry!r}"
            if not equals:
                raise ValueError(f"{start} should be LAYER=NORM, such as 'conv2=none'")
            if layer not in norms:
                raise ValueError(
                    f"{start}: no convolution is called {layer!r}; there are {', '.join(norms)}"
                )
            if norm not in NORMS:
                raise ValueError(
                    f"{start}: no norm is called {norm!r}; there are {', '.join(NORMS)}"
                )
            if layer in seen:
                raise ValueError(f"{start}: {layer} has a norm already; give one")
            seen.add(layer)
            norms[layer] = next(known for known in NORMS if known == norm)
        return norms

    @property
    def has_batch_norm(self) -> bool:
        """True if a layer is normalized over the batch."""
        return any("batch_norm" in row.then for row in self.rows())

    @property
    def is_cut_by_columns(self) -> bool:
        """False if a normalization reads maps of both columns, so that no process has just one."""
        return not (self.lrn_across and any("norm" in row.then for row in self.rows()))

    def _check_small_net(self) -> None:
        """Refuse settings of the paper's network with another; the `ValueError` names one."""
        if self.net == "paper" and not self.layers:
            if self.image_size in (SMALL_IMAGE, SMALL_CROP):
                raise ValueError(
                    f"image_size is {self.image_size}; that goes with net = {', '.join(SMALL_NETS)}"
                )
            return
        if self.image_size == CAFFE_IMAGE and not self.layers:
            raise ValueError(f"image_size is {self.image_size}; that goes with net = 'paper'")
        other = "layers" if self.layers else f"net = {self.net!r}"
        for name in (
            *(("net",) if self.layers else ()), "relu_first", "spatial_norm", "pool", "without",
            "conv6", "bottleneck", "communication", "middle_std",
        ):  # fmt: skip
            value, plain = getattr(self, name), getattr(Design, name)
            if value != plain:
                raise ValueError(f"{name} is {value!r}; with {other} it stays {plain!r}")

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Design:
        """The design in a table of settings; other keys are ignored."""
        names = {field.name for field in fields(Design)}
        return Design(**{key: value for key, value in settings.items() if key in names})

    def to_settings(self) -> dict[str, Any]:
        """The settings as `from_settings` takes them: plain values, rows as in a file."""
        rows = (format_layer(row) if isinstance(row, Layer) else row for row in self.layers)
        return vars(self) | {"layers": tuple(rows)}

    @property
    def pool_window(self) -> tuple[int, int]:
        """Side and stride of the pooling windows in pixels."""
        return parse_window(self.pool)

    def rows(self) -> tuple[Layer, ...]:
        """The rows of this network's table, from the image to the logits."""
        rows = [self._choose_operations(row) for row in self._join_columns(self._select_rows())]
        if self.layers:
            return tuple(rows)
        if self.image_size in (SMALL_IMAGE, SMALL_CROP):
            rows = [replace(row, shrink=1) for row in rows]
        if self.image_size == CAFFE_IMAGE:
            rows = [replace(row, edge=0) for row in rows]
        if self.pool == "2/2":
            pads = {"conv2": 1, "conv5": 0}
            rows = [replace(row, pad=pads.get(row.name, row.pad)) for row in rows]
        return tuple(rows)

    def _table(self) -> tuple[Layer, ...]:
        return self.layers or TABLES[self.net]

    def _select_rows(self) -> list[Layer]:
        """The table for two columns without the layers left out, and with conv6 if wanted."""
        left_out = DENSE if self.without == "dense" else (self.without,)
        rows = {layer.name: layer for layer in self._table() if layer.name not in left_out}
        if self.without == "conv3":
            rows["conv4"] = replace(rows["conv4"], reads="both")
        if self.without == "conv5":
            rows["conv4"] = replace(rows["conv4"], maps=128, then=LAYERS[4].then)
        selected = list(rows.values())
        if self.conv6:
            index = next(i for i, row in enumerate(selected) if row.kind == "fc")
            selected.insert(index, CONV6)
        if self.bottleneck:
            row = Layer("bottleneck", self.bottleneck, kind="fc", reads="both", then=())
            selected.insert(-1, row)
        if not self.communication:
            selected = [*map(self._isolate, selected[:-1]), selected[-1]]
        if self.net == "paper" and not self.layers:
            selected = [
                replace(row, deviation=self.middle_std) if row.name in MIDDLE else row
                for row in selected
            ]
        return selected

    @staticmethod
    def _isolate(row: Layer) -> Layer:
        """The row without communication between the columns."""
        maps = {"conv2": 160, "fc6": 4096}.get(row.name, row.maps)
        return replace(row, maps=maps, reads="own" if row.reads == "both" else row.reads)

    def _join_columns(self, rows: list[Layer]) -> list[Layer]:
        """The rows for a single column, if there is only one; it has twice the maps at the end."""
        if self.columns == 2:
            return rows
        if self.layers:
            doubled = set()
        elif self.net in SMALL_NETS:
            doubled = {row.name for row in rows}
        else:
            last = [row.name for row in rows if "pool" in row.then][-1]
            doubled = {last, "conv6", "fc6", "fc7", "bottleneck"}
        return [
            replace(
                row,
                maps=2 * row.maps if row.maps and row.name in doubled else row.maps,
                reads="own" if row.reads == "both" else row.reads,
            )
            for row in rows
        ]

    def _choose_operations(self, layer: Layer) -> Layer:
        """The row with the operations that the settings ask for."""
        then = list(layer.then)
        norm = self.layer_norms.get(layer.name, "none")
        if norm != "none" and "norm" not in then:  # behind the activation, as in the paper
            places = [place for place, one in enumerate(then) if one in ACTIVATIONS]
            then.insert(places[-1] + 1 if places else 0, "norm")
        if not self.relu_first and "pool" in then and layer.name != "conv2":
            then = [*then[1:], then[0]]
        if "norm" in then:
            index = then.index("norm")
            then[index : index + 1] = NORMS[norm]
            if self.spatial_norm and layer.name == "conv2":
                then.insert(index + 1, "spatial_norm")
        if not self.dropout and "dropout" in then:
            then.remove("dropout")
        then = [self.activation if operation == "relu" else operation for operation in then]
        if "scale" in then and "pool" in then:
            index, pooling = then.index("scale"), then.index("pool")
            if index < pooling and set(then[index + 1 : pooling]) <= {"relu"}:
                then.insert(pooling, then.pop(index))  # the same after it, of fewer numbers
        return replace(layer, then=tuple(then))


@lru_cache(maxsize=1)
def _design_types() -> dict[str, Any]:
    """Types of the settings by their names; the same for every design."""
    return get_type_hints(Design)


@dataclass(frozen=True)
class Stage:
    """A layer of one particular network with its sizes, for one column."""

    layer: Layer
    inputs: int
    """Number of maps or units that a column's weights read."""
    outputs: int
    """Number of maps or units of a column."""
    input_size: int
    """Side of the input maps in pixels, after shrinking, without edge zeros; 1 for units."""
    output_size: int
    """Side of the output maps in pixels before pooling; 1 for units."""
    final_size: int
    """Side after the pooling, if there is any, else as `output_size`."""
    window: tuple[int, int]
    """Side and stride of its pooling windows."""
    source: int
    """Index of the stage that it reads; -1: the image."""
    added: tuple[int, ...]
    """Indices of the stages whose outputs are added to its sums."""


def build_stages(classes: int = 1000, design: Design | None = None) -> tuple[Stage, ...]:
    """The layers of a network for `classes` classes with their sizes; the paper's by default.

    Raises:
        ValueError: fewer than 2 classes, or shapes that do not meet; names the layer.
    """
    design = design or Design()
    if classes < 2:
        raise ValueError(f"classes is {classes}; a classifier needs at least 2")
    rows = design.rows()
    places = {row.name: index for index, row in enumerate(rows)}
    stages: list[Stage] = []
    for index, layer in enumerate(rows):
        source = -1 if layer.reads == "picture" else places.get(layer.input, index - 1)
        outputs = -(-classes // design.columns)
        if layer.maps is not None:
            outputs = round(layer.maps * design.width)
        if layer.shrink > design.image_size:
            raise ValueError(
                f"layers: {layer.name}: shrink is {layer.shrink}, and the image is "
                f"{design.image_size}x{design.image_size}; take smaller squares"
            )
        maps, size = IMAGE_MAPS, design.image_size // layer.shrink
        if source >= 0:
            maps, size = stages[source].outputs, stages[source].final_size
        inputs = maps * (2 if layer.reads == "both" else 1)
        window = parse_window(layer.pool) if layer.pool else design.pool_window
        added = tuple(places[name] for name in layer.adds)
        if layer.kind == "fc":
            sizes = inputs * size * size, outputs, 1, 1, 1
        else:
            sizes = inputs, outputs, size, *_measure(layer, size, window)
        stages.append(Stage(layer, *sizes, window, source, added))
        for other in added:
            _check_sum(stages[-1], stages[other])
    return tuple(stages)


def _measure(layer: Layer, size: int, window: tuple[int, int]) -> tuple[int, int]:
    """Sides of the maps of a layer before and after its pooling; those that it reads have `size`.

    Raises:
        ValueError: a filter or a window is larger than what it covers.
    """
    reach = size + layer.edge + 2 * layer.pad - layer.kernel
    if reach < 0:
        raise ValueError(
            f"layers: {layer.name}: kernel is {layer.kernel}, and its input is {size}x{size} with "
            f"pad {layer.pad}; take a smaller kernel, or less pooling or stride before it"
        )
    output_size = final_size = reach // layer.stride + 1
    if set(POOLS) & set(layer.then):  # rounded up, as in the original (layer.py): ceil_mode
        side, step = window
        if side > output_size:
            raise ValueError(
                f"layers: {layer.name}: pool is {side}/{step}, and its maps are {output_size}x"
                f"{output_size}; take smaller windows, or less pooling or stride before it"
            )
        final_size = -(-(output_size - side) // step) + 1
    return output_size, final_size


def _check_sum(stage: Stage, other: Stage) -> None:
    """Refuse to add outputs of another shape to a layer's sums."""
    own, there = (
        f"{maps} maps of {size}x{size}"
        for maps, size in (
            (stage.outputs, stage.output_size), (other.outputs, other.final_size)
        )
    )  # fmt: skip
    if own != there or (stage.layer.kind == "fc") != (other.layer.kind == "fc"):
        raise ValueError(
            f"layers: {stage.layer.name}: adds {other.layer.name}, which has {there}, and "
            f"{stage.layer.name} itself {own}; they must be alike"
        )


def fit_design(design: Design, side: int | None) -> Design:
    """Return the design for stored images of a height and width in pixels; None: of many sizes.

    Raises:
        ValueError: it reads larger ones; the message begins with what is stored.
    """
    if design.net in SMALL_NETS and side == SMALL_IMAGE:
        is_cropped = design.image_size == SMALL_CROP
        return design if is_cropped else replace(design, image_size=SMALL_IMAGE)
    is_small = design.image_size in (SMALL_IMAGE, SMALL_CROP)
    if (is_small and side != SMALL_IMAGE) or (side is not None and side < design.image_size):
        reader = "the table of layers" if design.layers else f"net = {design.net!r}"
        sizes = "256, or train the preset four on 32x32"
        if design.layers:
            sizes = "32, or set image_size" if is_small else "256, or set image_size"
        elif design.net in SMALL_NETS:
            sizes = "32" if design.image_size == SMALL_CROP else "32 or 256"
        stored = f"images of {side}x{side}" if side else "images of many sizes"
        raise ValueError(
            f"{stored}, and {reader} reads {design.image_size}x{design.image_size}; build it with "
            f"--size {sizes}"
        )
    return design
