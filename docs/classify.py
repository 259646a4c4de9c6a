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
    classes = json.loads(file.metadata()["classes"])
picture = ImageOps.fit(Image.open(sys.argv[2]).convert("RGB"), (256, 256)).crop((16, 16, 240, 240))
x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(224, 224, 3)
x = F.pad((x.permute(2, 0, 1) - w["mean"])[None], (0, 3, 0, 3))
for n, how in enumerate([(4, 0, 1), (1, 2, 2), (1, 1, 1), (1, 1, 2), (1, 1, 2)], start=1):
    stride, pad, groups = how
    x = F.conv2d(x, w[f"conv{n}.weight"], w[f"conv{n}.bias"], stride, pad, groups=groups).relu()
    if n <= 2:  # each column normalises its own maps
        columns = [F.local_response_norm(half, 5, 1e-4, 0.75, 2.0) for half in x.chunk(2, 1)]
        x = torch.cat(columns, 1)
    x = x if n in (3, 4) else F.max_pool2d(x, 3, 2)
x = F.linear(x.flatten(1), w["fc6.weight"], w["fc6.bias"]).relu()
x = F.linear(x, w["fc7.weight"], w["fc7.bias"]).relu()
p = F.linear(x, w["fc8.weight"], w["fc8.bias"])[0].softmax(0)
for probability, index in zip(*p.topk(min(5, len(p))), strict=True):
    print(f"{probability:6.1%}  {classes[index]}")
