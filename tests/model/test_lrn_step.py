"""Error of a step in bfloat16, or without compiled kernels, against the same step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet
from model.norm import native

Step = tuple[Tensor, dict[str, Tensor]]


def step(dtype: torch.dtype) -> Step:
    """Logits and gradients of a fresh narrow network, in float64."""
    net = AlexNet(width=0.25, classes=100)
    net.set_position(0)
    generator = torch.Generator().manual_seed(1)
    images = 60 * torch.randn(8, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 100, (8,), generator=generator)
    if dtype == torch.float64:
        net, images = net.double(), images.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = net(images)
    F.cross_entropy(logits.double(), labels).backward()
    gradients = {name: p.grad.double() for name, p in net.named_parameters() if p.grad is not None}
    return logits.detach().double(), gradients


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Length of the difference over that of the second."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def exact() -> Step:
    """The step in float64."""
    return step(torch.float64)


@pytest.mark.parametrize("form", ["native", "reference"])
def test_float32_is_exact_but_for_rounding(
    exact: Step, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "reference":
        monkeypatch.setattr(native, "prepare_kernels", lambda x: False)
    logits, gradients = step(torch.float32)
    assert apart(logits, exact[0]) < 1e-5
    assert gradients.keys() == exact[1].keys()
    for name, gradient in gradients.items():
        # A maximum that rounding moves to its neighbour moves a gradient with it: some are allowed.
        assert apart(gradient, exact[1][name]) < 2e-3, name


@pytest.mark.parametrize("form", ["native", "reference"])
def test_bfloat16_stays_near(exact: Step, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "reference":
        monkeypatch.setattr(native, "prepare_kernels", lambda x: False)
    logits, gradients = step(torch.bfloat16)
    assert apart(logits, exact[0]) < 0.01
    for name, gradient in gradients.items():
        # Errors add up from fc8 (half a percent) down to conv1 (a quarter: each pooling on the
        # way chooses among numbers of 8 bits); they are noise, and the direction is the same.
        assert apart(gradient, exact[1][name]) < (0.02 if "fc8" in name else 0.4), name
        cosine = F.cosine_similarity(gradient.flatten(), exact[1][name].flatten(), dim=0)
        assert cosine > 0.93, name
