"""Calls that would make a host wait for a GPU, counted on a CPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    "__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose",
    "cpu", "cuda", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist",
    "unique",
}  # fmt: skip
"""Functions that read a value of a tensor, or copy it and wait."""


class HostReads(TorchFunctionMode):
    """Counts values that are read, and copies between devices that block, by where they are made.

    It sees this thread's calls on tensors; `copy_` is not counted, as on a CPU nothing tells a copy
    within a device, which does not block, from one to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        """Number of calls of each "function in module.caller"."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type],
        args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in READS or _is_blocking_copy(name, args, kwargs) or _is_mask(name, args):
            self.seen[f"{name} in {_find_caller(sys._getframe(1))}"] += 1
        return function(*args, **kwargs)


def _is_blocking_copy(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name in ("tensor", "as_tensor"):
        return kwargs.get("device") is not None
    where = any(isinstance(one, torch.device | str | Tensor) for one in args[1:])
    return name == "to" and (where or "device" in kwargs) and not kwargs.get("non_blocking")


def _is_mask(name: str, args: Sequence[Any]) -> bool:
    """Return whether a tensor is indexed by a mask: the size of the result must be known."""
    index = args[1] if name in ("__getitem__", "__setitem__") else ()
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in parts)


def _find_caller(frame: FrameType | None) -> str:
    """Return module and function of the innermost frame outside torch."""
    while frame and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}" if frame else "?"
