"""Checkpoints: whole or not there, checked to the byte, and nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cluster.checkpoint as checkpoint
from cluster.checkpoint import Checkpoints, newest, state_of
from cluster.events import Saved, Warned
from cluster.place import Place
from cluster.run_folder import CHECKPOINTS, Mark, reached
from model.alexnet import AlexNet
from model.optim import Sgd2012

CLASSES = ("cat", "dog", "owl")
ABOUT = {"config": {"lr": 0.01}, "data_sha256": "abc", "classes": CLASSES}


def network(seed: int = 0) -> tuple[AlexNet, Sgd2012]:
    net = AlexNet(classes=len(CLASSES), width=0.05, seed=seed)
    optimiser = Sgd2012(net.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for velocity in optimiser.velocities.values():
        velocity.normal_(generator=generator)
    return net, optimiser


class Run:
    """A run folder with what it was told."""

    def __init__(self, folder: Path, keep: int = 5) -> None:
        self.folder = folder
        self.told: list = []
        self.checkpoints = Checkpoints(folder, Place(), ABOUT, keep)

    def save(self, step: int, seed: int) -> None:
        self.checkpoints.save(Mark(step=step, position=8 * step), *network(seed), self.told.append)

    def resume(self) -> tuple[Mark, dict[str, torch.Tensor]]:
        net, optimiser = network(seed=99)
        mark = self.checkpoints.resume(net, optimiser, self.told.append)
        return mark, state_of(net, optimiser)

    def step(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / f"step-{step:08d}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def same(state: dict[str, torch.Tensor], seed: int) -> bool:
    wanted = state_of(*network(seed))
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


def test_everything_comes_back(run):
    run.save(3, seed=1)
    mark, state = run.resume()
    assert mark == Mark(step=3, position=24)
    assert same(state, seed=1)
    assert [type(event) for event in run.told] == [Saved]


def test_a_run_without_checkpoints_starts_at_0(run):
    mark, state = run.resume()
    assert mark == Mark()
    assert same(state, seed=99)
    assert run.told == []


def test_a_file_holds_its_column_and_nothing_else(run):
    run.save(1, seed=1)
    for name in "ab":
        file = load_file(run.step(1) / f"column-{name}.safetensors")
        assert {key.split("/")[0] for key in file} == {"weights", "velocity"}
        assert {key.split("/")[1].split(".")[0] for key in file} == {name}
        assert len(file) == 2 * 16
    table = json.loads((run.step(1) / "checkpoint.json").read_text())
    assert (table["step"], table["position"], table["data_sha256"]) == (1, 8, "abc")


def test_only_the_last_ones_are_kept(tmp_path):
    run = Run(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        run.save(step, seed=step)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        "step-00000003",
        "step-00000010",
    ]
    assert reached(tmp_path) == 10


def test_damaged_later_ones_neither_stay_nor_push_out_the_sound_one(tmp_path):
    run = Run(tmp_path, keep=1)
    for step in (200, 400):
        run.save(step, seed=step)
        flip_a_byte(run.step(step))
    run.save(100, seed=1)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000100"]
    assert reached(tmp_path) == 100


def flip_a_byte(step: Path) -> None:
    data = bytearray((step / "column-b.safetensors").read_bytes())
    data[-7] ^= 1
    (step / "column-b.safetensors").write_bytes(data)


def cut_short(step: Path) -> None:
    data = (step / "column-a.safetensors").read_bytes()
    (step / "column-a.safetensors").write_bytes(data[:-1])


def other_version(step: Path) -> None:
    path = step / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


DAMAGES = {
    "a flipped bit": (flip_a_byte, "column-b.safetensors does not have the SHA-256"),
    "a cut file": (cut_short, "column-a.safetensors has"),
    "a lost file": (lambda step: (step / "column-a.safetensors").unlink(), "No such file"),
    "no json": (lambda step: (step / "checkpoint.json").unlink(), "No such file"),
    "half a json": (lambda step: (step / "checkpoint.json").write_text('{"ver'), "damaged"),
    "another json": (lambda step: (step / "checkpoint.json").write_text("[]"), "damaged"),
    "an empty json": (lambda step: (step / "checkpoint.json").write_text("{}"), "version"),
    "another version": (other_version, "version 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_passed_over(run, damage):
    run.save(3, seed=1)
    run.save(6, seed=2)
    harm, words = DAMAGES[damage]
    harm(run.step(6))
    mark, state = run.resume()
    assert mark.step == 3
    assert same(state, seed=1)
    (warning,) = [event for event in run.told if isinstance(event, Warned)]
    assert str(run.step(6)) in warning.text
    assert words in warning.text


def test_a_damaged_one_is_replaced_when_the_run_comes_by_again(run):
    run.save(3, seed=1)
    flip_a_byte(run.step(3))
    run.save(3, seed=2)
    assert same(run.resume()[1], seed=2)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["before column b", "before the json", "before the rename"])
def test_a_death_while_saving_leaves_the_checkpoint_before(run, monkeypatch, moment):
    run.save(3, seed=1)

    def dies(*args: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before column b":
            real = checkpoint.save_file
            patch.setattr(
                checkpoint,
                "save_file",
                lambda state, path: dies() if "column-b" in path.name else real(state, path),
            )
        elif moment == "before the json":
            patch.setattr(checkpoint, "sealed", dies)
        else:
            patch.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            run.save(6, seed=2)
    assert (run.folder / CHECKPOINTS / "step-00000006.partial").is_dir()
    assert reached(run.folder) == 3
    assert run.resume()[0].step == 3
    run.save(9, seed=3)
    assert run.resume()[0].step == 9
    assert list((run.folder / CHECKPOINTS).glob("*.partial")) == []


def test_a_checkpoint_of_another_network_is_refused(run):
    run.save(3, seed=1)
    found = newest(run.folder / CHECKPOINTS, run.told.append)
    assert found is not None
    wider = AlexNet(classes=len(CLASSES), width=0.1)
    with pytest.raises(Exception, match=r"step-00000003: the state does not fit the network"):
        checkpoint.load(found.path, wider)
