"""Caffe's copy of the network, written out in torch; its files, written byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Layers = dict[str, tuple[np.ndarray, np.ndarray]]
CAFFE_MEAN = (104.00698793, 116.66876762, 122.67891434)
"""Blue, green, red."""
OPERATIONS = {
    "conv1": ("ReLU", "LRN", "Pooling"), "conv2": ("ReLU", "LRN", "Pooling"), "conv3": ("ReLU",),
    "conv4": ("ReLU",), "conv5": ("ReLU", "Pooling"), "fc6": ("ReLU", "Dropout"),
    "fc7": ("ReLU", "Dropout"), "fc8": ("Softmax",),
}  # fmt: skip
OLD = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18, "Dropout": 6,
       "Softmax": 20}  # fmt: skip
"""Numbers of the types in files of before 2015."""


def random_layers(classes: int, width: float = 0.125, seed: int = 0) -> Layers:
    """Return bvlc_alexnet's layers with random weights, with which normalization matters."""
    generator = np.random.default_rng(seed)
    maps = [round(width * count) for count in (96, 256, 384, 384, 256, 4096, 4096)]
    a, b, c, d, e, f, g = maps
    shapes = {
        "conv1": (a, 3, 11, 11), "conv2": (b, a // 2, 5, 5), "conv3": (c, b, 3, 3),
        "conv4": (d, c // 2, 3, 3), "conv5": (e, d // 2, 3, 3), "fc6": (f, 36 * e), "fc7": (g, f),
        "fc8": (classes, g),
    }  # fmt: skip
    return {
        name: (
            generator.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5),
            generator.standard_normal(shape[0], np.float32) * np.float32(10),
        )
        for name, shape in shapes.items()
    }


def caffe_logits(
    layers: Layers,
    images: Tensor,
    k: float = 1.0,
    local_size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> Tensor:
    """Logits of bvlc_alexnet (deploy.prototxt): [b, 3, 227, 227], blue first, less the mean."""
    w = {name: [torch.tensor(part) for part in pair] for name, pair in layers.items()}

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def norm(x: Tensor) -> Tensor:
        return F.local_response_norm(x, local_size, alpha, beta, k)

    x = pool(norm(F.relu(F.conv2d(images, *w["conv1"], stride=4))))
    x = pool(norm(F.relu(F.conv2d(x, *w["conv2"], padding=2, groups=2))))
    x = F.relu(F.conv2d(x, *w["conv3"], padding=1))
    x = F.relu(F.conv2d(x, *w["conv4"], padding=1, groups=2))
    x = pool(F.relu(F.conv2d(x, *w["conv5"], padding=1, groups=2))).flatten(1)
    return F.linear(F.relu(F.linear(F.relu(F.linear(x, *w["fc6"])), *w["fc7"])), *w["fc8"])


def make_caffemodel(
    layers: Layers,
    operations: Mapping[str, tuple[str, ...]] = OPERATIONS,
    old: bool = False,
    lrn: Mapping[str, float] | None = None,
) -> bytes:
    """Return a NetParameter of caffe.proto on the wire.

    Args:
        layers: weights and biases.
        operations: types of the layers after each.
        old: as files of before 2015: V1LayerParameter, with four sizes for each array.
        lrn: fields of LRNParameter that are not bvlc_alexnet's.
    """
    found = [_bytes(1, b"AlexNet"), _layer("data", "Data", old)]
    for name, pair in layers.items():
        kind = "Convolution" if pair[0].ndim == 4 else "InnerProduct"
        blobs = b"".join(_bytes(6 if old else 7, _blob(array, old)) for array in pair)
        found.append(_layer(name, kind, old, blobs))
        for number, word in enumerate(operations[name]):
            constants = b""
            if word == "LRN":
                given = {"local_size": 5, "alpha": 1e-4, "beta": 0.75} | dict(lrn or {})
                constants = _bytes(18 if old else 118, _lrn(given))
            found.append(_layer(f"{name}_{number}", word, old, constants))
    return b"".join(found)


def _layer(name: str, kind: str, old: bool, content: bytes = b"") -> bytes:
    if old:
        type_ = _number(5, OLD.get(kind, 5))
        return _bytes(2, _bytes(3, name.encode()) + _bytes(4, name.encode()) + type_ + content)
    about = _bytes(1, name.encode()) + _bytes(2, kind.encode()) + _bytes(4, name.encode())
    return _bytes(100, about + content)


def _blob(array: np.ndarray, old: bool) -> bytes:
    sizes = array.shape
    if old:
        four = (1,) * (4 - len(sizes)) + sizes
        shape = b"".join(_number(field, size) for field, size in enumerate(four, 1))
    else:
        shape = _bytes(7, _bytes(1, b"".join(map(_varint, sizes))))
    return _bytes(5, array.astype("<f4").tobytes()) + shape


def _lrn(given: Mapping[str, float]) -> bytes:
    numbers = {"alpha": 2, "beta": 3, "k": 5}
    floats = b"".join(
        _varint(numbers[name] << 3 | 5) + struct.pack("<f", value)
        for name, value in given.items()
        if name in numbers
    )
    return _number(1, int(given["local_size"])) + floats


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
