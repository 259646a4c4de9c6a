"""Makes a run of weights that another program trained.

    python -m cluster.import_weights FILE --layout caffe|torch --out RUN [--data DATA] [--json]

RUN gets a checkpoint of step 0, which `evaluate`, `neighbors`, `report`, `export` and `--init`
take. FILE has the merged layers of both columns. The network here differs from Caffe's copy in
constants only, all of which go into the weights, so that the logits stay the same:

    order of colors   conv1 reads blue, green, red: its input maps are reversed
    mean, divisor     conv1 reads (x - mean) / std, and here x less the mean of the data set:
                      W1 / std; b1 + sum of W1 / std * (mean of the data set - mean)
    LRN's k, alpha    with s = sqrt(k' alpha / (k alpha')), where k' and alpha' are the constants
                      here, LRN'(s x) = s (k' / k)^-beta LRN(x): W and b of the layer before times
                      s, W of the one after times (k' / k)^beta / s. From 1 to 2: 2^(1/2), 2^(1/4)
    dropout           halves outputs in a test here, and doubles them in training there: W of the
                      layer after times 2

Weights with other constants of the paper's stay weights that `--init` can use with any preset. What
no weights can express are settings of the network: LRN that reaches across the border of the groups
(`lrn_across`), its size and beta, and images of 227 pixels (`image_size`). Beside an image of 224
pixels conv1 reads zeros, which stand for the mean: with another mean than the data set's its last
row and column differ a little.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.checkpoint.loader import parse_settings
from cluster.checkpoint.weight_files import (
    Floats,
    LrnConstants,
    SavedLayer,
    WeightFile,
    read_weights,
)
from cluster.checkpoint.writer import CheckpointManager
from cluster.cli.options import ImportOptions
from cluster.config import Config
from cluster.launch.session import refuse_relative
from cluster.mesh import ProcessMesh
from cluster.run.console import print_warning
from cluster.run.events import Event, Warned
from cluster.run.folder import (
    CHECKPOINTS,
    CONFIG,
    Mark,
    find_commit,
    list_checkpoints,
    lock_run,
    make_run_id,
    parse_step,
    write_run_config,
)
from cluster.training.components import create_optimizer, read_origin
from model.alexnet import AlexNet
from model.architecture import CAFFE_IMAGE, Design
from pipeline.dataset.record import ADDRESS_KEY
from pipeline.remote.dataset import open_dataset
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.tools.arguments import format_command, parse_options
from pipeline.tools.errors import UsageError
from pipeline.tools.errors import run as run_command

CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)
"""Channel means, red green blue, of Caffe's ilsvrc_2012_mean."""
CAFFE_K = 1.0
CAFFE = Design(lrn_across=True, image_size=CAFFE_IMAGE)
"""Caffe's copy of the network."""
TORCHVISION = (64, 3, 11, 11)
"""Shape of conv1 in torchvision's AlexNet."""
WANTED = "name the network of 2012 with its two groups, as Caffe's bvlc_alexnet"
Layers = dict[str, tuple[Floats, Floats]]
"""Weights and biases by the names of this network's layers."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    words = sys.argv[1:] if argv is None else argv
    options = parse_options(ImportOptions, words, "python -m cluster.import_weights")
    for name, path in (("--out", options.out), ("--data", options.data)):
        if path:
            refuse_relative(name, path, missing=name == "--data")
    _check_numbers(options)
    saved = list_checkpoints(options.out / CHECKPOINTS)
    if (options.out / CONFIG).exists() or any(map(parse_step, saved)):
        raise UsageError(f"{options.out} holds a run; name another folder by --out")
    file = read_weights(options.file)
    config = choose_config(options, file)
    file = arrange_layers(file, config.design)
    check_layers(file, config.design)
    about, address = describe_origin(options, file, config)
    net = AlexNet(classes=len(about["classes"]), design=config.design, initializes=False)
    layers = fold_constants(options, file, config.design, about)
    with torch.no_grad():
        for name, own in net.named_parameters():
            layer, _, part = name.rpartition(".")
            value = torch.from_numpy(layers[layer][part == "bias"])
            own.zero_()[: len(value)] = value  # an odd number of classes is made even
    command = format_command("python -m cluster.import_weights", words)
    write_run(options.out, config, net, about, {ADDRESS_KEY: address, "command": command})
    count = sum(layer.weight.size + layer.bias.size for layer in file.layers)
    human = sys.stderr if options.json else sys.stdout
    human.write(f"{count:,} parameters, {net.classes} classes -> {options.out}\n")
    if options.json:
        result = {"out": str(options.out), "parameters": count, "classes": net.classes}
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _check_numbers(options: ImportOptions) -> None:
    if not (math.isfinite(options.lrn_k) and options.lrn_k >= 0):
        raise UsageError(f"--lrn-k is {options.lrn_k}; it must be above 0, or 0 for the layout's")
    if not all(math.isfinite(value) and value > 0 for value in options.pixel_std):
        raise UsageError(f"--pixel-std is {options.pixel_std}; its numbers must be above 0")
    if not all(math.isfinite(value) for value in options.pixel_mean or ()):
        raise UsageError(f"--pixel-mean is {options.pixel_mean}; its numbers must be finite")


def choose_config(options: ImportOptions, file: WeightFile) -> Config:
    """Return the settings of the run: those in a file of `duet export`, else the layout's network.

    Raises:
        UsageError: they cannot work, or the layers of the file are not those of the network.
    """
    config = Config(design=CAFFE if options.layout == "caffe" else Design())
    if options.layout == "torch" and file.header.get("made_by") == "duet":
        try:
            config = parse_settings(json.loads(file.header["config"]))
        except (ValueError, KeyError, TypeError) as error:
            why = f"its settings are of another version: {error}"
            raise UsageError(f"{file.path} cannot be imported ({why}); export it anew") from error
        config = replace(config, init="", store="", cache="")
    changes: dict[str, Any] = find_window(file)
    if options.lrn != "auto":
        changes["lrn_across"] = options.lrn == "across"
    if options.image_size != "auto":
        changes["image_size"] = options.image_size
    try:
        config = replace(config, design=replace(config.design, **changes))
    except ValueError as error:
        raise UsageError(f"{file.path}: {error}") from error
    return config


def arrange_layers(file: WeightFile, design: Design) -> WeightFile:
    """Return the file with its layers in the network's order, if they have the network's names."""
    layers = {layer.name: layer for layer in file.layers}
    names = [row.name for row in design.rows()]
    if set(names) != set(layers) or file.has_operations:
        return file
    return replace(file, layers=tuple(layers[name] for name in names))


def check_layers(file: WeightFile, design: Design) -> None:
    """Compare the layers of a file with those of a network.

    Raises:
        UsageError: they differ; the message names the first that does not fit, and why.
    """
    classes = max(2, len(file.layers[-1].bias))
    with torch.device("meta"):
        net = AlexNet(classes=classes, design=design, initializes=False)
    rows = design.rows()
    for number, (layer, row) in enumerate(zip(file.layers, rows, strict=False), 1):
        called = f"its layer {number}, {layer.name},"
        for part, array in (("weight", layer.weight), ("bias", layer.bias)):
            wanted = list(net.get_parameter(f"{row.name}.{part}").shape)
            wanted[0] = classes if row.maps is None else wanted[0]
            if list(array.shape) != wanted:
                words = f"{called} has {part} {list(array.shape)}, and {row.name} here {wanted}"
                way = WANTED
                if array.shape == TORCHVISION:
                    way = f"torchvision's AlexNet is a later one, of a single column: {WANTED}"
                raise UsageError(f"{file.path} is of another network: {words}; {way}")
        own = [word for word in row.then if word != "dropout"]
        if file.has_operations and layer.then != own:
            words = f"{called} is followed by {_join(layer.then)}, and {row.name} here by"
            raise UsageError(f"{file.path} is of another network: {words} {_join(own)}; {WANTED}")
    if len(file.layers) != len(rows):
        there = f"it has {len(file.layers)} layers with weights ({_name_ends(file)})"
        here = f"this one {len(rows)} ({rows[0].name} to {rows[-1].name})"
        raise UsageError(f"{file.path} is of another network: {there}, and {here}; {WANTED}")


def _join(operations: list[str]) -> str:
    return ", ".join(operations) or "nothing"


def _name_ends(file: WeightFile) -> str:
    return f"{file.layers[0].name} to {file.layers[-1].name}"


def describe_origin(
    options: ImportOptions, file: WeightFile, config: Config
) -> tuple[dict[str, Any], str]:
    """Return what the checkpoint says of its origin, and the address of the data set.

    Raises:
        UsageError: the data set has another number of classes than the last layer has outputs.
        DuetError: the data set cannot be read.
    """
    outputs, mean = len(file.layers[-1].bias), find_mean(options)
    if options.data:
        open_dataset(options.data, **config.cached).close()
        address = options.data
        if not is_remote(address):
            address = str(local_path(address).resolve())
        _, about = read_origin(config, address)
        if len(about["classes"]) != outputs:
            raise UsageError(
                f"the last layer of {file.path} has {outputs:,} outputs, and data set "
                f"{options.data} {len(about['classes']):,} classes; name one with these classes"
            )
        return about, address
    names = json.loads(file.header.get("classes", "[]")) or [str(n) for n in range(outputs)]
    about = {"config": config.to_settings(), "data_sha256": "", "classes": names}
    return about | ({"channel_mean": list(mean)} if mean else {}), ""


def find_mean(options: ImportOptions) -> tuple[float, float, float] | None:
    """Return the mean that the other program subtracts; None: nobody says."""
    return options.pixel_mean or (CAFFE_MEAN if options.layout == "caffe" else None)


def fold_constants(
    options: ImportOptions, file: WeightFile, design: Design, about: dict[str, Any]
) -> Layers:
    """Return the weights for this network: the module's docstring has the closed form.

    Args:
        options: layout and constants of the other program.
        file: its layers, which fit.
        design: this network.
        about: may have the mean that is subtracted here.

    Raises:
        UsageError: a constant cannot be put into weights.
    """
    found: Layers = {}
    after = 1.0
    """Factor on the weights of the next layer."""
    for layer, row in zip(file.layers, design.rows(), strict=True):
        weight, bias = layer.weight.astype(np.float64) * after, layer.bias.astype(np.float64)
        after = 1.0
        if not found:
            weight, bias = fold_pixels(options, weight, bias, about.get("channel_mean"))
        if "norm" in row.then:
            theirs = find_constants(options, layer, design)
            before, after = scale_norm(file, layer, theirs, design)
            weight, bias = weight * before, bias * before
            if "spatial_norm" in row.then and after != 1.0:
                raise UsageError(
                    f"{file.path}: LRN after {layer.name} has k {theirs.k:g}, not "
                    f"{design.lrn_k:g}, and spatial_norm behind it; leave --lrn-k out"
                )
        if "dropout" in row.then:
            after *= 2.0
        found[row.name] = weight.astype(np.float32), bias.astype(np.float32)
    return found


def fold_pixels(
    options: ImportOptions, weight: Any, bias: Any, mean: list[float] | None
) -> tuple[Any, Any]:
    """Return conv1, float64, for images in red, green, blue, less `mean` and divided by nothing."""
    if options.layout == "caffe":
        weight = weight[:, ::-1]
    weight = weight / np.array(options.pixel_std)[:, None, None]
    theirs = find_mean(options)
    if theirs and mean:
        bias = bias + weight.sum((2, 3)) @ (np.array(mean) - theirs)
    return weight, bias


def find_window(file: WeightFile) -> dict[str, Any]:
    """Return size and beta of LRN as settings of the network, where a file says.

    Raises:
        UsageError: they differ from layer to layer.
    """
    named = {layer.name: layer.lrn for layer in file.layers if layer.lrn}
    windows = {(lrn.size, round(lrn.beta, 6)) for lrn in named.values()}
    if len(windows) > 1:
        words = ", ".join(f"{lrn.size} and {lrn.beta:g} after {n}" for n, lrn in named.items())
        raise UsageError(
            f"{file.path}: size and beta of LRN are {words}; this network has one for all layers"
        )
    return {"lrn_size": min(windows)[0], "lrn_beta": min(windows)[1]} if windows else {}


def find_constants(options: ImportOptions, layer: SavedLayer, design: Design) -> LrnConstants:
    """Return the constants of the normalization after a layer in the other program."""
    k = CAFFE_K if options.layout == "caffe" else design.lrn_k
    found = layer.lrn or LrnConstants(k=k, alpha=design.lrn_alpha)
    return replace(found, k=options.lrn_k) if options.lrn_k else found


def scale_norm(
    file: WeightFile, layer: SavedLayer, theirs: LrnConstants, design: Design
) -> tuple[float, float]:
    """Return the factors on the layer before LRN and on the weights of the one after it.

    Raises:
        UsageError: its k or alpha is not above 0.
    """
    if theirs.k <= 0 or theirs.alpha <= 0:
        raise UsageError(
            f"{file.path}: LRN after {layer.name} has k {theirs.k:g} and alpha "
            f"{theirs.alpha:g}; both must be above 0"
        )
    k = design.lrn_k / theirs.k
    before = math.sqrt(k * theirs.alpha / design.lrn_alpha)
    return before, k**design.lrn_beta / before


def write_run(
    run: Path, config: Config, net: AlexNet, about: dict[str, Any], origin: dict[str, str]
) -> None:
    """Write a run with a checkpoint of step 0, config.toml last: a half-written one is no run.

    Raises:
        UsageError, SetupError: the folder cannot be written.
    """
    with lock_run(run):
        about = about | {"run": make_run_id(run)}
        (run / CHECKPOINTS).mkdir(exist_ok=True)
        optimizer = create_optimizer(config, net)
        manager = CheckpointManager(run, ProcessMesh(), about, _warn, keep=1)
        with closing(manager):
            manager.begin(Mark(), net, optimizer)
            manager.finish(must=True)
        origin = origin | {"commit": find_commit()}
        sha256, name = about["data_sha256"], about["run"]
        write_run_config(run, config, sha256, 0, 0, name, origin)


def _warn(event: Event) -> None:
    if isinstance(event, Warned):
        print_warning(event)


if __name__ == "__main__":
    run_command(main)
