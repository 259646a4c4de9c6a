"""Feature maps in the report: their values, their pictures, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cluster.checkpoint.writer import CheckpointManager
from cluster.mesh import ProcessMesh
from cluster.report.feature_maps import ACROSS, MOST_MAPS, compute_maps, draw_maps, read_crops
from cluster.report.images import MissingFigure, find_newest_checkpoint
from cluster.report.page import main, write_report
from cluster.run.folder import Mark
from cluster.run.probabilities import SavedProbabilities, probability_path
from model.alexnet import AlexNet
from model.architecture import Design
from model.optimizer import Sgd2012
from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest
from pipeline.tools.errors import UsageError
from tests.cluster.report.test_answers import VIEWS, save_probabilities
from tests.cluster.report.test_report import Page
from tests.helpers.damage import FLIPPED, change, flip

WIDTH = 1 / 16


@pytest.fixture
def net() -> AlexNet:
    return AlexNet(classes=4, width=WIDTH, seed=3)


@pytest.fixture
def run(tmp_path: Path, tiny_data: Path, net: AlexNet) -> Path:
    """A run with a checkpoint, and probabilities of the 20 validation images."""
    save_probabilities(tmp_path, tiny_data)
    row = {"position": 8, "step": 1, "epoch": 0.1, "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "config.toml").write_text(f'width = {WIDTH}\nmean = "image"\n')
    (tmp_path / "checkpoints").mkdir()
    about = {"classes": list(Manifest.load(tiny_data).classes)}
    checkpoints = CheckpointManager(tmp_path, ProcessMesh(), about, lambda event: None, keep=1)
    checkpoints.begin(Mark(step=7, position=896), net, Sgd2012(net.named_parameters()))
    checkpoints.finish(must=True)
    return tmp_path


class ColumnNorm(nn.LocalResponseNorm):
    """torch's normalization over the maps of each of two columns."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(ColumnNorm, self).forward(own) for own in x.chunk(2, 1)], 1)


def plain_network(net: AlexNet) -> nn.Sequential:
    """The first three layers of the paper in plain torch, with the weights of `net`."""
    weights = {name: net.get_parameter(f"{name}.weight") for name in ("conv1", "conv2", "conv3")}
    maps = {name: len(weight) for name, weight in weights.items()}
    plain = nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        nn.Conv2d(3, maps["conv1"], 11, stride=4),
        nn.ReLU(),
        ColumnNorm(5, 1e-4, 0.75, 2.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),  # 4: what conv2 reads
        nn.Conv2d(maps["conv1"], maps["conv2"], 5, padding=2, groups=2),
        nn.ReLU(),
        ColumnNorm(5, 1e-4, 0.75, 2.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(maps["conv2"], maps["conv3"], 3, padding=1),
        nn.ReLU(),  # 10: what conv4 reads
    )
    for number, name in ((1, "conv1"), (5, "conv2"), (9, "conv3")):
        plain[number].load_state_dict(net.get_submodule(name).state_dict())
    return plain


def test_maps_are_those_of_a_forward_hook_in_plain_torch(net):
    images = 50 * torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    plain, seen = plain_network(net), {}
    for number, name in ((4, "conv1"), (10, "conv3")):
        plain[number].register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out.detach()})
        )
    plain(images)
    found = compute_maps(net.train(), images, ("conv3", "conv1"))
    assert list(found) == ["conv1", "conv3"]
    for name, side in (("conv1", 27), ("conv3", 13)):
        assert found[name].shape[1] == 2
        assert found[name].shape[3:] == (side, side)
        assert seen[name].abs().max() > 0
        torch.testing.assert_close(found[name].flatten(1, 2), seen[name], rtol=1e-4, atol=1e-4)


def test_maps_of_one_column(net):
    alone = AlexNet(classes=4, design=Design(width=WIDTH, columns=1))
    images = torch.randn(1, 3, 224, 224)
    assert compute_maps(alone, images, ("conv1",))["conv1"].shape == (1, 1, 3, 27, 27)


def test_the_most_active_come_first_each_to_full_contrast():
    values = np.zeros((MOST_MAPS + 2, 2, 2), np.float32)
    values[7] = [[4, 2], [0, 0]]
    values[MOST_MAPS + 1] = [[1, 3], [3, 3]]
    sheet = draw_maps(values)
    assert sheet.shape == (MOST_MAPS // ACROSS * 3 - 1, ACROSS * 3 - 1, 2)
    assert sheet[:2, :2, 0].tolist() == [[85, 255], [255, 255]]
    assert sheet[:2, 3:5, 0].tolist() == [[255, 128], [0, 0]]
    assert sheet[0, 2].tolist() == [0, 0], "gaps are clear"
    assert sheet[0, 6].tolist() == [0, 255], "a map of zeros is black"


def test_negative_values_are_darker_than_grey():
    sheet = draw_maps(np.array([[[0, 1], [-2, -1]]], np.float32))
    assert sheet[..., 0].tolist() == [[128, 191], [0, 64]]


def test_page_holds_the_maps_of_the_images_that_it_shows(run, tiny_data, net):
    choices = ["--answers", "worst", "random", "--each", "2"]
    main([str(run), "--data", str(tiny_data), *choices, "--maps", "conv3", "conv1"])
    page = Page(run / "report.html")
    assert [text for level, text in page.headings if "layers make" in text]
    file = SavedProbabilities(run, VIEWS)
    true = file.rows(0, 20)[torch.arange(20), file.labels]
    true[file.weights == 0] = 1
    worst = int(true.argmin())
    with Stream(
        tiny_data, split="val", batch_size=20, crop="center", mean="image", once=True
    ) as stream:
        crop, mean = next(stream).images[worst].float(), torch.from_numpy(stream.mean)
    values = compute_maps(net, crop[None], ("conv1", "conv3"))
    for layer in ("conv1", "conv3"):
        for column, name in enumerate("ab"):
            own = values[layer][0, column]
            uri = page.images[f"{layer} maps of column {name}, val sample {worst}"]
            first = own[own.abs().mean((1, 2)).argmax()]
            shown = np.asarray(decode(uri))[: first.shape[0], : first.shape[1], 0].astype(int)
            assert first.max() > 0
            np.testing.assert_allclose(shown, 255 * first / first.max(), atol=1)
    seen = decode(page.images[f"the part of val sample {worst} that the network reads"])
    whole = (crop + mean).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(seen.resize((224, 224)), float) - whole).mean() < 8
    assert len([alt for alt in page.images if " maps of column " in alt]) == 8
    assert "feature maps, step 7" in page.text


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_images_are_read_in_the_order_that_is_wanted_and_damaged_ones_are_said(run, data):
    change(data, FLIPPED, flip)
    found = find_newest_checkpoint(run)
    wanted = [FLIPPED + 1, 2]
    crops, mean = read_crops(run, str(data), "train", wanted, found)
    with Stream(data, batch_size=48, crop="center", mean="image", once=True) as stream:
        assert crops.equal(next(stream).images[wanted])
        pixels = crops + mean
    for ids, fault in (([FLIPPED], f"Sample {FLIPPED} of train is damaged"), ([], "no sound im")):
        with pytest.raises(MissingFigure, match=fault):
            read_crops(run, str(data), "train", ids, found)
    (run / "config.toml").write_text(f"width = {WIDTH}\n")
    other = replace(found, table={"channel_mean": [100.0, 110.0, 120.0]})
    crops, mean = read_crops(run, str(data), "train", wanted, other)
    assert mean.flatten().tolist() == [100, 110, 120], "the mean of the training, not the set's"
    torch.testing.assert_close(crops + mean, pixels, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        (
            ("conv1", "conv9"),
            "--maps names conv9, which .* does not have; it takes conv1, conv2, c",
        ),
        (("fc6",), "--maps names fc6, which is fully connected and has no maps; it takes conv1, c"),
    ],
)
def test_layers_without_maps_are_refused(run, layers, fault):
    with pytest.raises(UsageError, match=fault) as error:
        write_report(run, maps=layers)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=fault):
        main([str(run), "--evaluate", "--maps", *layers])
    with pytest.raises(UsageError, match="--maps is for a single run"):
        main([str(run), str(run), "--maps", *layers])
    assert not list(run.glob("*.html"))


def test_what_is_missing_is_said(run, tiny_data, tmp_path):
    page = Page(write_report(run, str(tmp_path), maps=("conv1",)))
    assert "No feature maps. No answers: " in page.text
    probability_path(run, VIEWS).unlink()
    assert "No feature maps. No answers: " in Page(write_report(run, maps=("conv1",))).text
    assert "No feature maps" not in Page(write_report(run)).text
