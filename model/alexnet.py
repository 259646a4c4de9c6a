"""The network of the paper as it was built: eight layers, each cut in half between two columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.exchange import Exchange
from model.layers import PictureConv, dropout, dropout_mask, local_response_norm, seed_of

COLUMN_NAMES = "ab"
IMAGE_SIZE = 224
IMAGE_MAPS = 3
# Zeros on the right and at the bottom of the picture: see PictureConv.
EDGE_PAD = 3


@dataclass(frozen=True)
class Layer:
    """A layer as the table has it; counts are of ONE column, at width 1."""

    name: str
    maps: int | None
    """Output maps or units; None: half of the classes, rounded up."""
    kernel: int = 0
    """Side of the filter in pixels; 0: fully connected."""
    stride: int = 1
    pad: int = 0
    reads: str = "own"
    """"own" column's maps, "both" columns', or the "picture"."""
    deviation: float = 0.01
    bias: float = 0.0
    then: tuple[str, ...] = ("relu",)
    """What follows, in order: relu, norm (local response), pool (max, 3/2) and dropout."""


# Sizes: paper section 3.5. Order of relu and norm: paper section 3.3. Initial values: the original
# source (layers-145.cfg), which has .03 in conv3 to conv5 where the paper prints .01; with .01 the
# picture hardly reaches the output of the fresh network.
LAYERS = (
    Layer("conv1", 48, kernel=11, stride=4, reads="picture", then=("relu", "norm", "pool")),
    Layer("conv2", 128, kernel=5, pad=2, bias=1.0, then=("relu", "norm", "pool")),
    Layer("conv3", 192, kernel=3, pad=1, reads="both", deviation=0.03),
    Layer("conv4", 192, kernel=3, pad=1, deviation=0.03, bias=1.0),
    Layer("conv5", 128, kernel=3, pad=1, deviation=0.03, bias=1.0, then=("relu", "pool")),
    Layer("fc6", 2048, reads="both", bias=1.0, then=("relu", "dropout")),
    Layer("fc7", 2048, reads="both", bias=1.0, then=("relu", "dropout")),
    Layer("fc8", None, reads="both", then=()),
)


@dataclass(frozen=True)
class Stage:
    """A layer of one particular network: the table's row, its sizes worked out, for one column."""

    layer: Layer
    inputs: int
    """Maps or units that a column's weights read."""
    outputs: int
    input_size: int
    """Side of the input maps in pixels, edge pad left out; 1 for units."""
    output_size: int
    final_size: int
    """Side after the pooling, if there is any."""


def stages(classes: int = 1000, width: float = 1.0) -> tuple[Stage, ...]:
    """The layers of a network with `classes` classes and `width` times the maps and units.

    Raises:
        ValueError: fewer than 2 classes, or a width that leaves a layer without a map.
    """
    smallest = 1 / min(layer.maps for layer in LAYERS if layer.maps)
    if classes < 2:
        raise ValueError(f"classes is {classes}; a classifier needs at least 2")
    if not smallest <= width < math.inf:
        raise ValueError(f"width is {width}; the smallest that makes sense is {smallest:.3f}")
    found = []
    maps, size = IMAGE_MAPS, IMAGE_SIZE
    for layer in LAYERS:
        inputs = maps * (2 if layer.reads == "both" else 1)
        outputs = (classes + 1) // 2 if layer.maps is None else round(layer.maps * width)
        if layer.kernel:
            edge = EDGE_PAD if layer.reads == "picture" else 0
            output_size = (size + edge + 2 * layer.pad - layer.kernel) // layer.stride + 1
        else:
            inputs, output_size = inputs * size * size, 1
        final_size = (output_size - 3) // 2 + 1 if "pool" in layer.then else output_size
        found.append(
            Stage(layer, inputs, outputs, size if layer.kernel else 1, output_size, final_size)
        )
        maps, size = outputs, final_size
    return tuple(found)


class AlexNet(nn.Module):
    """Both columns in one process, or one column of a pair of processes.

    The two forms compute the same function, gradients included. A layer's weight and bias hold the
    columns one after the other along dim 0: `conv2.weight` is [2 * 128, 48, 5, 5] with both columns
    and [128, 48, 5, 5] with one. Images may come in either memory format; inside, all is channels
    last.

    Args:
        columns: (0, 1), or (0,) or (1,) for one column, which then needs `exchange`.
        classes: number of classes, at least 2. Each column computes half of them; with an odd
            number column b has one unit too many: it is cut off from the logits, gets no gradient
            and only decays.
        width: factor on all maps and units. Other than 1, initial deviations are multiplied by
            1/sqrt(width), without which the signal dies on its way through a narrow network.
        exchange: the link to the other column.
        seed: of the initial weights and of the dropout masks. Both belong to a column, not to a
            process: they are equal in either form.

    Raises:
        ValueError: an argument out of range, or an exchange that does not fit the columns.
    """

    def __init__(
        self,
        columns: Sequence[int] = (0, 1),
        classes: int = 1000,
        width: float = 1.0,
        exchange: Exchange | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.classes = classes
        self.width = width
        self.seed = seed
        self.stages = stages(classes, width)
        self.exchange = exchange
        self._check_columns()
        self._moment: tuple[int, int] | None = None
        for stage in self.stages:
            self.add_module(stage.layer.name, self._module(stage))
        self._initialise()

    def _check_columns(self) -> None:
        if self.columns not in ((0, 1), (0,), (1,)):
            raise ValueError(f"columns is {self.columns}; it is (0, 1), (0,) or (1,)")
        if len(self.columns) == 2 and self.exchange is not None:
            raise ValueError(
                "both columns are here: there is nothing to exchange, leave exchange out"
            )
        if len(self.columns) == 1 and self.exchange is None:
            raise ValueError(f"column {self.columns[0]} alone needs an exchange with the other one")
        if self.exchange is not None and (self.exchange.index,) != self.columns:
            raise ValueError(
                f"columns is {self.columns}, but this process is {self.exchange.index} in its pair"
            )

    def _module(self, stage: Stage) -> nn.Module:
        """The layer's parameters, not yet filled."""
        layer, here = stage.layer, len(self.columns)
        maps = here * stage.outputs
        module: nn.Module
        if not layer.kernel:
            return nn.utils.skip_init(nn.Linear, stage.inputs, maps)
        if layer.reads == "picture":
            module = nn.utils.skip_init(
                PictureConv, stage.inputs, maps, layer.kernel, layer.stride, EDGE_PAD
            )
        else:
            groups = here if layer.reads == "own" else 1
            module = nn.utils.skip_init(
                nn.Conv2d,
                groups * stage.inputs,
                maps,
                layer.kernel,
                stride=layer.stride,
                padding=layer.pad,
                groups=groups,
            )
        # Channels last throughout: a third off the time of a step on a CPU; tensor cores want it.
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def _initialise(self) -> None:
        for stage in self.stages:
            name = stage.layer.name
            deviation = stage.layer.deviation / math.sqrt(self.width)
            weight = self.get_parameter(f"{name}.weight")
            for column, own in zip(self.columns, weight.chunk(len(self.columns)), strict=True):
                generator = torch.Generator().manual_seed(
                    seed_of("initial", self.seed, column, name)
                )
                drawn = torch.empty(own.shape).normal_(0.0, deviation, generator=generator)
                own.copy_(drawn)
            self.get_parameter(f"{name}.bias").fill_(stage.layer.bias)

    def set_step(self, step: int, replica: int = 0) -> None:
        """Say which dropout masks the next forward passes use; training needs it once at least.

        A mask is a function of (seed, step, replica, column, layer), so a restart draws the same.

        Args:
            step: number of the optimiser step, from 0.
            replica: number of this pair among data-parallel pairs.
        """
        self._moment = (step, replica)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, [b, classes], of images [b, 3, 224, 224] (float, channel mean subtracted).

        In a pair both ranks pass the same images and get the same logits.
        """
        x = images
        for stage in self.stages:
            layer = stage.layer
            if layer.reads == "both" and self.exchange is not None:
                x = self.exchange.gather(x)
            if not layer.kernel:
                x = x.flatten(1)
            x = self.get_submodule(layer.name)(x)
            for operation in layer.then:
                x = self._follow(operation, x, stage)
        if self.exchange is not None:
            x = self.exchange.gather_replicated(x)
        return x[:, : self.classes]

    def _follow(self, operation: str, x: Tensor, stage: Stage) -> Tensor:
        if operation == "relu":
            return F.relu(x, inplace=True)
        if operation == "norm":
            return local_response_norm(x, len(self.columns))
        if operation == "pool":
            return F.max_pool2d(x, kernel_size=3, stride=2)
        return dropout(x, self._mask(x, stage) if self.training else None)

    def _mask(self, x: Tensor, stage: Stage) -> Tensor:
        if self._moment is None:
            raise RuntimeError("call set_step(step) before a forward pass in training mode")
        masks = [
            dropout_mask(
                len(x),
                stage.outputs,
                x.device,
                (self.seed, *self._moment, column, stage.layer.name),
            )
            for column in self.columns
        ]
        return torch.cat(masks, dim=1)

    def split(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut tensors named and shaped like the parameters into columns: "a.conv1.weight", ...

        The pieces are contiguous; those that already were are views of what went in.
        """
        return {
            f"{COLUMN_NAMES[column]}.{name}": own.contiguous()
            for name, tensor in stacked.items()
            for column, own in zip(
                self.columns, tensor.detach().chunk(len(self.columns)), strict=True
            )
        }

    @torch.no_grad()
    def fill(self, stacked: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """The way back from `split`: copy `state` into the tensors of `stacked`, all or nothing.

        Raises:
            ValueError: a key is missing or unexpected or a shape differs; it names them.
        """
        wanted = self.split(stacked)
        wrong = [f"{key} is missing" for key in wanted if key not in state]
        wrong += [f"{key} is not of this network" for key in state if key not in wanted]
        wrong += [
            f"{key} is {list(state[key].shape)} instead of {list(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in state and state[key].shape != tensor.shape
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"the state does not fit the network: {', '.join(wrong[:4])}{more}")
        for name, tensor in stacked.items():
            own = tensor.detach().chunk(len(self.columns))
            for column, part in zip(self.columns, own, strict=True):
                part.copy_(state[f"{COLUMN_NAMES[column]}.{name}"])

    def column_state(self) -> dict[str, Tensor]:
        """The parameters of the columns here: "a.conv1.weight", ..., "b.fc8.bias".

        The same keys and shapes whether the columns live in one process or in two.
        """
        return self.split(dict(self.named_parameters()))

    def load_column_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the parameters of `column_state`; it must hold exactly the own columns.

        Raises:
            ValueError: a key is missing or unexpected or a shape differs; nothing is changed then.
        """
        self.fill(dict(self.named_parameters()), state)
