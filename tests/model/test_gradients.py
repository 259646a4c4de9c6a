"""Every layer of every design against numeric gradients, as the original's --check-grads did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet
from model.architecture import Design

SOURCE = Design(relu_first=False, spatial_norm=True)
DESIGNS = {
    "paper": Design(),
    "source2012": SOURCE,
    "one_gpu": replace(SOURCE, columns=1),
    "pool2": replace(SOURCE, pool="2/2"),
    "tanh": replace(SOURCE, activation="tanh"),
    "no_lrn": Design(norm="none"),
    "no_conv4": Design(without="conv4"),
    "spatial": Design(norm="spatial"),
    "lcn": Design(norm="lcn"),
    "batch": Design(norm="batch"),
    "conv6": Design(conv6=True, dropout=False),
    "four": Design(net="four", norm="none", columns=1),
    "four, tanh, two columns": Design(net="four", activation="tanh"),
}


def loss_of(net: AlexNet, images: Tensor, labels: Tensor) -> Tensor:
    net.set_position(3)  # the same dropout masks each time
    return F.cross_entropy(net(images), labels)


@pytest.mark.parametrize("name", DESIGNS)
def test_gradients_of_every_layer_are_the_slopes_of_the_loss(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    # Two images where they are normalized together; and once more, so that gradients are summed.
    count = 2 if name in ("paper", "batch") else 1
    images = torch.randn(count, 3, 224, 224, generator=generator, dtype=torch.float64) * 60
    labels = torch.tensor([1, 4])[:count]
    net = AlexNet(classes=5, design=replace(DESIGNS[name], width=1 / 16), seed=1).double().train()
    loss_of(net, images, labels).backward()
    found = {}
    for key, value in net.named_parameters():
        assert value.grad is not None
        # A step along the gradient: no other direction has a slope as large beside the rounding.
        size = float(value.grad.norm())
        assert size > 0, key
        step = 1e-7 * (1 + float(value.detach().norm()))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * step * value.grad / size
                ends.append(float(loss_of(net, images, labels)))
                value -= sign * step * value.grad / size
        found[key] = ((ends[0] - ends[1]) / (2 * step)) / size
    assert len(found) == 2 * len(net.stages) + (4 if name == "batch" else 0)
    wrong = {key: ratio for key, ratio in found.items() if abs(ratio - 1) > 1e-4}
    assert wrong == {}


def test_the_image_reaches_the_output_of_a_fresh_network() -> None:
    """Fact sheet, section 3: at pool5 activations vary by about .27 of their mean from image to
    image (.255 over 128 images of ImageNet, here), and by .03 with the paper's .01 throughout.
    """
    generator = torch.Generator().manual_seed(0)
    # Random images with as much of coarse structure as of fine, as photographs have.
    noise = sum(
        F.interpolate(torch.randn(8, 3, n, n, generator=generator), size=(224, 224), mode="bicubic")
        for n in (2, 6, 18, 54)
    )
    images = noise * 40
    variation = {}
    for deviation in ("source", "paper"):
        net = AlexNet(design=Design()).eval()
        if deviation == "paper":
            with torch.no_grad():
                for layer in ("conv3", "conv4", "conv5"):
                    net.get_parameter(f"{layer}.weight").mul_(0.01 / 0.03)
        seen: dict[str, Tensor] = {}
        with torch.no_grad():
            net(images, lambda name, x, seen=seen: seen.update({name: x.clone()}))
        pool5 = seen["conv5"]
        assert pool5.shape[1:] == (256, 6, 6)
        variation[deviation] = float(pool5.std(0).mean() / pool5.mean())
    assert variation["source"] == pytest.approx(0.27, abs=0.1)
    assert variation["paper"] < 0.06
