"""What the tests of the normalisations share: activations, and the formula as a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.norm import native

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def maps(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Activations as large as real ones, so that the sum matters beside k = 2."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 200).to(dtype)


def by_hand(x: Tensor, columns: int = 1) -> Tensor:
    """Section 3.3 of the paper with alpha/n, one map after the other; autograd can follow."""
    found = []
    for own in x.chunk(columns, 1):
        for i in range(own.shape[1]):
            near = own[:, max(0, i - 2) : i + 3]
            found.append(own[:, i] / (2.0 + 1e-4 / 5 * near.square().sum(1)) ** 0.75)
    return torch.stack(found, 1)


@pytest.fixture(name="form", params=["native", "reference"], autouse=True)
def each_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compiled kernels, or torch's operations."""
    if request.param == "reference":
        monkeypatch.setattr(native, "is_supported", lambda x: False)
    elif not native.is_supported(torch.empty(0)):
        pytest.skip(native.describe())
    return str(request.param)
