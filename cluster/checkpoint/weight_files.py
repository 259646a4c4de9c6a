"""Reads weights that other programs have saved: Caffe's .caffemodel, .npz and safetensors.

A file becomes a list of layers from the image to the logits, each with the array of its weights and
that of its biases. A .caffemodel has them in order; in the others the layers are the names before
`.weight` and `.bias` (or `.0` and `.1`, Caffe's blobs), convolutions first, then by name, where 10
comes after 9.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from pipeline.tools.errors import UsageError, refuse_forbidden, summarize_error

Floats = npt.NDArray[np.float32]
PARTS = {"weight": "weight", "0": "weight", "bias": "bias", "1": "bias"}
"""End of an array's name -> what it holds."""
NO_LAYERS = ("mean",)
"""Arrays that `cluster.export` writes beside those of layers."""
AFTER = {"ReLU": "relu", "TanH": "tanh", "LRN": "norm", "Pooling": "pool"}
"""Caffe's layers without weights -> operations of `model.architecture.Layer`; others change nothing
in a test."""
OLD_TYPES = {4: "Convolution", 14: "InnerProduct", 15: "LRN", 17: "Pooling", 18: "ReLU", 23: "TanH"}
"""Numbers of `V1LayerParameter.LayerType` (caffe.proto) -> names of today."""
DELIVERED = "fetch it again, or save it anew"


@dataclass(frozen=True, kw_only=True)
class LrnConstants:
    """Constants of a local response normalization; alpha is divided by the size."""

    k: float = 1.0
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75


@dataclass(kw_only=True)
class SavedLayer:
    """A layer with weights, as a file has it."""

    name: str
    weight: Floats
    bias: Floats
    then: list[str] = field(default_factory=list)
    """Operations that follow, as in `model.architecture.Layer`, where the file says."""
    lrn: LrnConstants | None = None
    """Constants of its normalization, where the file says."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """Content of a file of weights."""

    path: Path
    layers: tuple[SavedLayer, ...]
    """Layers from the image to the logits."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Texts that a safetensors file carries; `cluster.export` describes the network in them."""
    has_operations: bool = False
    """True if the layers say what follows them."""


def read_weights(path: Path) -> WeightFile:
    """Read a file of weights by its ending.

    Raises:
        UsageError: there is no such file, it is of another kind, damaged, or holds no layers.
        SetupError: it may not be read.
    """
    readers = {
        ".caffemodel": _read_caffemodel,
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
    }
    try:
        path.stat()
        if path.suffix not in readers:
            raise UsageError(
                f"{path} is not {', '.join(readers)}; save the state dict of another as safetensors"
            )
        found = readers[path.suffix](path)
    except OSError as error:
        refuse_forbidden(error)
        raise UsageError(f"{path} cannot be read ({summarize_error(error)}); mend FILE") from error
    for layer in found.layers:
        for part, array in (("weight", layer.weight), ("bias", layer.bias)):
            if not np.isfinite(array).all():
                raise UsageError(
                    f"{path}: {layer.name}.{part} has values that are not finite; {DELIVERED}"
                )
    return found


def _read_npz(path: Path) -> WeightFile:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise _damaged(path, summarize_error(error)) from error
    return WeightFile(path=path, layers=_join_arrays(path, arrays))


def _read_safetensors(path: Path) -> WeightFile:
    import torch  # here: bfloat16 is no type of numpy's

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, summarize_error(error)) from error
    arrays = {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }
    return WeightFile(path=path, layers=_join_arrays(path, arrays), header=header)


def _join_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[SavedLayer, ...]:
    """Return the layers of named arrays, convolutions first, then in the order of their names."""
    pairs: dict[str, dict[str, Floats]] = {}
    for name, array in arrays.items():
        layer, _, part = name.rpartition(".")
        if name in NO_LAYERS:
            continue
        if not layer or part not in PARTS or array.dtype.kind != "f":
            raise UsageError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}, neither weights nor biases; "
                "name the arrays LAYER.weight and LAYER.bias"
            )
        pairs.setdefault(layer, {})[PARTS[part]] = array.astype(np.float32)
    for layer, pair in pairs.items():
        if len(pair) < 2:
            raise UsageError(
                f"{path}: {layer} has only {min(pair)}; every layer needs weight and bias"
            )
    if not pairs:
        raise UsageError(f"{path} holds no weights; name a file that has them")
    names = sorted(pairs, key=lambda name: (pairs[name]["weight"].ndim == 2, _natural_key(name)))
    return tuple(
        SavedLayer(name=name, weight=pairs[name]["weight"], bias=pairs[name]["bias"])
        for name in names
    )


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key by which `features.10` comes after `features.8`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is damaged ({why}); {DELIVERED}")


def _read_caffemodel(path: Path) -> WeightFile:
    from google.protobuf.message import DecodeError  # here: no other command needs it

    net = _make_net_class()()
    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise _damaged(path, summarize_error(error)) from error
    layers: list[SavedLayer] = []
    saved = [(layer.type, layer) for layer in net.layer]
    saved += [(OLD_TYPES.get(layer.type, ""), layer) for layer in net.layers]
    for kind, layer in saved:
        if layer.blobs:
            layers.append(_read_layer(path, kind, layer))
        elif layers and kind in AFTER:
            layers[-1].then.append(AFTER[kind])
            if kind == "LRN":
                p = layer.lrn_param
                layers[-1].lrn = LrnConstants(k=p.k, size=p.local_size, alpha=p.alpha, beta=p.beta)
    if not layers:
        raise _damaged(path, "no layer in it has weights")
    has_operations = any(layer.then for layer in layers)
    return WeightFile(path=path, layers=tuple(layers), has_operations=has_operations)


def _read_layer(path: Path, kind: str, layer: Any) -> SavedLayer:
    if kind not in ("Convolution", "InnerProduct"):
        raise UsageError(
            f"{path}: layer {layer.name} is a {kind or 'layer of an unknown type'} with weights, "
            "which this network has not; name Caffe's bvlc_alexnet"
        )
    if len(layer.blobs) != 2:
        raise UsageError(
            f"{path}: layer {layer.name} has {len(layer.blobs)} arrays; it needs weight and bias"
        )
    weight, bias = (_read_blob(path, layer.name, blob) for blob in layer.blobs)
    return SavedLayer(name=layer.name, weight=weight, bias=bias)


def _read_blob(path: Path, layer: str, blob: Any) -> Floats:
    """Return an array; older files have four sizes for each, of which the first ones are 1."""
    sizes = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    while len(sizes) > 1 and sizes[0] == 1:
        del sizes[0]
    data, dtype = (blob.data, "<f4") if blob.data else (blob.double_data, "<f8")
    content = b"".join(data)
    found, wanted = len(content) / np.dtype(dtype).itemsize, math.prod(sizes)
    if found != wanted:
        shape = "x".join(map(str, sizes))
        raise _damaged(path, f"layer {layer} holds {found:,.0f} numbers for {shape}")
    return np.frombuffer(content, dtype).reshape(sizes).astype(np.float32)


_FIELDS = {
    "Shape": ("dim:1:int64*",),
    "Blob": ("shape:7:Shape", "data:5:bytes*", "double_data:8:bytes*", "num:1:int64",
             "channels:2:int64", "height:3:int64", "width:4:int64"),
    "Lrn": ("local_size:1:uint32=5", "alpha:2:float=1", "beta:3:float=0.75", "k:5:float=1"),
    "Layer": ("name:1:string", "type:2:string", "blobs:7:Blob*", "lrn_param:118:Lrn"),
    "OldLayer": ("name:4:string", "type:5:int32", "blobs:6:Blob*", "lrn_param:18:Lrn"),
    "Net": ("layer:100:Layer*", "layers:2:OldLayer*"),
}  # fmt: skip
"""Fields of caffe.proto that are read: message -> name, number and type of each; * is repeated.
Packed floats are declared as the bytes that they are on the wire: 60 million Python floats would
take minutes."""


@lru_cache(maxsize=1)
def _make_net_class() -> Any:
    """Return the message class of a .caffemodel, made from `_FIELDS` without a compiled schema."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="caffemodel.proto", package="caffemodel")
    for message, specs in _FIELDS.items():
        kind = file.message_type.add(name=message)
        for spec in specs:
            _add_field(kind, *spec.split(":"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffemodel.Net"))


def _add_field(message: Any, name: str, number: str, words: str) -> None:
    kind, _, default = words.rstrip("*").partition("=")
    field = message.field.add(name=name, number=int(number))
    field.label = field.LABEL_REPEATED if words.endswith("*") else field.LABEL_OPTIONAL
    if kind in _FIELDS:
        field.type, field.type_name = field.TYPE_MESSAGE, f".caffemodel.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
    if default:
        field.default_value = default
