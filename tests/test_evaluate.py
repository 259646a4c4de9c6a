"""Evaluation: against counts made one picture at a time, and its files and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import load
from cluster.config import Config
from cluster.evaluate import main
from cluster.place import Place
from cluster.run_folder import settle
from cluster.worker import train
from model.alexnet import AlexNet
from pipeline.batches import Stream
from pipeline.errors import UsageError
from pipeline.manifest import Manifest, identity

CONFIG = Config(
    dtype="float32", width=0.125, batch_size=8, steps=4, checkpoint_every=4, validate_every=4
)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    settle(run, CONFIG, identity(tiny_data), samples=48, step=0)
    train(CONFIG, tiny_data, run, Place(), lambda event: None)
    return run


def one_by_one(run: Path, data: Path, views: int) -> list[tuple[int, list[float]]]:
    """(label, probabilities) of every validation picture, each crop cut and run by itself."""
    net = AlexNet(classes=4, width=CONFIG.width)
    load(run / "checkpoints" / "step-00000004", net)
    net.eval()
    corners = [(16, 16)] if views == 1 else [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    found = []
    with (
        torch.no_grad(),
        Stream(data, split="val", batch_size=1, view="whole", once=True, threads=1) as stream,
    ):
        for batch in stream:
            crops = [batch.images[:, :, y : y + 224, x : x + 224] for y, x in corners]
            crops += [crop.flip(3) for crop in crops] if views == 10 else []
            answers = [torch.softmax(net(crop), dim=1)[0] for crop in crops]
            found.append((int(batch.labels), torch.stack(answers).mean(0).tolist()))
    return found


@pytest.mark.parametrize("views", [1, 10])
def test_errors_are_those_counted_one_picture_at_a_time(trained, tiny_data, views, capsys):
    assert main([str(trained), "--data", str(tiny_data), "--views", str(views), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((trained / f"evaluation-{views}.json").read_text())
    assert printed == written
    answers = one_by_one(trained, tiny_data, views)
    wrong = [label != max(range(4), key=p.__getitem__) for label, p in answers]
    assert (written["samples"], written["views"], written["step"]) == (20, views, 4)
    assert written["top1_error"] == pytest.approx(sum(wrong) / 20)
    assert written["top5_error"] == 0  # there are four classes
    loss = -sum(torch.tensor(p[label]).log().item() for label, p in answers) / 20
    assert written["loss"] == pytest.approx(loss, rel=1e-4)
    confusion = [[0] * 4 for _ in range(4)]
    for label, p in answers:
        confusion[label][p.index(max(p))] += 1
    assert written["confusion"] == confusion
    names = Manifest.load(tiny_data).classes
    assert written["classes"] == {
        name: pytest.approx(1 - confusion[place][place] / 5) for place, name in enumerate(names)
    }


def test_one_view_agrees_with_the_validation_during_training(trained, tiny_data, capsys):
    main([str(trained), "--data", str(tiny_data)])
    row = json.loads((trained / "validation.jsonl").read_text().splitlines()[-1])
    written = json.loads((trained / "evaluation-1.json").read_text())
    assert written["top1_error"] == pytest.approx(row["top1_error"])
    assert written["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert "top-1 error" in capsys.readouterr().out


def test_without_a_run_or_a_checkpoint_the_message_says_what_to_do(trained, tiny_data, tmp_path):
    with pytest.raises(UsageError, match="is no run folder"):
        main([str(tmp_path), "--data", str(tiny_data)])
    shutil.copy(trained / "config.toml", tmp_path)
    with pytest.raises(UsageError, match="has no complete checkpoint yet"):
        main([str(tmp_path), "--data", str(tiny_data)])


def test_a_data_set_with_other_classes_is_refused(trained, tiny_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    table = json.loads((other / "manifest.json").read_text())
    table["classes"][0] = "zebra"
    (other / "manifest.json").write_text(json.dumps(table))
    with pytest.raises(UsageError, match=r"has 4 classes, not the 4 of the run in .* that order"):
        main([str(trained), "--data", str(other)])
    with pytest.raises(UsageError, match="no split 'test'; it has train, val"):
        main([str(trained), "--data", str(tiny_data), "--split", "test"])
