"""Weights of other programs: the logits of theirs written out in torch, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster import import_weights
from cluster.checkpoint.format import choose_checkpoint, load_checkpoint
from cluster.checkpoint.loader import resolve_init
from cluster.checkpoint.weight_files import read_weights
from cluster.config import Config, read_run_config
from cluster.evaluate import main as evaluate
from cluster.experiments.neighbors import extract
from cluster.experiments.neighbors.__main__ import main as neighbors
from cluster.export import main as export
from cluster.import_weights import main
from cluster.report.page import main as report
from cluster.run.probabilities import SavedProbabilities
from model.alexnet import AlexNet
from model.architecture import Design
from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.tools.errors import DuetError, UsageError
from tests.cluster.experiments.test_neighbors import Here
from tests.helpers.caffemodels import (
    CAFFE_MEAN,
    OPERATIONS,
    Layers,
    caffe_logits,
    make_caffemodel,
    random_layers,
)
from tests.helpers.training_runs import weights

WIDTH = 0.125
CLASSES = 4


@pytest.fixture(autouse=True)
def an_eighth_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full layers would be 240 MB in each file."""
    monkeypatch.setattr(import_weights, "CAFFE", replace(import_weights.CAFFE, width=WIDTH))


def save(path: Path, layers: Layers, names: str = "weight bias") -> Path:
    """Save layers as the ending says."""
    ends = names.split()
    arrays = {f"{name}.{end}": part for name, pair in layers.items()
              for end, part in zip(ends, pair, strict=True)}  # fmt: skip
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: torch.tensor(array) for name, array in arrays.items()}, path)
    else:
        path.write_bytes(make_caffemodel(layers))
    return path


def imported(file: Path, *more: object, layout: str = "caffe") -> Path:
    run = file.with_name(f"run of {file.name}")
    assert main([str(file), "--layout", layout, "--out", str(run), *map(str, more)]) == 0
    return run


def load(run: Path, classes: int = CLASSES) -> AlexNet:
    config, _ = read_run_config(run / "config.toml")
    net = AlexNet(classes=classes, design=config.design)
    load_checkpoint(choose_checkpoint(run, "", print).path, net)
    return net.eval()


def draw_images(side: int = 227) -> Tensor:
    """Return grey levels, red first."""
    coarse = torch.rand(2, 3, 15, 15, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255)


def prepare_for_caffe(images: Tensor) -> Tensor:
    return images.flip(1) - torch.tensor(CAFFE_MEAN)[:, None, None]


@torch.no_grad()
def own_logits(net: AlexNet, images: Tensor) -> Tensor:
    mean = torch.tensor(CAFFE_MEAN).flip(0)[:, None, None]
    return net(images - mean)


@pytest.mark.parametrize("ending", ["caffemodel", "npz", "safetensors"])
def test_the_logits_are_those_of_caffes_network(ending, tmp_path):
    layers = random_layers(CLASSES)
    net = load(imported(save(tmp_path / f"w.{ending}", layers)))
    wanted = caffe_logits(layers, prepare_for_caffe(draw_images()))
    torch.testing.assert_close(own_logits(net, draw_images()), wanted, rtol=2e-5, atol=2e-5)
    assert float(wanted.std()) > 0.1


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_without_the_two_options_the_logits_are_others(tmp_path):
    """The border of the groups matters, and so does where the windows lie."""
    layers, images = random_layers(CLASSES), draw_images()
    wanted = caffe_logits(layers, prepare_for_caffe(images))
    file = save(tmp_path / "w.npz", layers)
    assert relative(own_logits(load(imported(file)), images), wanted) < 1e-5
    column = tmp_path / "column.npz"
    file.rename(column)
    assert relative(own_logits(load(imported(column, "--lrn", "column")), images), wanted) > 1e-3
    small = tmp_path / "small.npz"
    column.rename(small)
    net = load(imported(small, "--image-size", 224))
    assert relative(own_logits(net, images[:, :, 1:225, 1:225]), wanted) > 1e-2


def test_old_files_and_other_constants(tmp_path):
    layers, images = random_layers(CLASSES), draw_images()
    file = tmp_path / "old.caffemodel"
    constants = {"k": 3.0, "local_size": 3, "alpha": 2e-4, "beta": 0.5}
    file.write_bytes(make_caffemodel(layers, old=True, lrn=constants))
    wanted = caffe_logits(layers, prepare_for_caffe(images), **constants)
    assert relative(own_logits(load(imported(file)), images), wanted) < 1e-5
    wanted = caffe_logits(layers, prepare_for_caffe(images), k=3.0)
    plain = save(tmp_path / "plain.npz", layers, names="0 1")  # the names of Caffe's arrays
    assert relative(own_logits(load(imported(plain, "--lrn-k", 3)), images), wanted) < 1e-5


def test_a_run_is_evaluated_less_the_mean_of_its_data_set(tiny_data, tmp_path, capsys):
    """Caffe's mean goes into the biases: probabilities of stored images, less that mean."""
    layers = random_layers(CLASSES)
    layers["fc8"] = layers["fc8"][0] / 20, layers["fc8"][1] / 20  # or one class would get all
    run = imported(save(tmp_path / "w.caffemodel", layers), "--data", tiny_data)
    assert evaluate([str(run), "--save-probabilities", "--device", "cpu"]) == 0
    assert "step 0" in capsys.readouterr().out
    settings = {"crop": "center", "once": True, "size": 227, "mean": None, "threads": 1}
    with Stream(tiny_data, split="val", batch_size=20, **settings) as stream:
        images = next(stream).images
    wanted = caffe_logits(layers, prepare_for_caffe(images)).softmax(1)
    found = SavedProbabilities(run, 1).rows(0, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    own_mean = torch.tensor(Statistics.load(tiny_data).channel_mean, dtype=torch.float32).flip(0)
    other = caffe_logits(layers, images.flip(1) - own_mean[:, None, None]).softmax(1)
    assert float((other - wanted).abs().max()) > 1e-3


def test_the_other_commands_take_the_run(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract, "LocalPool", Here)
    run = imported(save(tmp_path / "w.npz", random_layers(CLASSES)), "--data", tiny_data)
    assert neighbors([str(run), "--json", "-k", "3", "--pairs", "500", "--workers", "1"]) == 0
    assert report([str(run)]) == 0
    assert "step 0" in (run / "report.html").read_text()
    config = Config(design=Design(width=WIDTH), init=str(run))
    found, said = resolve_init(config, 7, print)
    assert "new: fc8" in said
    assert found.init.endswith("step-00000000")


def test_what_export_wrote_comes_back_bit_for_bit(tiny_data, tmp_path):
    first = imported(save(tmp_path / "w.npz", random_layers(CLASSES)), "--data", tiny_data)
    file = tmp_path / "weights.safetensors"
    assert export([str(first), "--out", str(file)]) == 0
    second = imported(file, layout="torch")
    one, two = (weights(run, 0) for run in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_run_config(second / "config.toml")[0].design.lrn_across
    names = json.loads((first / "checkpoints/step-00000000/checkpoint.json").read_text())
    again = json.loads((second / "checkpoints/step-00000000/checkpoint.json").read_text())
    assert names["classes"] == again["classes"]


def test_a_network_for_normalized_images_of_torchvisions_kind(tiny_data, tmp_path, monkeypatch):
    """Layout torch, read for red first, LRN by column with k = 2, 224 pixels, (x - mean) / std."""
    monkeypatch.setattr(import_weights, "Design", lambda: Design(width=WIDTH))
    mean, std = (123.675, 116.28, 103.53), (60.0, 30.0, 90.0)
    layers = random_layers(CLASSES)
    layers["conv1"] = layers["conv1"][0] * 50, layers["conv1"][1]
    file = save(tmp_path / "w.safetensors", {
        f"features.{number}" if number < 14 else f"classifier.{number - 14}": layers[name]
        for name, number in zip(layers, (0, 4, 8, 10, 12, 15, 18, 20), strict=True)
    })  # fmt: skip
    run = imported(
        file, "--pixel-mean", *mean, "--pixel-std", *std, "--data", tiny_data, layout="torch"
    )
    net, images = AlexNet(classes=CLASSES, width=WIDTH).eval(), draw_images(224)
    state = {
        f"{name}.{part}": torch.tensor(array) * (2 if part == "weight" and name[-1] in "78" else 1)
        for name, pair in layers.items()
        for part, array in zip(("weight", "bias"), pair, strict=True)
    }
    net.load_state_dict(state, strict=False)
    shape = (3, 1, 1)
    own_mean = torch.tensor(Statistics.load(tiny_data).channel_mean, dtype=torch.float32)
    with torch.no_grad():
        wanted = net((images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
        found = load(run)(images - own_mean.view(shape))
    # The zeros at the edge are the mean of another data set: 3 of 227 rows and columns.
    assert relative(found, wanted) < 2e-2
    assert read_run_config(run / "config.toml")[0].design == Design(width=WIDTH)


def torchvisions() -> Layers:
    shapes = {"features.0": (64, 3, 11, 11), "features.3": (192, 64, 5, 5)}
    return {name: (np.zeros(shape, "f4"), np.zeros(shape[0], "f4"))
            for name, shape in shapes.items()}  # fmt: skip


def changed(name: str, weight: object = None, bias: object = None) -> Layers:
    layers = random_layers(CLASSES)
    old = layers[name]
    layers[name] = (old[0] if weight is None else weight, old[1] if bias is None else bias)
    return layers


def test_weights_of_another_network_are_refused_by_the_first_layer_that_does_not_fit(tmp_path):
    with pytest.raises(UsageError) as caught:
        imported(save(tmp_path / "vision.safetensors", torchvisions()))
    words = "its layer 1, features.0, has weight [64, 3, 11, 11], and conv1 here [12, 3, 11, 11]"
    assert words in str(caught.value)
    assert "torchvision's AlexNet is a later one" in str(caught.value)
    wide = np.zeros((32, 12, 5, 5), "f4")  # one column instead of two groups
    with pytest.raises(UsageError, match=r"layer 2, conv2, has weight \[32, 12, 5, 5\], and conv2"):
        imported(save(tmp_path / "one.npz", changed("conv2", wide)))
    fewer = {name: pair for name, pair in random_layers(512).items() if name != "fc8"}
    with pytest.raises(UsageError, match=r"has 7 layers with weights \(conv1 to fc7\), and this"):
        imported(save(tmp_path / "seven.npz", fewer))
    file = tmp_path / "caffenet.caffemodel"
    pooled = OPERATIONS | {"conv1": ("ReLU", "Pooling", "LRN")}
    file.write_bytes(make_caffemodel(random_layers(CLASSES), pooled))
    with pytest.raises(UsageError, match="conv1, is followed by relu, pool, norm, and conv1 here"):
        imported(file)
    for lrn, words in (({"local_size": 4}, "lrn_size is 4"), ({"alpha": 0.0}, "alpha 0; both")):
        file.write_bytes(make_caffemodel(random_layers(CLASSES), lrn=lrn))
        with pytest.raises(UsageError, match=words):
            imported(file)
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("ending", ["caffemodel", "npz", "safetensors"])
def test_a_damaged_file_is_a_line_wherever_it_is_cut(ending, tmp_path):
    small = {name: (pair[0][:1], pair[1][:1]) for name, pair in random_layers(2, 0.04).items()}
    file = save(tmp_path / f"w.{ending}", small)
    whole = file.read_bytes()
    assert len(read_weights(file).layers) == 8
    for length in [*range(0, min(len(whole), 400), 7), len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        said, layers = str(file), 0
        try:
            layers = len(read_weights(file).layers)
        except DuetError as error:
            said = str(error)
        assert str(file) in said
        assert layers < 8 or (ending, length) == ("caffemodel", len(whole) - 1)


def test_every_flipped_bit_of_a_caffemodel_gives_layers_or_a_line(tmp_path):
    small = {name: (pair[0][:1, :1], pair[1][:1]) for name, pair in random_layers(2, 0.04).items()}
    file = tmp_path / "w.caffemodel"
    whole = make_caffemodel(small)
    for place in range(0, len(whole), max(1, len(whole) // 300)):
        file.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        said = str(file)
        try:
            read_weights(file)
        except DuetError as error:
            said = str(error)
        assert str(file) in said


def test_another_k_does_not_go_through_the_spatial_normalization(tmp_path):
    config = Config(design=Design(width=WIDTH, spatial_norm=True))
    arrays = {f"{name}.{end}": torch.tensor(part) for name, pair in random_layers(CLASSES).items()
              for end, part in zip(("weight", "bias"), pair, strict=True)}  # fmt: skip
    file, header = tmp_path / "w.safetensors", json.dumps(config.to_settings())
    save_file(arrays, file, {"made_by": "duet", "config": header})
    with pytest.raises(UsageError, match=r"conv2 has k 1, not 2, and spatial_norm behind it"):
        imported(file, "--lrn-k", 1, layout="torch")
    imported(file, "--lrn-k", 2, layout="torch")


def test_what_cannot_be_imported_is_a_line(tiny_data, tmp_path):
    layers = random_layers(CLASSES)
    file = save(tmp_path / "w.npz", layers)
    with pytest.raises(UsageError, match=r"has 5 outputs, and data set .* 4 classes"):
        imported(save(tmp_path / "five.npz", random_layers(5)), "--data", tiny_data)
    for name in ("none.npz", "none.pth"):
        with pytest.raises(UsageError, match=rf"{name} cannot be read \(No such file"):
            imported(tmp_path / name)
    (tmp_path / "w.pth").touch()
    with pytest.raises(UsageError, match=r"is not .caffemodel, .npz, .safetensors"):
        imported(tmp_path / "w.pth")
    arrays = dict(np.load(file))
    np.savez(tmp_path / "scale.npz", **arrays | {"conv1.scale": np.ones(3, "f4")})
    with pytest.raises(UsageError, match=r"conv1.scale is float32"):
        imported(tmp_path / "scale.npz")
    del arrays["conv4.bias"]
    np.savez(tmp_path / "no bias.npz", **arrays)
    with pytest.raises(UsageError, match=r"conv4 has only weight"):
        imported(tmp_path / "no bias.npz")
    with pytest.raises(UsageError, match=r"fc7.bias has values that are not finite"):
        imported(save(tmp_path / "nan.npz", changed("fc7", bias=np.full(512, np.nan, "f4"))))
    for words, message in (
        (("--lrn-k", "-1"), "--lrn-k is -1"),
        (("--pixel-std", 1, 0, 1), "--pixel-std is"),
        (("--pixel-mean", "nan", 0, 0), "--pixel-mean is"),
    ):
        with pytest.raises(UsageError, match=message):
            imported(file, *words)
    run = imported(file)
    before = sorted(run.rglob("*"))
    with pytest.raises(UsageError, match="holds a run; name another folder by --out"):
        imported(file)
    assert sorted(run.rglob("*")) == before


def test_a_run_without_data_set_has_numbers_for_classes(tmp_path, capsys):
    run = imported(save(tmp_path / "w.npz", random_layers(5)), "--json")
    assert json.loads(capsys.readouterr().out)["classes"] == 5
    assert choose_checkpoint(run, "", print).classes == ("0", "1", "2", "3", "4")
    assert export([str(run)]) == 0  # Caffe's mean is known without one
