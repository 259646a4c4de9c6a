"""Checkpoints in an object store (moto on loopback)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import cluster.checkpoint.storage as storage
import cluster.checkpoint.writer as writer
from cluster.checkpoint.format import choose_checkpoint, collect_state, load_checkpoint
from cluster.checkpoint.storage import find_last_step
from cluster.mesh import ProcessMesh, create_mesh
from cluster.run.sync import open_mirror
from cluster.training.loop import train
from pipeline.remote.filesystem import RetryPolicy
from pipeline.remote.target import StoreTarget, open_store
from pipeline.tools.errors import DataError, SetupError, UsageError
from tests.helpers.checkpoints import Run, network, same
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import CONFIG, alone, learned, rows, weights

BRIEF = RetryPolicy(attempts=2, first_delay=0.01, stall=5.0)


@pytest.fixture
def run(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with its checkpoints below s3://.../a/b."""
    monkeypatch.setattr(
        storage, "open_store", lambda *names: replace(open_store(*names), policy=BRIEF)
    )
    monkeypatch.setattr(storage, "HURRY", BRIEF)
    return Run(tmp_path, store=f"{s3_bucket}/a/b")


def bucket(run: Run) -> Any:
    return pytest.importorskip("boto3").resource("s3").Bucket(run.store.split("/")[2])


def there(run: Run) -> dict[int, list[str]]:
    """Files by step, as somebody else's client sees them."""
    found: dict[int, list[str]] = {}
    for item in bucket(run).objects.filter(Prefix="a/b/checkpoints/"):
        name, file = item.key.removeprefix("a/b/checkpoints/").split("/")
        found.setdefault(int(name.split("-")[1]), []).append(file)
    return found


def key(run: Run, step: int, file: str) -> str:
    (found,) = [
        item.key
        for item in bucket(run).objects.filter(Prefix=f"a/b/checkpoints/step-{step:08d}-")
        if item.key.endswith(file)
    ]
    return found


WHOLE = ["checkpoint.json", "column-a.safetensors", "column-b.safetensors"]


def test_everything_comes_back_and_nothing_is_left_on_this_machine(run, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(run.folder / "temporary"))
    (run.folder / "temporary").mkdir()
    run.save(3, seed=1)
    mark, state = run.resume()
    assert mark.step == 3
    assert same(state, seed=1)
    assert there(run) == {3: WHOLE}
    assert run.names() == []
    assert list((run.folder / "temporary").iterdir()) == []


def test_the_newest_and_the_best_are_kept(run):
    run.keep, run.keep_best = 2, 1
    run.open()
    for step, error in enumerate([0.9, 0.5, 0.7, None, None], start=1):
        run.save(step, seed=step, error=error)
    assert there(run) == {2: WHOLE, 4: WHOLE, 5: WHOLE}
    assert find_last_step(run.folder, run.store) == 5


def flip(run: Run, step: int) -> None:
    item = bucket(run).Object(key(run, step, "column-b.safetensors"))
    data = bytearray(item.get()["Body"].read())
    data[-7] ^= 1
    item.put(Body=bytes(data))


def cut(run: Run, step: int) -> None:
    item = bucket(run).Object(key(run, step, "column-a.safetensors"))
    item.put(Body=item.get()["Body"].read()[:-1])


def lose(run: Run, step: int) -> None:
    bucket(run).Object(key(run, step, "column-a.safetensors")).delete()


def garble(run: Run, step: int) -> None:
    bucket(run).Object(key(run, step, "checkpoint.json")).put(Body=b'{"ver')


@pytest.mark.parametrize("harm", [flip, cut, lose, garble])
def test_a_damaged_one_is_named_passed_over_and_replaced(run, harm: Callable[[Run, int], None]):
    run.save(3, seed=1)
    run.save(6, seed=2)
    damaged = key(run, 6, "checkpoint.json").removesuffix("/checkpoint.json")
    harm(run, 6)
    mark, state = run.resume()
    assert mark.step == 3
    assert same(state, seed=1)
    assert damaged in run.warnings[0]
    run.save(6, seed=3)  # its folder has another name
    assert there(run) == {3: WHOLE, 6: WHOLE}
    assert same(run.resume()[1], seed=3)


def test_all_damaged_is_an_error(run):
    run.save(3, seed=1)
    flip(run, 3)
    with pytest.raises(DataError, match=r"no checkpoint in s3://.*/a/b/checkpoints is sound"):
        run.resume()
    with pytest.raises(DataError, match="is sound"):
        choose_checkpoint(run.folder, run.store, run.told.append)


def test_readers_have_the_files_for_as_long_as_they_need_them(run):
    with pytest.raises(UsageError, match="no complete checkpoint yet"):
        choose_checkpoint(run.folder, run.store, run.told.append)
    run.save(3, seed=1, error=0.25)
    found = choose_checkpoint(run.folder, run.store, run.told.append)
    net, optimizer = network(99)
    load_checkpoint(found.path, net, optimizer)
    assert same(collect_state(net, optimizer), seed=1)
    assert (found.mark.step, found.error) == (3, 0.25)
    path = found.path
    del found
    assert not path.exists()


def test_what_a_crash_has_left_is_removed_but_nothing_newer(run):
    run.save(6, seed=1)
    for step in (3, 6, 9):
        bucket(run).put_object(
            Key=f"a/b/checkpoints/step-{step:08d}-abcd/column-a.safetensors", Body=b"half"
        )
    assert find_last_step(run.folder, run.store) == 6
    assert run.resume()[0].step == 6
    assert there(run) == {6: WHOLE, 9: WHOLE[1:2]}  # perhaps another process is writing this
    run.save(9, seed=2)
    assert there(run) == {6: WHOLE, 9: WHOLE}


def failing(monkeypatch: pytest.MonkeyPatch, what: str, file: str, times: int) -> list[str]:
    """Have the store fail the first times that a file of some name is read or written."""
    real, failed = StoreTarget.request, []

    def request(self: Any, name: str, action: Any, done: str = "read", size: int = 0) -> Any:
        def hesitant(system: Any, path: str) -> Any:
            if done == what and file in name and len(failed) < times:
                failed.append(name)
                raise OSError("Service Unavailable")
            return action(system, path)

        return real(self, name, hesitant, done, size)

    monkeypatch.setattr(StoreTarget, "request", request)
    return failed


@pytest.mark.parametrize("file", WHOLE)
def test_a_store_that_hesitates_is_asked_again(run, monkeypatch, file):
    failed = failing(monkeypatch, "written", file, 1)
    run.save(3, seed=1)
    assert len(failed) == 1
    assert run.warnings == []
    assert same(run.resume()[1], seed=1)


def test_the_best_is_chosen_among_those_that_the_store_gives(run, monkeypatch):
    run.save(3, seed=1, error=0.25)
    run.save(6, seed=2, error=0.5)
    assert choose_checkpoint(run.folder, run.store, run.told.append, best=True).mark.step == 3
    failing(monkeypatch, "read", "step-00000003-", 100)
    assert choose_checkpoint(run.folder, run.store, run.told.append, best=True).mark.step == 6


@pytest.mark.parametrize("file", ["column-b", "checkpoint.json"])
def test_a_store_that_fails_is_a_warning_and_the_next_save_is_made(run, monkeypatch, file):
    run.save(3, seed=1)
    with monkeypatch.context() as patch:
        failing(patch, "written", file, 100)
        run.begin(6, seed=2)
        run.checkpoints.finish()
        assert "step 6 cannot be written to s3://" in run.warnings[0]
        assert "Service Unavailable" in run.warnings[0]
        run.checkpoints.finish(must=True)  # waits until what was written of step 6 is removed
        run.begin(7, seed=2)
        with pytest.raises(SetupError, match=r"step 7 .*resumes from step 3"):
            run.checkpoints.finish(must=True)
    assert there(run) == {3: WHOLE}
    run.save(9, seed=3)
    assert there(run) == {3: WHOLE, 9: WHOLE}


def test_a_store_that_does_not_answer_says_nothing_about_its_checkpoints(run, monkeypatch):
    run.save(3, seed=1)
    run.save(6, seed=2)
    with monkeypatch.context() as patch:
        failing(patch, "read", "column-a", 100)
        with pytest.raises(SetupError, match=r"cannot be used .*Service Unavailable"):
            run.resume()
    assert run.warnings == []
    assert run.resume()[0].step == 6


def test_a_full_temporary_folder_is_named(run, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", fails)
    run.begin(3, seed=1)
    run.checkpoints.finish()
    assert f"No space left on device, in {tempfile.gettempdir()} (TMPDIR" in run.warnings[0]


def test_where_nothing_can_be_written_is_refused_at_once(tmp_path):
    for store, words in {
        "https://host/folder": "checkpoints are written to folders and to object stores",
        "nosuch://host/folder": "checkpoints are written to folders and to object stores",
        "s3://": "names no bucket",
    }.items():
        with pytest.raises(UsageError, match=words):
            Run(tmp_path, store=store)


def pair(rank: int, folder: Path, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = create_mesh([(0, 1)], torch.device("cpu"), cores=1)
    own = folder / str(rank)  # no folder that both see
    own.mkdir()
    run = Run(own, store=store, mesh=mesh)
    mark, state = run.resume()
    assert (mark.step, same(state, seed=1), len(state)) == (3, True, 2 * 16)
    run.save(6, seed=2)
    dist.destroy_process_group()


def test_a_pair_without_a_folder_that_both_see_goes_on_from_one_process_and_back(run):
    run.save(3, seed=1)
    run_ranks(pair, (run.folder, run.store), 2)
    mark, state = run.resume()
    assert mark.step == 6
    assert same(state, seed=2)


def test_a_run_goes_on_on_another_machine_with_nothing_but_the_store(run, tiny_data, tmp_path):
    """The first machine is asked to end within step 4; the second has an empty folder."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    alone(CONFIG, tiny_data, whole)
    config = replace(CONFIG, store=run.store)
    first.mkdir()
    tell, stops = run.told.append, iter([False] * 3 + [True] * 9)
    train(config, str(tiny_data), first, ProcessMesh(), tell, is_stopping=lambda: next(stops))
    assert find_last_step(first, run.store) == 4

    second.mkdir()
    mirror = open_mirror(second, run.store)
    assert mirror is not None
    assert "metrics.jsonl" in mirror.restore()
    assert mirror.restore() == []
    assert len(rows(second)) == 4
    alone(config, tiny_data, second)
    assert learned(second) == learned(whole)
    assert learned(second, "validation.jsonl") == learned(whole, "validation.jsonl")
    found = choose_checkpoint(second, run.store, run.told.append)
    columns = [load_file(found.path / file) for file in WHOLE[1:]]
    state, wanted = columns[0] | columns[1], weights(whole)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_rows_of_an_earlier_time_give_way_to_those_in_the_store(run, tmp_path):
    """A run that comes back to a machine where it was before: its rows there are longer, and of
    steps that were made again elsewhere."""
    there, back = tmp_path / "there", tmp_path / "back"
    for folder, texts in (
        (there, ["a1\n", "a2\n", "b3\n"]),
        (back, ["a1\n", "a2\n", "longer 3\n", "4\n"]),
    ):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(texts))
    first = open_mirror(there, run.store)
    assert first is not None
    first.begin()
    first.push()
    again = open_mirror(back, run.store)
    assert again is not None
    assert again.restore() == ["metrics.jsonl"]
    assert (back / "metrics.jsonl").read_text() == "a1\na2\nb3\n"
    with (back / "metrics.jsonl").open("a") as file:
        file.write("b4\nhalf")
    assert again.restore() == []  # what continues the copy stays
    again.begin()
    again.push()
    (back / "metrics.jsonl").unlink()
    assert again.restore() == ["metrics.jsonl"]
    assert (back / "metrics.jsonl").read_text() == "a1\na2\nb3\nb4\n"
    # Cut back to a checkpoint, parts that go beyond it are sent anew.
    (back / "metrics.jsonl").write_text("a1\n")
    again.begin()
    (back / "metrics.jsonl").write_text("a1\nc2\n")
    again.push()
    assert again.restore() == []
    (back / "metrics.jsonl").unlink()
    again.restore()
    assert (back / "metrics.jsonl").read_text() == "a1\nc2\n"


def test_a_store_cannot_put_other_files_into_a_run(run, tmp_path):
    """Nor can its checkpoint.json outside of it: `test_a_damaged_one_is_named_and_passed_over`."""
    target = open_store(run.store, "run")
    for name in ("config.toml", "rates-applied-3.toml", "rates.toml", ".lock", "error.log", "a/b"):
        with target.create(name) as file:
            file.write(b"from the store")
    there = tmp_path / "there"
    there.mkdir()
    mirror = open_mirror(there, run.store)
    assert mirror is not None
    taken = ["config.toml", "rates-applied-3.toml"]
    assert mirror.restore() == taken
    assert sorted(path.name for path in there.iterdir()) == taken
