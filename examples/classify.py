"""Classify an image with an exported network: torch, safetensors and Pillow, no Duet.

python -m cluster.export RUN --out weights.safetensors
python examples/classify.py weights.safetensors image.jpg
"""

import json
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open

with safe_open(sys.argv[1], "pt") as file:
    w = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    about = {"image_size": 224} | {
        key: json.loads(value)
        for key, value in file.metadata().items()
        if key in ("classes", "layers", "first", "image_size")
    }


def contrast(x, columns):
    """Local contrast normalisation, each column's maps by themselves."""
    x = x.unflatten(1, (columns, -1))
    far = (torch.arange(x.shape[-1])[:, None] - torch.arange(x.shape[-1])).abs()
    blur = torch.exp(-0.5 * (far / 2.25) ** 2) * (far < 5)
    blur = blur / blur.sum(1, keepdim=True)
    x = x - blur @ x.mean(2, keepdim=True) @ blur.T
    sigma = (blur @ (x * x).mean(2, keepdim=True) @ blur.T).clamp_min(1e-8).sqrt()
    return (x / torch.maximum(sigma, sigma.mean((3, 4), keepdim=True))).flatten(1, 2)


follow = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "pool": lambda x, side, stride: F.max_pool2d(x, side, stride, ceil_mode=True),
    "norm": lambda x, n, size=5, alpha=1e-4, beta=0.75, k=2.0: F.local_response_norm(
        # each of n columns by itself
        x.unflatten(1, (n, -1)).flatten(0, 1),
        size,
        alpha,
        beta,
        k,
    ).view_as(x),
    "multiply": lambda x, factor: x * factor,
    "mean_pool": lambda x, side, stride: F.avg_pool2d(x, side, stride, ceil_mode=True),
    "lcn": contrast,
    "scale": lambda x, name: (
        x * w[f"{name}.scale"][:, None, None] + w[f"{name}.shift"][:, None, None]
    ),
    "edge": lambda x, zeros: F.pad(x, (0, zeros, 0, zeros)),
    "shrink": F.avg_pool2d,
    "spatial_norm": lambda x: x / (1 + 0.001 * F.avg_pool2d(x * x, 5, 1, 2)) ** 0.75,
}
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
side = about["image_size"]  # the middle of 256 pixels; networks for CIFAR-10 read all of 32
stored = max(side, 256) if side > 32 else 32
edge = (stored - side) // 2
image = ImageOps.fit(image, (stored, stored)).crop((edge, edge, edge + side, edge + side))
x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
x = (x.permute(2, 0, 1) - w["mean"])[None]
seen = {"picture": x}
first, size = about["first"]
x = follow[first](x, size)
for name, how, then in about["layers"]:
    x = seen[how.pop("input")] if "input" in how else x
    if "first" in how:
        first, size = how.pop("first")
        x = follow[first](x, size)
    adds = how.pop("adds", ())
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    if "stride" in how:
        x = F.conv2d(x, weight, bias, **how)
    elif "local" in how:  # filters of their own at each pixel
        x = F.unfold(x, weight.shape[2], padding=how["local"])
        x = x.view(how["groups"], -1, *weight.shape[4:])
        filters = weight.flatten(1, 3).unflatten(0, (how["groups"], -1))
        x = torch.einsum("gihw,goihw->gohw", x, filters).flatten(0, 1)[None] + bias
    else:
        groups = how.get("groups", 1)
        own = weight.unflatten(0, (groups, -1))
        x = (own @ x.reshape(groups, -1, 1)).view(1, -1) + bias
    for other, factor in adds:
        x = x + factor * seen[other]
    for operation, *arguments in then:
        x = follow[operation](x, *arguments)
    seen[name] = x
for probability, index in zip(*x[0].softmax(0).topk(min(5, len(about["classes"]))), strict=True):
    print(f"{probability:6.1%}  {about['classes'][index]}")
