"""Stand-in for a CUDA graph on a CPU: it records operations, not the program that launched them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    """Records every operation on tensors, those of backward passes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Sequence[type],
        args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result


class OperationGraph:
    """Graph that repeats the recorded operations on the very tensors that they had.

    As in a CUDA graph, what Python computed is part of the recording: numbers, shapes, branches. So
    a position or a rate that is no tensor stays what it was. Work outside torch's operations is not
    seen (the CPU kernels of `model.norm`: patch `native.prepare_kernels` to return False).
    """

    replays = 0

    def __init__(self, before: OperationGraph | None = None) -> None:
        self._recorder = _Recorder()

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def capture(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        with self._recorder:
            written = work()
        for tensor in written:
            tensor.detach().fill_(torch.nan)  # a capture computes nothing
        return written

    @torch.no_grad()
    def replay(self) -> None:
        OperationGraph.replays += 1
        for operation, args, kwargs, result in self._recorder.operations:
            again = operation(*args, **kwargs)
            for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and not _share_memory(kept, new):
                    kept.copy_(new)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether both lie in the same memory, as views and what is changed in place do."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
