"""Exports a trained network as one safetensors file, both columns merged, for plain PyTorch.

    python -m cluster.export RUN [--out FILE] [--best] [--checkpoint STEP] [--data DATA] [--json]

The file has the tensors of the `torch.nn` layers of the whole network, `conv1.weight` ...
`fc8.bias` (convolutions 2, 4 and 5 have groups=2), and `mean`, to be subtracted from an image:
[3, 1, 1], or [3, 224, 224] where the network was trained so. The paper halves the outputs of fc6
and fc7 at test time (section 4.2); here the weights of fc7 and fc8 are halved instead, which is
exact: the network runs without dropout, or with PyTorch's. Batch normalisation in a test is a
factor and a shift for each map: `conv1.scale`, `conv1.shift`.

The header lists the operations before the first layer and after each, so that
examples/classify.py runs any design, ablations too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cluster.checkpoint.format import Checkpoint, choose_checkpoint, load_checkpoint
from cluster.cli.options import ExportOptions
from cluster.config import Config, read_run_config
from cluster.run.console import print_warning
from cluster.run.folder import CONFIG
from model.alexnet import AlexNet
from model.architecture import Design, build_stages
from model.layer_table import Layer
from model.norm import BatchNorm
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, identity
from pipeline.dataset.record import read_segments
from pipeline.remote.dataset import fetch_metadata, locate_dataset
from pipeline.stream.normalization import crop_mean_image
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError
from pipeline.tools.errors import run as run_command
from pipeline.tools.files import atomic_write


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(ExportOptions, argv, "python -m cluster.export")
    config, trained_on = read_run_config(options.run / CONFIG)
    found = choose_checkpoint(
        options.run, config.store, print_warning, options.checkpoint, options.best
    )
    tensors = merge_columns(config, found)
    tensors["mean"] = read_mean(options, config, found.table.get("channel_mean"), trained_on)
    out = options.out or options.run / "weights.safetensors"
    try:
        with atomic_write(out) as file:
            file.write(save(tensors, metadata=describe_checkpoint(config, found)))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {out}: {reason}; name another file by --out") from error
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "mean")
    human = sys.stderr if options.json else sys.stdout
    human.write(
        f"step {found.mark.step}: {parameters:,} parameters, "
        f"{len(found.classes)} classes -> {out}\n"
    )
    if options.json:
        result = {"out": str(out), "step": found.mark.step, "parameters": parameters}
        sys.stdout.write(json.dumps(result | {"top1_error": found.error}) + "\n")
    return 0


def merge_columns(config: Config, found: Checkpoint) -> dict[str, Tensor]:
    """Return the float32 parameters of the whole network, as `torch.nn` layers take them."""
    classes, design = len(found.classes), config.design
    net = AlexNet(columns=tuple(range(design.columns)), classes=classes, design=design)
    load_checkpoint(found.path, net)
    tensors = {name: p.detach().contiguous() for name, p in net.named_parameters()}
    layers = design.rows()
    for name in ("weight", "bias"):  # an odd number of classes is made even
        last = f"{layers[-1].name}.{name}"
        tensors[last] = tensors[last][:classes].contiguous()
    for stage in net.stages:
        if stage.source >= 0 and "dropout" in layers[stage.source].then:
            key = f"{stage.layer.name}.weight"
            tensors[key] = tensors[key] * 0.5
    for name, module in net.named_modules():
        if isinstance(module, BatchNorm):
            layer_name = name.partition(".")[0]
            del tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            scale = module.weight / (module.running_var + module.eps).sqrt()
            tensors[f"{layer_name}.scale"] = scale.detach()
            tensors[f"{layer_name}.shift"] = (module.bias - module.running_mean * scale).detach()
    return tensors


def read_mean(
    options: ExportOptions, config: Config, known: Sequence[float] | None, trained_on: str
) -> Tensor:
    """Return the mean to subtract: float32 [3, 1, 1] or [3, side, side], RGB 0..255.

    Raises:
        UsageError: the mean is in the data set, and that is not to be found, or another.
        DataError: the data set's statistics are damaged.
    """
    if config.mean == "channel" and known:
        return torch.tensor(known, dtype=torch.float32)[:, None, None]
    data, folder = locate_dataset(options.run, options.data, **config.cached)
    if read_segments(options.run):  # the mean is that of the version that the run began with
        folder = fetch_metadata(data, version=trained_on, **config.cached)
    if identity(folder) != trained_on:
        raise UsageError(f"{data} is not the data set of the training; name that one by --data")
    manifest = Manifest.load(folder)
    statistics = Statistics.load(folder, manifest)
    if config.mean == "channel":
        return torch.tensor(statistics.channel_mean, dtype=torch.float32)[:, None, None]
    side = config.design.image_size
    return torch.from_numpy(crop_mean_image(statistics, (side, side)))


def describe_checkpoint(config: Config, found: Checkpoint) -> dict[str, str]:
    """Return the header of the file; all values are JSON except the first two."""
    return {
        "format": "pt",
        "made_by": "duet",
        "step": json.dumps(found.mark.step),
        "samples_seen": json.dumps(found.mark.position),
        "top1_error": json.dumps(found.error),
        "classes": json.dumps(found.classes),
        "columns": json.dumps(config.design.columns),
        "width": json.dumps(config.design.width),
        "layers": json.dumps(list_layers(config.design)),
        "first": json.dumps(list_image_steps(config.design.rows()[0])),
        "image_size": json.dumps(config.design.image_size),
        "dropout": json.dumps("folded: what reads an output with dropout has halved weights"),
        "config": json.dumps(found.table["config"]),
        "checkpoint_sha256": json.dumps(
            {name: facts["sha256"] for name, facts in found.table["files"].items()}
        ),
    }


def list_layers(design: Design) -> list[list[object]]:
    """Return [name, how, then] of each layer in order: how to compute it from its weights.

    `how` are arguments of `torch.nn.functional.conv2d`, none for a fully connected layer. A layer
    without a stride is no convolution: {"groups": 2} is a fully connected one of two columns that
    read their own units, {"local": padding, "groups": columns} a locally connected one. `then` are
    the operations that follow, each with its arguments: ["relu"], ["tanh"], ["sigmoid"], ["norm",
    columns], or ["norm", columns, size, alpha, beta, k] with other constants than the paper's,
    ["multiply", factor], ["spatial_norm"], ["lcn", columns], ["scale", layer], ["pool", side,
    stride] and ["mean_pool", side, stride]. Dropout is not among them: it is in the weights.

    Where a layer reads another one than that before it, `how` has "input", its name or "picture";
    where it adds others' outputs, "adds", [name, factor] of each. The image goes through "first",
    as in `list_image_steps`, before a later layer reads it.
    """
    constants = [design.lrn_size, design.lrn_alpha, design.lrn_beta, design.lrn_k]
    plain = [Design.lrn_size, Design.lrn_alpha, Design.lrn_beta, Design.lrn_k]
    norm = [1 if design.lrn_across else design.columns, *(constants if constants != plain else ())]
    names = {"batch_norm": "scale", "scale": "multiply"}
    found: list[list[object]] = []
    stages = build_stages(design=design)
    for index, stage in enumerate(stages):
        layer, pool = stage.layer, [*stage.window]
        arguments: dict[str, list[Any]] = {
            "norm": norm, "lcn": [design.columns], "pool": pool, "mean_pool": pool,
            "batch_norm": [layer.name], "scale": [design.lrn_k**-design.lrn_beta],
        }  # fmt: skip
        then = [
            [names.get(word, word), *arguments.get(word, [])]
            for word in layer.then
            if word != "dropout"
        ]
        groups = design.columns if layer.reads == "own" else 1
        how: dict[str, Any] = {"stride": layer.stride, "padding": layer.pad, "groups": groups}
        if layer.kind == "local":
            how = {"local": layer.pad, "groups": groups}
        elif layer.kind == "fc":
            how = {"groups": groups} if groups > 1 else {}
        if stage.source != index - 1:
            how["input"] = layer.input or "picture"
        if index and stage.source < 0:
            how["first"] = list_image_steps(layer)
        if added := [stages[other].layer for other in stage.added]:
            how["adds"] = [[one.name, 0.5 if "dropout" in one.then else 1.0] for one in added]
        found.append([layer.name, how, then])
    return found


def list_image_steps(layer: Layer) -> list[object]:
    """Return a layer's operation on the image: ["edge", zeros beside it], or ["shrink", side]."""
    return ["shrink", layer.shrink] if layer.shrink > 1 else ["edge", layer.edge]


if __name__ == "__main__":
    run_command(main)
