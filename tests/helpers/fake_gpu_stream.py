"""A stream on a GPU without hardware: DALI decodes on the CPU, tensors lie in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import types
from nvidia.dali.backend import TensorGPU
from nvidia.dali.pipeline import Pipeline

from pipeline.stream import decode, operators
from pipeline.stream.ledger import writer
from tests.helpers.fake_cuda import FakeDevice

GPU = torch.device("cuda", 0)


class FakeStream:
    """The current stream of a fake GPU."""

    cuda_stream = 7
    device: FakeDevice
    waits = 0

    def synchronize(self) -> None:
        """Have the host wait for the work of this stream."""
        self.waits += 1
        self.device.synchronize()


class GpuTensor(torch.Tensor):
    """Tensor that says it is on a GPU, and refuses to be computed with one that is not."""

    is_cuda = True  # type: ignore[assignment]
    device = GPU  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for one in args if function is not torch.Tensor.copy_ else ():
            if isinstance(one, torch.Tensor) and not isinstance(one, cls) and one.dim():
                raise RuntimeError("expected all tensors to be on the same device")
        return super().__torch_function__(function, kinds, args, kwargs or {})


class DaliPixels(TensorGPU):  # type: ignore[misc]
    """Pixels that seem to be on a GPU: float16, in memory of DALI's."""

    values: np.ndarray
    gpu: FakeGpu
    dtype = types.FLOAT16

    def shape(self) -> list[int]:
        return list(self.values.shape)

    def copy_to_external(self, target: Any, stream: Any = None, non_blocking: bool = False) -> None:
        self.gpu.copies.append((target.value, stream.value if stream else None, non_blocking))
        ctypes.memmove(target.value, self.values.ctypes.data, self.values.nbytes)
        self.gpu.device.launch(1e-5)
        if not non_blocking:
            self.gpu.device.synchronize()
            self.gpu.waits.append("copy_to_external")


class DaliOutput:
    """List of tensors that seems to come from a DALI pipeline on a GPU."""

    def __init__(self, pixels: np.ndarray, gpu: FakeGpu) -> None:
        self._made = DaliPixels.__new__(DaliPixels)  # its __init__ wants a GPU
        self._made.values, self._made.gpu = pixels, gpu

    def as_tensor(self) -> DaliPixels:
        return self._made


class FakeGpu:
    """The GPU of a test: what was copied to it, what the host waited for."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.stream = FakeStream()
        self.stream.device = self.device
        self.copies: list[tuple[int, int | None, bool]] = []
        """Address, stream and non-blocking of each copy out of DALI's memory."""
        self.waits: list[str] = []
        """Copies that made the host wait."""
        self.pinned = 0
        """Buffers of page-locked memory that were made."""
        self.trials = 0
        """Pipelines without a GPU that were built."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have torch, DALI and the stream's code believe that it is there."""
        real = decode.make_pixels
        patch.setattr(operators, "Pipeline", partial(FakePipeline, self))
        patch.setattr(
            decode, "make_pixels",
            lambda config, encoding, **nodes: real(
                replace(config, device="cpu"), encoding, **nodes
            ),
        )  # fmt: skip
        patch.setattr(torch, "empty", partial(self._empty, torch.empty))
        patch.setattr(torch.Tensor, "pin_memory", _pin)
        patch.setattr(torch.Tensor, "to", self._make_to(torch.Tensor.to))
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: self.stream,
            "synchronize": lambda device=None: self.waits.append("synchronize"),
            "Event": self.device.make_event,
        }.items():
            patch.setattr(torch.cuda, name, value)

    def _empty(
        self, real: Any, *shape: Any, device: Any = None, pin_memory: bool = False, **rest: Any
    ) -> torch.Tensor:
        """Stand in for `torch.empty`."""
        self.pinned += pin_memory
        made = real(*shape, **rest)
        return made.as_subclass(GpuTensor) if device in (GPU, "cuda") else made

    def _make_to(self, real: Any) -> Any:
        """Return what stands in for `Tensor.to`."""

        def to(tensor: torch.Tensor, *args: Any, non_blocking: bool = False, **rest: Any) -> Any:
            where = [one for one in args if isinstance(one, str | torch.device)]
            if not where:
                return real(tensor, *args, **rest)
            if not non_blocking or not (tensor.is_cuda or getattr(tensor, "is_locked", False)):
                self.device.synchronize()
                self.waits.append("to")
            dtypes = [one for one in args if isinstance(one, torch.dtype)]
            copy = real(on_host(tensor), *dtypes, copy=True)
            return copy.as_subclass(GpuTensor) if torch.device(where[0]).type == "cuda" else copy

        return to


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    """Stand in for `Tensor.pin_memory`."""
    if tensor.is_cuda:
        raise RuntimeError("only dense CPU tensors can be pinned")
    copy = tensor.clone()
    copy.is_locked = True  # type: ignore[attr-defined]
    return copy


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the fake GPU as the host memory that it is."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


class FakePipeline(Pipeline):  # type: ignore[misc]
    """Pipeline on the CPU whose output looks as if it were on a GPU."""

    def __init__(
        self, gpu: FakeGpu, *sizes: int | None, device_id: int | None = None, **rest: Any
    ) -> None:
        super().__init__(*sizes, device_id=None, **rest)
        self._gpu, self._number = gpu, device_id
        gpu.trials += device_id is None

    @property
    def device_id(self) -> int | None:
        return self._number

    def run(self, stream: Any = None, /) -> Any:
        if self._number is None:
            return super().run()
        assert stream is self._gpu.stream, "without a stream DALI has the host wait"
        (output,) = super().run()
        return (DaliOutput(output.as_array().astype(np.float16), self._gpu),)


@pytest.fixture(name="fake_gpu")
def one_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A GPU that is none; streams with `device="gpu"` run on it."""
    gpu = FakeGpu()
    with monkeypatch.context() as patch:
        gpu.install(patch)
        writer._weights.cache_clear()
        yield gpu
        writer._weights.cache_clear()
