"""Starting from another run's weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cluster.train as driver
from cluster.checkpoint.loader import (
    list_fresh_layers,
    load_init,
    match_layers,
    pin_init,
    resolve_init,
)
from cluster.config import Config, read_run_config
from cluster.mesh import ProcessMesh
from model.alexnet import AlexNet
from model.architecture import Design
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.images import folder_per_class, packed
from tests.helpers.training_runs import CONFIG, Call, alone, cut_at, learned, together, weights

SMALL = replace(CONFIG, lr=1e-12, momentum=0.0, weight_decay=0.0)
"""So slow that after a few steps the weights are what they were at first."""


@pytest.fixture(scope="module")
def source(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four classes."""
    run = tmp_path_factory.mktemp("source") / "run"
    alone(replace(CONFIG, seed=7), tiny_data, run)
    from cluster.run.folder import write_run_config
    from pipeline.dataset.manifest import identity

    write_run_config(run, replace(CONFIG, seed=7), identity(tiny_data), 48, 0)
    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three other classes."""
    root = tmp_path_factory.mktemp("three")
    for split, count in (("train", 12), ("val", 4)):
        folder_per_class(root / split, count, first_seed=9000)
        shutil.rmtree(root / split / "cat")
    packed(root / "data", train=root / "train", val=root / "val", samples_per_shard=10)
    return root / "data"


def taken(run: Path, step: int, source: Path) -> dict[str, bool]:
    """Return for each tensor of weights whether it is what the source ended with."""
    found, origin = weights(run, step), weights(source)
    return {
        key.removeprefix("weights/"): key in origin
        and origin[key].shape == value.shape
        and torch.allclose(value, origin[key], rtol=0, atol=1e-7)
        for key, value in found.items()
        if key.startswith("weights/")
    }


def test_all_but_the_last_layer_is_taken_whatever_the_classes_and_only_once(
    source, three, tmp_path
):
    run = tmp_path / "run"
    alone(replace(SMALL, init=str(source)), three, run)
    assert {key.split(".")[1] for key, same in taken(run, 3, source).items() if not same} == {"fc8"}
    fresh = AlexNet(classes=3, width=CONFIG.design.width).column_state()
    for key in ("a.fc8.weight", "b.fc8.weight"):
        torch.testing.assert_close(weights(run, 3)[f"weights/{key}"], fresh[key])
    # A run goes on from its own checkpoint: the source may have gone, or be another by now.
    again, config = tmp_path / "again", replace(CONFIG, init=str(tmp_path / "gone"))
    cut_at(3, run, again)
    alone(config, three, again)
    assert learned(again)[:3] == learned(run)[:3]


def test_a_pair_starts_from_what_one_process_saved_and_conv6_is_new(source, tiny_data, tmp_path):
    config = Config.from_settings(
        SMALL.to_settings() | {"init": f"{source}/checkpoints/step-00000003", "conv6": True}
    )
    pair, one = tmp_path / "pair", tmp_path / "one"
    together(tmp_path / "job", [Call(config, tiny_data, pair)])
    alone(config, tiny_data, one)
    found = {
        name: load_file(pair / f"checkpoints/step-00000003/column-{name}.safetensors")
        for name in "ab"
    }
    origin = weights(source, 3)  # not the newest
    for name, state in found.items():
        for key in (f"weights/{name}.conv3.weight", f"weights/{name}.fc7.bias"):
            torch.testing.assert_close(state[key], origin[key], rtol=0, atol=1e-7)
    for key, value in weights(one, 3).items():
        if key.startswith("weights/"):
            torch.testing.assert_close(value, found[key.split("/")[1][0]][key], rtol=0, atol=1e-7)


def test_the_command_pins_the_checkpoint_and_takes_the_same_when_it_starts_again(
    source, three, tmp_path, monkeypatch, capsys
):
    told = []
    monkeypatch.setattr(
        driver, "train_with_ray",
        lambda config, data, run, screen: told.append(config) or alone(config, Path(data), run),
    )  # fmt: skip
    toml = tmp_path / "some.toml"
    toml.write_text('dtype = "float32"\nwidth = 0.125\nbatch_size = 8\nsteps = 2\nthreads = 1\n')
    run = tmp_path / "run"
    origin = shutil.copytree(source, tmp_path / "origin")
    words = [str(toml), "--data", str(three), "--run", str(run), "--init", str(origin)]
    assert driver.main(words) == 0
    wanted = str(origin / "checkpoints/step-00000006")
    assert told[0].init == wanted
    assert read_run_config(run / "config.toml")[0].init == wanted
    assert "new: fc8" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(origin / "checkpoints/step-00000006")  # the newest is another now
    (run / "attempts.jsonl").unlink(missing_ok=True)
    with pytest.raises(UsageError, match="has no checkpoint of step 6"):
        driver.main(words)
    shutil.copytree(source / "checkpoints/step-00000006", origin / "checkpoints/step-00000006")
    assert driver.main(words) == 0
    shutil.rmtree(origin)  # finished, it needs the source no more
    assert driver.main(words) == 0
    with pytest.raises(UsageError, match="init: "):
        driver.main([*words[:-2], "--steps", "3"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 0.25}, ["a.conv1.weight is [6, 3, 11, 11], and this network's [12, 3, 11, 11]"]),
        ({"without": "conv4"}, ["has a.conv4, which this network has not"]),
        ({"norm": "batch"}, ["has no a.conv1.norm.weight, which this network has"]),
        ({"net": "four", "width": 0.5}, ["a.conv1.weight is [6, 3, 11, 11]"]),
    ],
    ids=["width", "without", "batch", "four"],
)
def test_a_network_that_does_not_fit_is_refused_by_its_layer(source, changes, words):
    with pytest.raises(UsageError) as caught:
        resolve_init(
            Config.from_settings(CONFIG.to_settings() | {"init": str(source)} | changes), 3, print
        )
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in [*words, "step-00000006", "config.toml"] if word not in message] == []


def test_conv6_is_taken_where_it_is_and_not_thrown_away() -> None:
    there = {f"a.{layer}.weight": torch.empty(1) for layer in ("conv1", "conv6", "fc8")}
    layers = ["conv1", "conv6", "fc8"]
    own = {**there, "a.fc8.weight": torch.empty(9)}
    assert match_layers(own, there, layers, "X") == list(there)[:2]
    with pytest.raises(UsageError, match=r"X has a.conv6, which this network has not"):
        match_layers({"a.conv1.weight": torch.empty(1)}, there, ["conv1", "fc8"], "X")


def test_the_convolutions_alone_are_taken_and_a_bottleneck_is_left_with_the_last_layer() -> None:
    """146-2011 began with the convolutions of 146-2009, and 146-2012 without its bottleneck."""
    names = ("conv1", "conv6", "fc6", "bottleneck", "fc8")
    there = {f"a.{name}.weight": torch.ones(1) for name in names}
    other = {f"a.{name}.weight": torch.empty(2) for name in ("fc6", "fc8")}
    own = {key: there[key] for key in ("a.conv1.weight", "a.conv6.weight")} | other
    layers = ["conv1", "conv6", "fc6", "fc8"]
    assert match_layers(own, there, layers, "X", ["fc6", "fc8"]) == list(there)[:2]
    same = {key: value for key, value in there.items() if "bottleneck" not in key}
    assert match_layers(same, there, layers, "X") == list(there)[:3]
    with pytest.raises(UsageError, match=r"a.fc6.weight is \[1\], and this network's \[2\]"):
        match_layers(own, there, layers, "X")
    net = AlexNet(classes=4, design=Design(conv6=True, bottleneck=32, width=1 / 16))
    assert list_fresh_layers(net, "conv") == ["fc6", "fc7", "bottleneck", "fc8"]
    assert list_fresh_layers(net, "all") == []


def test_a_run_begins_with_the_convolutions_of_another(source, three, tmp_path):
    config = replace(CONFIG, init=str(source), init_layers="conv", steps=1)
    pinned, said = resolve_init(config, 3, print)
    assert said.endswith("new: fc6, fc7, fc8")
    first, fresh = (AlexNet(classes=3, design=config.design, seed=config.seed) for _ in range(2))
    load_init(pinned.init, first, ProcessMesh(), print, "conv")
    taken = load_file(Path(pinned.init) / "column-a.safetensors")
    for name, value in first.column_state().items():
        if name.startswith("a.conv"):
            assert torch.equal(value, taken[f"weights/{name}"]), name
        elif ".fc" in name:
            assert torch.equal(value, fresh.column_state()[name]), name


def test_nothing_to_start_from_is_a_line(source, tmp_path):
    with pytest.raises(UsageError, match="is no run, and no checkpoint"):
        resolve_init(replace(CONFIG, init=str(tmp_path)), 3, print)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="has no complete checkpoint"):
        resolve_init(replace(CONFIG, init=str(tmp_path)), 3, print)
    copy = shutil.copytree(source / "checkpoints/step-00000006", tmp_path / "step-00000006")
    config, said = resolve_init(replace(CONFIG, init=str(copy)), 3, print)  # lies anywhere
    assert config.init == str(copy)
    assert "4 classes" in said
    with (copy / "column-b.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(DataError, match="is sound"):
        resolve_init(replace(CONFIG, init=str(copy)), 3, lambda event: None)


def test_an_init_of_before_holds_though_its_run_has_gone(tmp_path):
    from cluster.run.folder import format_toml

    before = replace(CONFIG, init=f"{tmp_path}/gone/checkpoints/step-00000400")
    (tmp_path / "config.toml").write_text(format_toml(before, "x"))
    assert pin_init(replace(CONFIG, init=f"{tmp_path}/gone"), tmp_path) == before
    assert pin_init(replace(CONFIG, init=f"{tmp_path}/other"), tmp_path) != before
    assert pin_init(CONFIG, tmp_path) == CONFIG


def test_an_init_below_a_folder_whose_name_is_no_text_is_a_line(tmp_path, monkeypatch):
    (folder := tmp_path / "\udcff").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"^init is .* UTF-8 text"):
        pin_init(replace(CONFIG, init="run"), tmp_path)


def test_a_store_can_be_started_from(s3_bucket, source, tiny_data, tmp_path):
    import fsspec

    address = f"{s3_bucket}/a/checkpoints/step-00000006-3f9c"
    files = fsspec.filesystem("s3")
    for path in (source / "checkpoints/step-00000006").iterdir():
        files.put_file(str(path), f"{address}/{path.name}")
    for init in (f"{s3_bucket}/a", address):
        config, _ = resolve_init(replace(SMALL, init=init), 4, print)
        assert config.init == address
    run = tmp_path / "run"
    alone(replace(config, steps=3), tiny_data, run)
    assert {k.split(".")[1] for k, same in taken(run, 3, source).items() if not same} == {"fc8"}


def test_a_store_that_names_other_files_writes_none_of_them(tmp_path):
    """Its hashes are right: whoever wrote checkpoint.json chose them."""
    import fsspec

    (victim := tmp_path / "home.rc").write_text("mine")
    body, system, base = b"from the store", fsspec.filesystem("memory"), f"/{uuid.uuid4()}"
    columns = {"column-a.safetensors": b"", "column-b.safetensors": b""}
    for name in (str(victim), "../home.rc", "a/b"):
        step = f"{base}/checkpoints/step-00000400"
        files = {name: body, **columns}
        table = {
            "version": 1, "step": 400, "position": 1, "classes": ["a", "b"],
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }  # fmt: skip
        system.pipe(f"{step}/checkpoint.json", json.dumps(table).encode())
        for file, data in files.items():
            system.pipe(f"{step}/{file}", data)
        told: list = []
        with pytest.raises(DataError, match="is sound"):
            resolve_init(replace(CONFIG, init=f"memory:/{base}"), 3, told.append)
        assert f"names a file {name!r}, which no checkpoint has" in told[0].text
    assert victim.read_text() == "mine"
