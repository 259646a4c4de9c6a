"""Checkpoints: whole or not there, checked to the byte, and nothing lost on the way."""

from __future__ import annotations

import errno
import json
import resource
import threading
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import cluster.checkpoint as checkpoint
import cluster.checkpoint_part as part
import cluster.checkpoint_places as places
from cluster.checkpoint import newest, state_of
from cluster.checkpoint_places import reached
from cluster.checkpoint_writer import Checkpoints
from cluster.events import Saved, Warned
from cluster.place import Place
from cluster.run_folder import CHECKPOINTS, Mark
from model.alexnet import AlexNet
from model.optim import Sgd2012
from pipeline.errors import SetupError

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

    def __init__(self, folder: Path, keep: int = 5, keep_best: int = 0) -> None:
        self.folder = folder
        self.told: list = []
        self.keep, self.keep_best = keep, keep_best
        self.open()

    def open(self) -> None:
        """As a new start of the workers does."""
        self.checkpoints = Checkpoints(
            self.folder, Place(), ABOUT, self.told.append, keep=self.keep, keep_best=self.keep_best
        )
        (self.folder / CHECKPOINTS).mkdir(exist_ok=True)

    def begin(self, step: int, seed: int, error: float | None = None) -> None:
        self.checkpoints.begin(Mark(step=step, position=8 * step), *network(seed), error)

    def save(self, step: int, seed: int, error: float | None = None) -> None:
        self.begin(step, seed, error)
        self.checkpoints.finish(must=True)

    def resume(self) -> tuple[Mark, dict[str, torch.Tensor]]:
        self.open()
        net, optimiser = network(seed=99)
        mark = self.checkpoints.resume(net, optimiser)
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
    assert reached(tmp_path, "") == 10


def test_damaged_later_ones_neither_stay_nor_push_out_the_sound_one(tmp_path):
    run = Run(tmp_path, keep=1)
    for step in (200, 400):
        run.save(step, seed=step)
        flip_a_byte(run.step(step))
    run.save(100, seed=1)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000100"]
    assert reached(tmp_path, "") == 100


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


MOMENTS = ["column a", "column b", "the json", "the rename"]


def failing(monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException) -> None:
    """Have what is written at some moment fail."""
    real = {"save": part.save_file, "sealed": places.sealed, "rename": Path.rename}

    def fails(*_: object, **__: object) -> NoReturn:
        raise error

    if moment.startswith("column"):
        name = moment.replace(" ", "-")
        monkeypatch.setattr(
            part,
            "save_file",
            lambda state, path: fails() if name in path.name else real["save"](state, path),
        )
    elif moment == "the json":
        monkeypatch.setattr(places, "sealed", fails)
    else:
        monkeypatch.setattr(Path, "rename", fails)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_a_warning_and_the_next_save_is_made(run, monkeypatch, moment):
    run.save(3, seed=1)
    with monkeypatch.context() as patch:
        failing(patch, moment, OSError(errno.ENOSPC, "No space left on device"))
        run.begin(6, seed=2)
        run.checkpoints.finish()
        (warning,) = [event for event in run.told if isinstance(event, Warned)]
        assert "step 6" in warning.text
        assert "No space left on device" in warning.text
        assert "the last one is of step 3" in warning.text
        run.begin(7, seed=2)
        with pytest.raises(SetupError, match=r"step 7 .*No space left.* goes on from step 3"):
            run.checkpoints.finish(must=True)
    assert [path.name for path in (run.folder / CHECKPOINTS).iterdir()] == ["step-00000003"]
    run.save(9, seed=3)
    assert run.resume()[0].step == 9


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["the json", "the rename"])
def test_a_death_while_saving_leaves_the_checkpoint_before(run, monkeypatch, moment):
    run.save(3, seed=1)
    with monkeypatch.context() as patch:
        failing(patch, moment, Killed())
        run.begin(6, seed=2)
        with pytest.raises(Killed):
            run.checkpoints.finish()
    assert len(list((run.folder / CHECKPOINTS).glob("step-00000006.*.partial"))) == 1
    assert reached(run.folder, "") == 3
    assert run.resume()[0].step == 3
    run.save(9, seed=3)
    assert run.resume()[0].step == 9
    assert list((run.folder / CHECKPOINTS).glob("*.partial")) == []


def test_a_disk_that_has_gone_is_not_written_to_anew(run):
    run.save(3, seed=1)
    there = run.folder / CHECKPOINTS
    there.rename(run.folder / "away")
    run.begin(6, seed=2)
    run.checkpoints.finish()
    assert "No such file" in next(e.text for e in run.told if isinstance(e, Warned))
    assert not there.exists()
    # Nor does a new start take it for a run that has not begun.
    (run.folder / "attempts.jsonl").write_text('{"attempt": 1, "step": 3}\n{"att')
    run.checkpoints = Checkpoints(run.folder, Place(), ABOUT, run.told.append, keep=1)
    with pytest.raises(SetupError, match=r"holds no checkpoint, but the run had one of step 3"):
        run.checkpoints.resume(*network(seed=99))
    assert not there.exists()
    (run.folder / "away").rename(there)
    run.save(6, seed=2)
    assert run.resume()[0].step == 6


def limited(folder: Path, bytes_: int) -> None:
    """Save with a limit on the size of files, which the kernel enforces."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
    run = Run(folder)
    run.begin(3, seed=1)
    run.checkpoints.finish()
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    run.save(6, seed=2)
    (folder / "told").write_text("\n".join(e.text for e in run.told if isinstance(e, Warned)))


def test_what_the_kernel_refuses_is_a_warning(tmp_path):
    process = mp.get_context("spawn").Process(target=limited, args=(tmp_path, 10_000))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "File too large" in (tmp_path / "told").read_text()
    assert Run(tmp_path).resume()[0].step == 6


def test_training_goes_on_while_the_state_of_before_is_written(run, monkeypatch):
    net, optimiser = network(seed=1)
    go = threading.Event()
    real = part.save_file
    monkeypatch.setattr(part, "save_file", lambda *words: (go.wait(), real(*words)))
    run.checkpoints.begin(Mark(step=3, position=24), net, optimiser)
    assert run.checkpoints.busy
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
        for velocity in optimiser.velocities.values():
            velocity.fill_(7)
    go.set()
    run.checkpoints.finish(must=True)
    assert not run.checkpoints.busy
    assert not run.checkpoints.pending
    assert same(run.resume()[1], seed=1)


def test_what_must_come_before_a_checkpoint_can_hold_it_back(tmp_path):
    def rows_are_on_the_disk() -> None:
        raise SetupError("rows are missing")

    (tmp_path / CHECKPOINTS).mkdir()
    told: list = []
    saves = Checkpoints(tmp_path, Place(), ABOUT, told.append, keep=1)
    saves.before = rows_are_on_the_disk
    saves.begin(Mark(step=3, position=24), *network(seed=1))
    saves.finish()
    assert "rows are missing" in told[0].text
    assert reached(tmp_path, "") == 0


def test_the_best_ones_stay_besides_the_last(tmp_path):
    run = Run(tmp_path, keep=2, keep_best=2)
    for step, error in enumerate([0.9, 0.5, None, 0.5, 0.4, None, None, 0.8], start=1):
        run.save(step, seed=step, error=error)
        if step == 6:
            run.resume()  # a restart does not forget which were good
    names = sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())
    assert names == [f"step-{step:08d}" for step in (4, 5, 7, 8)]


def test_a_process_of_an_older_start_cannot_write_into_a_newer_save(run):
    """Both save the same step; the names they write under differ."""
    old = run.checkpoints
    old.begin(Mark(step=3, position=24), *network(seed=1))
    run.open()
    run.begin(3, seed=2)
    run.checkpoints.finish(must=True)
    assert same(run.resume()[1], seed=2)
    old.close()
    assert same(run.resume()[1], seed=2)


def test_a_checkpoint_of_another_network_is_refused(run):
    run.save(3, seed=1)
    found = newest(run.folder / CHECKPOINTS, run.told.append)
    assert found is not None
    wider = AlexNet(classes=len(CLASSES), width=0.1)
    with pytest.raises(Exception, match=r"step-00000003: the state does not fit the network"):
        checkpoint.load(found.path, wider)
