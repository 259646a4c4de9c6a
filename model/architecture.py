"""The table of layers: the network of the paper, and the networks it was compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_type_hints

COLUMN_NAMES = "ab"
IMAGE_MAPS = 3
SMALL_IMAGE: Literal[32] = 32
"""Side of the images of CIFAR-10, which the network of figure 1 was made for, in pixels."""
SMALL_CROP: Literal[24] = 24
"""Side of the crops of them that the network of 11 % was trained on, in pixels."""

CAFFE_IMAGE: Literal[227] = 227
"""Side of the images of Caffe's copy of the network, in pixels: 55 windows of conv1 with no zeros
beside them."""

Net = Literal["paper", "four", "local11", "local13"]
Norm = Literal["lrn", "scale", "spatial", "lcn", "batch", "none"]
Pool = Literal["3/2", "2/2"]
Activation = Literal["relu", "tanh"]
Without = Literal["none", "conv3", "conv4", "conv5"]


@dataclass(frozen=True)
class Layer:
    """A row of the table of layers; counts are for ONE column, at width 1."""

    name: str
    maps: int | None
    """Output maps or units; None: the classes of a column (with two columns half, rounded up)."""
    kernel: int = 0
    """Side of the filter in pixels; 0: fully connected."""
    is_local: bool = False
    """True: locally connected, a convolution with filters and biases of its own at each pixel."""
    stride: int = 1
    pad: int = 0
    reads: str = "own"
    """Input of the weights: "own" column's maps, "both" columns', or the image ("picture")."""
    edge: int = 0
    """Zeros added on the right and at the bottom of the image: see `model.layers.ImageConv`."""
    shrink: int = 1
    """Side of the squares of pixels whose means the layer reads; 1: it reads the pixels."""
    deviation: float = 0.01
    bias: float = 0.0
    then: tuple[str, ...] = ("relu",)
    """Operations after the weights, in order: relu or tanh; norm (local response), scale (by a
    constant), spatial_norm, lcn or batch_norm; pool (maximum) or mean_pool; dropout."""


# Sizes: paper section 3.5. Order of relu and norm: paper section 3.3. Initial values: the original
# source (layers-145.cfg), which has .03 in conv3 to conv5 where the paper prints .01; with .01 the
# image hardly affects the output of the fresh network.
LAYERS = (
    Layer("conv1", 48, 11, stride=4, reads="picture", edge=3, then=("relu", "norm", "pool")),
    Layer("conv2", 128, kernel=5, pad=2, bias=1.0, then=("relu", "norm", "pool")),
    Layer("conv3", 192, kernel=3, pad=1, reads="both", deviation=0.03),
    Layer("conv4", 192, kernel=3, pad=1, deviation=0.03, bias=1.0),
    Layer("conv5", 128, kernel=3, pad=1, deviation=0.03, bias=1.0, then=("relu", "pool")),
    Layer("fc6", 2048, reads="both", bias=1.0, then=("relu", "dropout")),
    Layer("fc7", 2048, reads="both", bias=1.0, then=("relu", "dropout")),
    Layer("fc8", None, reads="both", then=()),
)
# The sixth convolution of the pre-trained networks (layers-146-2012-2011.cfg): over the last
# pooling, with the initial values of the layers before it.
CONV6 = Layer("conv6", 128, kernel=3, pad=1, reads="both", deviation=0.03, bias=1.0)
MIDDLE = ("conv3", "conv4", "conv5", "conv6")
"""Layers whose initial deviation is the setting `middle_std`."""

# The four-layer network of figure 1: layers-18pct.cfg (with norm = "none": layers-19pct.cfg), whose
# 32, 32 and 64 maps are two columns' here. It was made for images of 32x32 pixels, which it reads
# where they are stored so. The means of squares of 8x8 take a crop of 224 out of 256 to what it was
# in such an image, 28x28.
FOUR = (
    Layer("conv1", 16, 5, pad=2, reads="picture", shrink=8, deviation=1e-4,
          then=("pool", "relu", "norm")),
    Layer("conv2", 16, kernel=5, pad=2, then=("relu", "mean_pool", "norm")),
    Layer("conv3", 32, kernel=5, pad=2, reads="both", then=("relu", "mean_pool")),
    Layer("fc4", None, reads="both", then=()),
)  # fmt: skip
# The networks of CIFAR-10 with locally connected layers, whose 64, 64, 64 and 32 maps are two
# columns' here: cuda-convnet2's layers-cifar10-11pct.cfg, and, with 32 maps in local3 and norm =
# "none", layers-conv-local-13pct.cfg of the release. As `FOUR`, they read images of 32x32.
LOCAL = (
    Layer("conv1", 32, 5, pad=2, reads="picture", shrink=8, deviation=1e-4,
          then=("relu", "pool", "norm")),
    Layer("conv2", 32, kernel=5, pad=2, then=("relu", "norm", "pool")),
    Layer("local3", 32, kernel=3, pad=1, is_local=True, deviation=0.04),
    Layer("local4", 16, kernel=3, pad=1, is_local=True, deviation=0.04),
    Layer("fc5", None, reads="both", then=()),
)  # fmt: skip
TABLES: Mapping[Net, tuple[Layer, ...]] = {
    "paper": LAYERS,
    "four": FOUR,
    "local11": LOCAL,
    "local13": (*LOCAL[:2], replace(LOCAL[2], maps=16), *LOCAL[3:]),
}
"""Rows of each network, for one of two columns."""
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
POOLS = ("pool", "mean_pool")

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
    """Function after each layer but the last: ReLU, or tanh as networks had before."""
    without: Without = "none"
    """A layer left out. Without conv3, conv4 reads both columns; without conv5, conv4 has its 128
    maps, so that fc6 stays as it is."""
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

    def _check_type(self, name: str) -> None:
        """Refuse a value of another type than its setting's; a list of texts becomes a tuple."""
        value, kind = getattr(self, name), _design_types()[name]
        if kind == tuple[str, ...]:
            is_list = isinstance(value, list | tuple)
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
        second = self.layer_norms["conv2"]
        if self.spatial_norm and second != "lrn":
            raise ValueError(f"spatial_norm goes with norm = 'lrn'; conv2's norm is {second!r}")
        if self.lrn_across and self.columns == 1:
            raise ValueError("lrn_across is True; that goes with columns = 2")

    @property
    def layer_norms(self) -> dict[str, Norm]:
        """Normalization of each convolution by its name: `norm` where the table has one, or none.

        Raises:
            ValueError: an entry of `norm_layers` that names no convolution, or no normalization.
        """
        rows = [row for row in self._select_rows() if row.kernel and not row.is_local]
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
        return "batch" in self.layer_norms.values()

    @property
    def is_cut_by_columns(self) -> bool:
        """False if a normalization reads maps of both columns, so that no process has just one."""
        return not (self.lrn_across and "lrn" in self.layer_norms.values())

    def _check_small_net(self) -> None:
        """Refuse settings of the other network; the `ValueError` names one."""
        if self.net == "paper":
            if self.image_size in (SMALL_IMAGE, SMALL_CROP):
                raise ValueError(
                    f"image_size is {self.image_size}; that goes with net = {', '.join(SMALL_NETS)}"
                )
            return
        if self.image_size == CAFFE_IMAGE:
            raise ValueError(f"image_size is {self.image_size}; that goes with net = 'paper'")
        for name in (
            "relu_first", "spatial_norm", "pool", "without", "conv6", "bottleneck",
            "communication", "middle_std",
        ):  # fmt: skip
            value, plain = getattr(self, name), getattr(Design, name)
            if value != plain:
                raise ValueError(f"{name} is {value!r}; with net = {self.net!r} it stays {plain!r}")

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Design:
        """The design in a table of settings; other keys are ignored."""
        names = {field.name for field in fields(Design)}
        return Design(**{key: value for key, value in settings.items() if key in names})

    @property
    def pool_window(self) -> tuple[int, int]:
        """Side and stride of the pooling windows in pixels."""
        return (3, 2) if self.pool == "3/2" else (2, 2)

    def layers(self) -> tuple[Layer, ...]:
        """The rows of this network's table, from the image to the logits."""
        rows = [self._choose_operations(row) for row in self._join_columns(self._select_rows())]
        if self.image_size in (SMALL_IMAGE, SMALL_CROP):
            rows = [replace(row, shrink=1) for row in rows]
        if self.image_size == CAFFE_IMAGE:
            rows = [replace(row, edge=0) for row in rows]
        if self.pool == "2/2":
            pads = {"conv2": 1, "conv5": 0}
            rows = [replace(row, pad=pads.get(row.name, row.pad)) for row in rows]
        return tuple(rows)

    def _table(self) -> tuple[Layer, ...]:
        return TABLES[self.net]

    def _select_rows(self) -> list[Layer]:
        """The table for two columns without the layers left out, and with conv6 if wanted."""
        rows = {layer.name: layer for layer in self._table() if layer.name != self.without}
        if self.without == "conv3":
            rows["conv4"] = replace(rows["conv4"], reads="both")
        if self.without == "conv5":
            rows["conv4"] = replace(rows["conv4"], maps=128, then=LAYERS[4].then)
        selected = list(rows.values())
        if self.conv6:
            selected.insert(-3, CONV6)
        if self.bottleneck:
            selected.insert(-1, Layer("bottleneck", self.bottleneck, reads="both", then=()))
        if not self.communication:
            selected = [*map(self._isolate, selected[:-1]), selected[-1]]
        if self.net == "paper":
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
        last = [row.name for row in rows if "pool" in row.then][-1]
        doubled = {last, "conv6", "fc6", "fc7", "bottleneck"}
        if self.net in SMALL_NETS:
            doubled = {row.name for row in rows}
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
            then.insert(1, "norm")
        if not self.relu_first and "pool" in then and layer.name != "conv2":
            then = [*then[1:], then[0]]
        if "norm" in then:
            index = then.index("norm")
            then[index : index + 1] = NORMS[norm]
            if self.spatial_norm and layer.name == "conv2":
                then.insert(index + 1, "spatial_norm")
        if "scale" in then and "pool" in then:  # the same after the pooling, of fewer numbers
            then.remove("scale")
            then.insert(then.index("pool") + 1, "scale")
        if not self.dropout and "dropout" in then:
            then.remove("dropout")
        then = [self.activation if operation == "relu" else operation for operation in then]
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


def build_stages(classes: int = 1000, design: Design | None = None) -> tuple[Stage, ...]:
    """The layers of a network for `classes` classes with their sizes; the paper's by default.

    Raises:
        ValueError: fewer than 2 classes.
    """
    design = design or Design()
    if classes < 2:
        raise ValueError(f"classes is {classes}; a classifier needs at least 2")
    window, step = design.pool_window
    found = []
    maps: int = IMAGE_MAPS
    size: int = design.image_size
    for layer in design.layers():
        inputs = maps * (2 if layer.reads == "both" else 1)
        outputs = -(-classes // design.columns)
        if layer.maps is not None:
            outputs = round(layer.maps * design.width)
        size //= layer.shrink
        if layer.kernel:
            output_size = (size + layer.edge + 2 * layer.pad - layer.kernel) // layer.stride + 1
        else:
            inputs, output_size = inputs * size * size, 1
        final_size = output_size
        if set(POOLS) & set(layer.then):  # rounded up, as in the original (layer.py): ceil_mode
            final_size = -(-(output_size - window) // step) + 1
        found.append(
            Stage(layer, inputs, outputs, size if layer.kernel else 1, output_size, final_size)
        )
        maps, size = outputs, final_size
    return tuple(found)


def fit_design(design: Design, side: int | None) -> Design:
    """Return the design for stored images of a height and width in pixels; None: of many sizes.

    Raises:
        ValueError: it reads larger ones; the message begins with what is stored.
    """
    if design.net in SMALL_NETS and side == SMALL_IMAGE:
        is_cropped = design.image_size == SMALL_CROP
        return design if is_cropped else replace(design, image_size=SMALL_IMAGE)
    if design.image_size in (SMALL_IMAGE, SMALL_CROP) or (
        side is not None and side < design.image_size
    ):
        sizes = "32" if design.image_size == SMALL_CROP else "32 or 256"
        stored = f"images of {side}x{side}" if side else "images of many sizes"
        raise ValueError(
            f"{stored}, and net = {design.net!r} reads {design.image_size}x{design.image_size}; "
            "build it with --size "
            + (sizes if design.net in SMALL_NETS else "256, or train the preset four on 32x32")
        )
    return design
