"""The network of the paper as it was built: eight layers, each split between two columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.architecture import COLUMN_NAMES, Design, Stage, build_stages
from model.exchange import Exchange
from model.layer_table import Layer
from model.layers import (
    ColumnLinear,
    Dropout,
    ImageConv,
    LocalConv,
    ShrunkConv,
    derive_seed,
    group_operations,
)
from model.norm import (
    BatchNorm,
    Response,
    local_contrast_norm,
    local_response_norm,
    norm_pool,
    spatial_response_norm,
)

Watch = Callable[[str, Tensor], None]
NORM, DROPOUT = "norm", "dropout"
"""Names of a layer's batch normalization and dropout as submodules: `conv1.norm.weight`."""
RUNNING = ("running_mean", "running_var")
"""Buffers that are part of the network, but learned by no gradient."""


class AlexNet(nn.Module):
    """Both columns in one process, or one column of a pair of processes.

    The two forms compute the same function, gradients included. A layer's weight and bias hold the
    columns one after the other along dim 0: `conv2.weight` is [2 * 128, 48, 5, 5] with both columns
    and [128, 48, 5, 5] with one. Images may have either memory format; activations are channels
    last.

    Args:
        columns: (0, 1), the default, or (0,) or (1,) for one column, which then needs `exchange`.
        classes: number of classes, at least 2. Each column computes half of them; with an odd
            number column b has one unit too many: the logits leave it out, it gets no gradient and
            only decays.
        width: factor on all maps and units. Other than 1, initial deviations are multiplied by
            1/sqrt(width), without which activations vanish in a narrow network. Short for
            `design=Design(width=...)`.
        exchange: the link to the other column.
        seed: seed of the initial weights and of the dropout masks. Both depend on the column, not
            on the process: they are equal in either form.
        design: another network than the paper's. One with a single column has `columns=(0,)`.
        initializes: whether parameters get their initial values; they are arbitrary otherwise.

    Raises:
        ValueError: an argument out of range, or an exchange that does not fit the columns.
    """

    def __init__(
        self,
        columns: Sequence[int] | None = None,
        classes: int = 1000,
        width: float | None = None,
        exchange: Exchange | None = None,
        seed: int = 0,
        design: Design | None = None,
        *,
        initializes: bool = True,
    ) -> None:
        super().__init__()
        if design is not None and width is not None:
            raise ValueError(f"give width or design, not both (width={width}, design={design})")
        self.design = design or Design(width=1.0 if width is None else width)
        self.columns = tuple(range(self.design.columns) if columns is None else columns)
        self.classes = classes
        self.seed = seed
        self.stages = build_stages(classes, self.design)
        self.exchange = exchange
        self._check_columns()
        one = self.design
        self._response = Response(one.lrn_size, one.lrn_k, one.lrn_alpha, one.lrn_beta)
        self._norm_columns = 1 if one.lrn_across else len(self.columns)
        self._position: Tensor
        self.register_buffer("_position", torch.zeros((), dtype=torch.int64), persistent=False)
        self._has_position = False
        self._kept = {
            source
            for index, stage in enumerate(self.stages)
            for source in (*stage.added, *({stage.source} - {index - 1}))
        }
        self._following = {s.layer.name: group_operations(s.layer.then) for s in self.stages}
        for stage in self.stages:
            self.add_module(stage.layer.name, self._make_module(stage))
        if initializes:
            self._initialize()

    def _check_columns(self) -> None:
        if self.design.columns == 1:
            if self.columns != (0,) or self.exchange is not None:
                raise ValueError(
                    f"a network of one column has columns (0,) and no exchange, not {self.columns}"
                )
            return
        if self.columns not in ((0, 1), (0,), (1,)):
            raise ValueError(f"columns is {self.columns}; it is (0, 1), (0,) or (1,)")
        if len(self.columns) == 2 and self.exchange is not None:
            raise ValueError(
                "both columns are here: there is nothing to exchange, leave exchange out"
            )
        if len(self.columns) == 1 and self.exchange is None:
            raise ValueError(f"column {self.columns[0]} alone needs an exchange with the other one")
        if self.exchange is not None and not self.design.is_cut_by_columns:
            raise ValueError(
                "lrn_across is True, whose windows read both columns; one column alone cannot "
                "compute them"
            )
        if self.exchange is not None and (self.exchange.index,) != self.columns:
            raise ValueError(
                f"columns is {self.columns}, but this process is {self.exchange.index} in its pair"
            )

    def _make_module(self, stage: Stage) -> nn.Module:
        """The layer with uninitialized parameters."""
        layer, columns = stage.layer, len(self.columns)
        inputs, maps = stage.inputs, columns * stage.outputs
        build = nn.utils.skip_init
        module: Any  # torch annotates no memory_format of Module.to
        if layer.kind == "fc":
            module = build(nn.Linear, inputs, maps)
            if layer.reads == "own" and columns == 2:
                module = build(ColumnLinear, inputs, maps)
        elif layer.kind == "local":
            module = build(LocalConv, inputs, maps, layer.kernel, stage.input_size, columns)
        elif layer.reads == "picture" and (layer.pad or layer.shrink > 1):
            sizes = layer.kernel, layer.stride, layer.pad
            module = build(ShrunkConv, inputs, maps, *sizes, layer.shrink)
        elif layer.reads == "picture":
            module = build(ImageConv, inputs, maps, layer.kernel, layer.stride, layer.edge)
        else:
            groups = columns if layer.reads == "own" else 1
            sizes = layer.kernel, layer.stride, layer.pad
            module = build(nn.Conv2d, groups * inputs, maps, *sizes, groups=groups)
        if "batch_norm" in layer.then:
            module.add_module(NORM, BatchNorm(maps))
        if "dropout" in layer.then:
            seeds = [derive_seed("dropout", self.seed, c, layer.name) for c in self.columns]
            module.add_module(DROPOUT, Dropout(seeds))
        # Channels last throughout: a third off the time of a step on a CPU; tensor cores want it.
        return module.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _initialize(self) -> None:
        for stage in self.stages:
            name = stage.layer.name
            deviation = stage.layer.deviation / math.sqrt(self.design.width)
            weight = self.get_parameter(f"{name}.weight")
            for column, own in zip(self.columns, weight.chunk(len(self.columns)), strict=True):
                seed = derive_seed("initial", self.seed, column, name)
                generator = torch.Generator().manual_seed(seed)
                own.copy_(torch.empty(own.shape).normal_(0.0, deviation, generator=generator))
            self.get_parameter(f"{name}.bias").fill_(stage.layer.bias)

    def create_column(self, exchange: Exchange) -> AlexNet:
        """One of the two columns here as a network of its own, in the same memory.

        An update of either's parameters is one of both; a gradient is the column's alone. The
        position is shared, too; the mode is not.

        Args:
            exchange: the link to the other column; its `index` is the column.
        """
        index = exchange.index
        column = AlexNet(
            (self.columns[index],), self.classes, exchange=exchange, seed=self.seed,
            design=self.design, initializes=False,
        ).to(self._position.device)  # fmt: skip
        with torch.no_grad():
            for name, whole in self.named_parameters():
                layer, _, kind = name.rpartition(".")
                own = nn.Parameter(whole.chunk(len(self.columns))[index], whole.requires_grad)
                setattr(column.get_submodule(layer), kind, own)
        column._position, column._has_position = self._position, True
        return column

    def set_position(self, position: int) -> None:
        """Set which samples the next forward passes compute; required before training.

        A dropout mask is a function of (seed, position, column, layer): a sample has the same mask
        in any number of replicas, in any micro-batch, and after a restart. The position is kept in
        a tensor: compiled forms of the network and CUDA graphs read the new one, and so does a
        backward pass on a GPU: compute that of a batch before the next position is set.

        Args:
            position: samples that the whole job consumed before the first row; row i is
                position + i. Below 2**63.
        """
        self._position.fill_(position)
        self._has_position = True

    def forward(self, images: Tensor, watch: Watch | None = None) -> Tensor:
        """The logits, [b, classes], of images [b, 3, side, side] (any float, mean subtracted).

        In a pair both ranks pass the same images and get the same logits.

        Args:
            images: as above.
            watch: called with (layer, tensor) for the output of each layer, before any dropout:
                float [b, maps, h, w] or [b, units] of the columns in this process.
        """
        x, outputs = images, {-1: images}
        for index, stage in enumerate(self.stages):
            layer = stage.layer
            if stage.source != index - 1:
                x = outputs[stage.source]
            module = self.get_submodule(layer.name)
            x = self._weigh(x, layer, module)
            for other in stage.added:
                x = x + outputs[other]
            for operations in self._following[layer.name]:
                x = self._compute(operations, x, module, stage)
            if watch is not None:
                watch(layer.name, x)
            if "dropout" in layer.then:
                x = self._drop(x, module)
            if index in self._kept:
                outputs[index] = x
        if self.exchange is not None:
            x = self.exchange.gather_replicated(x, "logits")
        return x[:, : self.classes]

    def _weigh(self, x: Tensor, layer: Layer, module: nn.Module) -> Tensor:
        """The weighted sums of a layer: its output before the operations that follow."""
        if layer.kind == "fc":
            x = x.flatten(1)
        if layer.reads == "both" and self.exchange is not None:
            return self.exchange.apply_layer(module, x, layer.name)
        y: Tensor = module(x)
        return y

    def _compute(
        self, operations: tuple[str, ...], x: Tensor, module: nn.Module, stage: Stage
    ) -> Tensor:
        """Compute one group of the operations that follow a layer."""
        columns, relu = len(self.columns), "relu" in operations
        window, stride = stage.window
        if "pool" in operations:
            norm = "norm" in operations
            columns = self._norm_columns
            return norm_pool(x, columns, relu, norm, window, stride, self._response)
        if "norm" in operations:
            return local_response_norm(x, self._norm_columns, relu, self._response)
        match operations[0]:
            case "scale":
                return x * self._response.k**-self._response.beta
            case "spatial_norm":
                return spatial_response_norm(x)
            case "lcn":
                return local_contrast_norm(x, columns)
            case "batch_norm":
                return module.get_submodule(NORM)(x)
            case "mean_pool":
                return F.avg_pool2d(x, window, stride, ceil_mode=True)
            case "tanh":
                return torch.tanh(x)
            case "sigmoid":
                return torch.sigmoid(x)
            case _:
                return F.relu(x)

    def _drop(self, x: Tensor, module: nn.Module) -> Tensor:
        if self.training and not self._has_position:
            raise RuntimeError("call set_position(position) before a forward pass in training mode")
        return module.get_submodule(DROPOUT)(x, self._position)

    def take_statistics(self) -> Tensor | None:
        """Statistics of batch normalization over the forward passes since the last call.

        Returns:
            float32 [2 * maps of all normalized layers], to be averaged over the replicas; None
            without batch normalization, or a forward pass in training mode before.
        """
        taken = [norm.take_statistics() for norm in self._batch_norms()]
        found = [statistics.flatten() for statistics in taken if statistics is not None]
        return torch.cat(found) if found else None

    def update_running_stats(self, statistics: Tensor | None) -> None:
        """Update the running statistics of batch normalization; call it once after each step.

        Args:
            statistics: from `take_statistics`, averaged over the replicas; None does nothing.
        """
        if statistics is None:
            return
        norms = self._batch_norms()
        parts = statistics.split([2 * norm.num_features for norm in norms])
        for norm, part in zip(norms, parts, strict=True):
            norm.update_running_stats(part.view(2, -1))

    def _batch_norms(self) -> list[BatchNorm]:
        return [module for module in self.modules() if isinstance(module, BatchNorm)]

    def split(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split tensors named and shaped like the parameters into columns: "a.conv1.weight", ...

        The pieces are contiguous; those that already were are views of the input.
        """
        return {key: own.contiguous() for key, own in self.view_columns(stacked)}

    @torch.no_grad()
    def fill(self, stacked: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """The inverse of `split`: copy `state` into the tensors of `stacked`, all or nothing.

        Raises:
            ValueError: a key is missing or unexpected or a shape differs; it names them.
        """
        wanted = dict(self.view_columns(stacked))
        wrong = [f"{key} is missing" for key in wanted if key not in state]
        wrong += [f"{key} is not of this network" for key in state if key not in wanted]
        wrong += [
            f"{key} is {list(state[key].shape)} instead of {list(own.shape)}"
            for key, own in wanted.items()
            if key in state and state[key].shape != own.shape
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"the state does not fit the network: {', '.join(wrong[:4])}{more}")
        for key, own in wanted.items():
            own.copy_(state[key])

    def view_columns(self, stacked: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the pieces of `split` as views, in any memory format."""
        for name, tensor in stacked.items():
            parts = tensor.detach().chunk(len(self.columns))
            for column, own in zip(self.columns, parts, strict=True):
                yield f"{COLUMN_NAMES[column]}.{name}", own

    def values(self) -> dict[str, Tensor]:
        """Everything that training changes: parameters, and running statistics of batch norm."""
        buffers = dict(self.named_buffers())
        running = {name: buffers[name] for name in buffers if name.endswith(RUNNING)}
        return dict(self.named_parameters()) | running

    def column_state(self) -> dict[str, Tensor]:
        """The values of the columns in this process: "a.conv1.weight", ..., "b.fc8.bias".

        Keys and shapes are the same whether the columns are in one process or in two. Batch
        normalization adds "a.conv1.norm.weight", ... and "a.conv1.norm.running_mean", ....
        """
        return self.split(self.values())

    def load_column_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the values of `column_state`; it must hold exactly the columns of this process.

        Raises:
            ValueError: a key is missing or unexpected or a shape differs; nothing is changed then.
        """
        self.fill(self.values(), state)
