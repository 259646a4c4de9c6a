"""A run as one plain file, which PyTorch alone can use."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoint.format import load_checkpoint
from cluster.config import Config
from cluster.export import main
from cluster.run.folder import format_toml
from model.alexnet import AlexNet
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import identity
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.training_processes import REPOSITORY
from tests.helpers.training_runs import CONFIG, alone

CONFIG = replace(CONFIG, validate_every=2, checkpoint_every=2, keep=9)


def trained(data: Path, run: Path, **changes: object) -> Path:
    config = Config.from_settings(CONFIG.to_settings() | changes)
    alone(config, data, run)
    (run / "config.toml").write_text(
        format_toml(config, identity(data), origin={"data": str(data)})
    )
    return run


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_data, tmp_path_factory.mktemp("export") / "run")


def load_network(run: Path, step: int = CONFIG.steps) -> AlexNet:
    net = AlexNet(classes=4, width=CONFIG.design.width)
    load_checkpoint(run / "checkpoints" / f"step-{step:08d}", net)
    return net.eval()


def run_script(weights: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(sys, "argv", ["classify", str(weights), str(path)])
    found: Tensor = runpy.run_path(str(REPOSITORY / "examples" / "classify.py"))["x"]
    return found[0]


def compute_logits(net: AlexNet, path: Path, data: Path) -> Tensor:
    """Logits of the network itself, from pixels that numpy and Pillow's resize prepared."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    size = net.design.image_size
    inside = slice((256 - size) // 2, (256 + size) // 2)
    pixels = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC, box))[inside, inside]
    x = pixels - Statistics.load(data).channel_mean
    with torch.no_grad():
        logits: Tensor = net.eval()(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None])
    return logits[0]


def test_the_script_of_the_readme_says_what_the_network_says(
    run, image_folder, tiny_data, monkeypatch, capsys
):
    assert main([str(run)]) == 0
    path = sorted((image_folder / "val").rglob("*.jpg"))[3]
    assert capsys.readouterr().out.startswith("step 6: ")
    found = run_script(run / "weights.safetensors", path, monkeypatch)
    logits = compute_logits(load_network(run), path, tiny_data)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].split()[0] == f"{float(logits.softmax(0).max()):.1%}"


# Every field of Design away from its default at least once; the first is `source2012`'s.
OTHERS = [
    {"relu_first": False, "spatial_norm": True},
    {"norm": "none", "activation": "tanh", "without": "conv3"},
    {"pool": "2/2", "without": "conv5"},
    {"columns": 1, "without": "conv4"},
    {"lrn_across": True, "image_size": 227},
    {"norm": "lcn", "conv6": True},
    {"norm": "batch", "dropout": False, "relu_first": False},
    {"norm": "spatial", "net": "four", "width": 0.5},
    {"net": "local11", "width": 0.25, "norm_layers": ("conv2=scale",), "lrn_size": 9, "lrn_k": 1.0},
    {"layers": [
        {"name": "conv1", "maps": 4, "kernel": 8, "stride": 8, "then": ["relu", "norm", "pool"]},
        {"name": "conv2", "maps": 6, "kernel": 3, "pad": 1, "then": ["sigmoid", "dropout"]},
        {"name": "low1", "maps": 6, "kernel": 5, "pad": 2, "stride": 2, "shrink": 8,
         "reads": "picture"},
        {"name": "conv3", "maps": 6, "kernel": 3, "pad": 1, "reads": "both", "input": "conv2",
         "adds": ["low1", "conv2"], "then": ["mean_pool"], "pool": "2/2"},
        {"name": "fc4", "maps": 9, "kind": "fc", "then": ["relu", "dropout"]},
        {"name": "fc5", "kind": "fc", "reads": "both"},
    ], "width": 1.0},
    {"communication": False, "bottleneck": 32, "lrn_across": True, "lrn_alpha": 5e-4,
     "lrn_beta": 0.5, "middle_std": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: "-".join(changes))
def test_the_script_runs_every_other_network(
    changes, image_folder, tiny_data, tmp_path, monkeypatch, capsys
):
    run = trained(tiny_data, tmp_path / "run", steps=2, validate_every=0, **changes)
    assert main([str(run)]) == 0
    design = Config.from_settings(CONFIG.to_settings() | changes).design
    net = AlexNet(columns=tuple(range(design.columns)), classes=4, design=design)
    load_checkpoint(run / "checkpoints" / "step-00000002", net)
    path = sorted((image_folder / "val").rglob("*.jpg"))[3]
    found = run_script(run / "weights.safetensors", path, monkeypatch)
    logits = compute_logits(net, path, tiny_data)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


def test_the_ten_lines_of_the_page_do_the_same_for_the_papers_network(
    run, image_folder, monkeypatch, tmp_path, capsys
):
    text = (REPOSITORY / "docs/export.md").read_text()
    (script,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S)
                 if "weights.safetensors" in block)  # fmt: skip
    assert len(script[script.index("w = ") :].splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    path = sorted((image_folder / "val").rglob("*.jpg"))[3]
    shutil.copy(path, "image.jpg")
    assert main([str(run), "--out", "weights.safetensors"]) == 0
    found: dict[str, Any] = {}
    exec(script, found)
    monkeypatch.setattr(sys, "argv", ["classify", "weights.safetensors", "image.jpg"])
    x = runpy.run_path(str(REPOSITORY / "examples" / "classify.py"))["x"]
    torch.testing.assert_close(found["p"], x.softmax(1), rtol=1e-4, atol=1e-5)


def test_the_file_is_a_plain_state_dict_with_a_header(run, tmp_path):
    out = tmp_path / "w.safetensors"
    assert main([str(run), "--out", str(out)]) == 0
    tensors = load_file(out)
    mean = tensors.pop("mean")
    assert mean.shape == (3, 1, 1)
    wanted = dict(load_network(run).named_parameters())
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        factor = 2 if name in ("fc7.weight", "fc8.weight") else 1
        assert torch.equal(tensor * factor, wanted[name]), name
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert len(json.loads(about["classes"])) == 4
    assert json.loads(about["config"])["width"] == json.loads(about["width"]) == CONFIG.design.width
    newest = run / "checkpoints" / "step-00000006"
    assert json.loads(about["checkpoint_sha256"]) == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in newest.glob("*.safetensors")
    }


def test_the_best_or_any_one_can_be_had(run, tmp_path, capsys):
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: (row["top1_error"], -row["step"]))["step"]
    for words, step in ((["--best"], best), (["--checkpoint", "4"], 4)):
        assert main([str(run), "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == step
    with pytest.raises(UsageError, match=r"no checkpoint of step 5; there are 6, 4, 2"):
        main([str(run), "--checkpoint", "5"])
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    name = "step-00000004"
    elsewhere = (moved / "checkpoints" / name).rename(tmp_path / name)
    assert main([str(moved), "--checkpoint", str(elsewhere)]) == 0
    assert "step 4: " in capsys.readouterr().out


def test_a_mean_image_comes_from_the_data_set_of_the_training(tiny_data, tmp_path):
    run = trained(tiny_data, tmp_path / "run", mean="image", steps=2)
    assert main([str(run)]) == 0
    mean = load_file(run / "weights.safetensors")["mean"]
    wanted = Statistics.load(tiny_data).mean_picture[16:240, 16:240].transpose(2, 0, 1)
    assert np.array_equal(mean.numpy(), wanted)


def test_what_cannot_be_exported_is_a_line(run, tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*: No such file .* by --out"):
        main([str(run), "--out", str(tmp_path / "none" / "w.safetensors")])
    with pytest.raises(UsageError, match="--best or --checkpoint 4, not both"):
        main([str(run), "--best", "--checkpoint", "4"])
    with pytest.raises(UsageError, match="holds no run"):
        main([str(tmp_path)])
    bad = Path(shutil.copytree(run, tmp_path / "bad"))
    for path in bad.glob("checkpoints/*/column-b.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"no checkpoint .* is sound"):
        main([str(bad)])
    shutil.rmtree(bad / "checkpoints")
    with pytest.raises(UsageError, match="no complete checkpoint yet"):
        main([str(bad)])
