"""Classify a picture with an exported network: torch, safetensors and Pillow, no Duet.

python -m cluster.export RUN --out weights.safetensors
python docs/classify.py weights.safetensors picture.jpg
"""

import json
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open

with safe_open(sys.argv[1], "pt") as file:
    w = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    about = {key: json.loads(file.metadata()[key]) for key in ("classes", "columns", "layers")}
follow = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "pool 3/2": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "pool 2/2": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "norm": lambda x: torch.cat(  # each column normalises its own maps
        [F.local_response_norm(own, 5, 1e-4, 0.75, 2.0) for own in x.chunk(about["columns"], 1)], 1
    ),
    "spatial_norm": lambda x: x / (1 + 0.001 * F.avg_pool2d(x * x, 5, 1, 2)) ** 0.75,
}
picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
picture = ImageOps.fit(picture, (256, 256)).crop((16, 16, 240, 240))
x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(224, 224, 3)
x = F.pad((x.permute(2, 0, 1) - w["mean"])[None], (0, 3, 0, 3))
for name, layer in about["layers"].items():
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    if name.startswith("conv"):
        x = F.conv2d(x, weight, bias, layer["stride"], layer["pad"], groups=layer["groups"])
    else:
        x = F.linear(x.flatten(1), weight, bias)
    for operation in layer["then"]:
        x = follow[operation](x)
p = x[0].softmax(0)
for probability, index in zip(*p.topk(min(5, len(p))), strict=True):
    print(f"{probability:6.1%}  {about['classes'][index]}")
