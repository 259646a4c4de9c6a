"""Checkpoints: whole or not there, checked to the byte, and nothing lost on the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import cluster.checkpoint.format as checkpoint
import cluster.checkpoint.storage as storage
import cluster.checkpoint.writer as writer
from cluster.checkpoint.format import choose_checkpoint
from cluster.checkpoint.storage import find_last_step
from cluster.checkpoint.writer import CheckpointManager
from cluster.mesh import ProcessMesh
from cluster.run.events import Saved
from cluster.run.folder import CHECKPOINTS, Mark
from model.alexnet import AlexNet
from pipeline.tools.errors import DataError, SetupError
from tests.helpers.checkpoints import ABOUT, CLASSES, Run, flip_a_byte, network, same, steps


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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
    assert run.names() == steps(3, 10)
    assert find_last_step(tmp_path, "") == 10


def test_damaged_later_ones_neither_stay_nor_push_out_the_sound_one(tmp_path):
    run = Run(tmp_path, keep=1)
    for step in (200, 400):
        run.save(step, seed=step)
        flip_a_byte(run.step(step))
    run.save(100, seed=1)
    assert run.names() == steps(100)
    assert find_last_step(tmp_path, "") == 100


def cut_short(step: Path) -> None:
    data = (step / "column-a.safetensors").read_bytes()
    (step / "column-a.safetensors").write_bytes(data[:-1])


def other_version(step: Path) -> None:
    path = step / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def edit(**changes: object) -> Callable[[Path], None]:
    """Return a damage: other values in checkpoint.json, of a store that lies (no digest) or not."""

    def harm(step: Path) -> None:
        path = step / "checkpoint.json"
        table = json.loads(path.read_text()) | changes
        if "position" not in changes:
            del table["sha256"]
        path.write_text(json.dumps(table))

    return harm


FACTS = {"bytes": 0, "sha256": "0" * 64}
PAIR = dict.fromkeys(["column-a.safetensors", "column-b.safetensors"], FACTS)
DEEP = "[" * 100_000
DAMAGES = {
    "another position": (edit(position=25), "checkpoint.json does not have the SHA-256"),
    "an absolute name": (edit(files={**PAIR, "/etc/passwd": FACTS}), "names a file '/etc/passwd'"),
    "a name above": (edit(files={**PAIR, "../x": FACTS}), "it names a file '../x'"),
    "a third column": (edit(config={"columns": 3}), "columns is 3"),
    "true columns": (edit(config={"columns": True}), "columns is True"),
    "no column": (edit(files={}), "a column is missing"),
    "a list of files": (edit(files=["column-a.safetensors"]), "files is ['column-a"),
    "a list as config": (edit(config=[1]), "config is [1]"),
    "classes that are numbers": (edit(classes=[1, 2]), "classes is [1, 2]"),
    "an error in words": (edit(top1_error="low"), "top1_error is 'low'"),
    "half a byte": (edit(files={**PAIR, "column-a.safetensors": {**FACTS, "bytes": 0.5}}), "0.5"),
    "another step": (edit(step=7), "it is of step 7"),
    "a deep json": (lambda step: (step / "checkpoint.json").write_text(DEEP), "too deeply"),
    "a flipped bit": (flip_a_byte, "column-b.safetensors does not have the SHA-256"),
    "a cut file": (cut_short, "column-a.safetensors has"),
    "a lost file": (lambda step: (step / "column-a.safetensors").unlink(), "column-a.safetensors'"),
    "no json": (lambda step: (step / "checkpoint.json").unlink(), "checkpoint.json'"),
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
    (warning,) = run.warnings
    assert str(run.step(6)) in warning
    assert words in warning


def test_a_checkpoint_of_before_has_no_hash_of_its_json_and_is_taken(run):
    run.save(3, seed=1)
    edit()(run.step(3))
    assert "sha256" not in json.loads((run.step(3) / "checkpoint.json").read_text())
    assert run.resume()[0].step == 3
    assert run.warnings == []


def test_files_that_hold_no_tensors_are_a_line(run):
    """Their hashes are right: whoever made them is not to be trusted."""
    for content, words in ((b"", "holds no tensors"), (save({"weights/x": torch.ones(1)}), "'x'")):
        (run.folder / "column-a.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=words):
            checkpoint.load_columns(run.folder, [0], "weights/")


def test_a_damaged_one_is_replaced_when_the_run_comes_by_again(run):
    run.save(3, seed=1)
    flip_a_byte(run.step(3))
    run.save(3, seed=2)
    assert same(run.resume()[1], seed=2)


def test_training_goes_on_while_the_state_of_before_is_written(run, monkeypatch):
    net, optimizer = network(seed=1)
    go = threading.Event()
    real = writer.save_file
    monkeypatch.setattr(writer, "save_file", lambda *words: (go.wait(), real(*words)))
    run.checkpoints.begin(Mark(step=3, position=24), net, optimizer)
    assert run.checkpoints.is_busy
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
        for velocity in optimizer.velocities.values():
            velocity.fill_(7)
    go.set()
    run.checkpoints.finish(must=True)
    assert not run.checkpoints.is_busy
    assert not run.checkpoints.is_pending
    assert same(run.resume()[1], seed=1)


def test_what_must_come_before_a_checkpoint_can_hold_it_back(tmp_path):
    def rows_are_on_the_disk() -> None:
        raise SetupError("rows are missing")

    (tmp_path / CHECKPOINTS).mkdir()
    told: list = []
    saves = CheckpointManager(tmp_path, ProcessMesh(), ABOUT, told.append, keep=1)
    saves.before = rows_are_on_the_disk
    saves.begin(Mark(step=3, position=24), *network(seed=1))
    saves.finish()
    assert "rows are missing" in told[0].text
    assert find_last_step(tmp_path, "") == 0


def test_the_best_ones_stay_besides_the_last(tmp_path):
    run = Run(tmp_path, keep=2, keep_best=2)
    for step, error in enumerate([0.9, 0.5, None, 0.5, 0.4, None, None, 0.8], start=1):
        run.save(step, seed=step, error=error)
        if step == 6:
            run.resume()  # a restart does not forget which were good
    assert run.names() == steps(4, 5, 7, 8)


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
    found = choose_checkpoint(run.folder, "", run.told.append)
    wider = AlexNet(classes=len(CLASSES), width=0.1)
    with pytest.raises(Exception, match=r"step-00000003: the state does not fit the network"):
        checkpoint.load_checkpoint(found.path, wider)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are not written before it is set."""
    gate, real = threading.Event(), writer.save_file
    monkeypatch.setattr(writer, "save_file", lambda *words: (gate.wait(20), real(*words)))
    return gate


def test_a_save_that_takes_too_long_is_not_waited_for(run, gate, monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE", 0.1)
    run.begin(3, seed=1)
    run.begin(6, seed=2)  # is skipped
    run.begin(9, seed=3)  # likewise
    assert ["6 is skipped" in run.warnings[0], "9 is skipped" in run.warnings[1]] == [True, True]
    assert run.checkpoints.is_pending
    gate.set()
    while run.checkpoints.is_busy:
        time.sleep(0.01)
    run.checkpoints.finish()
    assert run.saved == [3]
    monkeypatch.undo()
    run.save(12, seed=4)
    assert run.names() == steps(3, 12)


def test_the_last_save_is_made_even_if_the_one_before_is_slow(run, gate, monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE", 0.1)
    run.begin(3, seed=1)
    run.begin(6, seed=2)  # is skipped, until the end is waited for
    threading.Timer(0.3, gate.set).start()
    run.checkpoints.finish(must=True)
    assert run.saved == [3, 6]
    assert same(run.resume()[1], seed=2)


def test_a_last_save_that_never_ends_is_an_error(run, gate, monkeypatch):
    monkeypatch.setattr(writer, "LIMIT", 0.1)
    run.begin(3, seed=1)
    with pytest.raises(SetupError, match=r"step 3 cannot be written .*it is not written after"):
        run.checkpoints.finish(must=True)
    assert run.names() == []
    gate.set()


def test_no_thread_is_left_and_nothing_half_written_looks_like_a_checkpoint(run, gate):
    before = set(threading.enumerate())
    run.begin(3, seed=1)
    (thread,) = set(threading.enumerate()) - before
    gate.set()
    run.checkpoints.close()
    assert not thread.is_alive()
    assert find_last_step(run.folder, "") == 0
    (left,) = run.names()
    assert left.endswith(".partial")
    assert run.resume()[0] == Mark()
    assert run.names() == []


def test_a_checkpoint_that_is_removed_by_half_is_none(run, monkeypatch):
    run.keep = 1
    run.open()
    run.save(3, seed=1)
    monkeypatch.setattr(
        storage.shutil, "rmtree", lambda *_, **__: None
    )  # dies before the first file
    run.save(6, seed=2)
    assert find_last_step(run.folder, "") == 6
    assert [name for name in run.names() if not name.endswith(".partial")] == list(steps(6))


def test_a_store_that_is_a_folder_must_be_there(tmp_path):
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", store=str(tmp_path / "store"))
    with pytest.raises(SetupError, match=r"store/checkpoints cannot be used \(No such file"):
        run.checkpoints.resume(*network(99))
    (tmp_path / "store").mkdir()
    run.checkpoints.resume(*network(99))
    run.save(3, seed=1)
    assert [path.name for path in (tmp_path / "store" / CHECKPOINTS).iterdir()] == list(steps(3))
    assert run.names() == []
    assert run.resume()[0].step == 3
