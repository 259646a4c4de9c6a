"""Two runs with one store: the second is refused, whether the first has ended or not."""

from __future__ import annotations

import errno
import json
import shutil
import uuid
from pathlib import Path

import pytest

import cluster.train as driver
from cluster.checkpoint.format import choose_checkpoint, read_newest_table
from cluster.checkpoint.storage import claim_store, open_storage
from cluster.run.folder import is_run_id, make_run_id, read_run_id
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.checkpoints import Run, network
from tests.helpers.training_runs import alone, learned, rows


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that is not there yet."""
    return str(tmp_path / "a/store") if request.param == "folder" else f"memory://{uuid.uuid4()}/a"


@pytest.fixture
def command(tiny_data, tmp_path, store, monkeypatch):
    """Train a run of some name in the store, in this process: `command(NAME, FLAGS...)`."""
    monkeypatch.setattr(
        driver, "train_with_ray", lambda config, data, run, _: alone(config, Path(data), run)
    )
    toml = tmp_path / "some.toml"
    toml.write_text(
        'dtype = "float32"\nwidth = 0.0625\nbatch_size = 8\nsteps = 2\nthreads = 1\n'
        "validate_every = 0\nschedule = 'manual'\nlr_drops = 1\n"
    )

    def train(name: str, *words: str) -> int:
        run = str(tmp_path / name)
        return driver.main(
            [str(toml), "--data", str(tiny_data), "--run", run, "--store", store, *words]
        )

    return train


def saved_by(store: str, run: Path) -> tuple[str, int]:
    """Return the name of the run that made the newest checkpoint, and its step."""
    table = read_newest_table(open_storage(run, store))
    assert table is not None
    return table["run"], table["step"]


def test_a_second_run_is_refused_and_the_first_goes_on(command, store, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command("first") == 0
    name = read_run_id(first)
    assert name.startswith("first-")
    assert saved_by(store, first) == (name, 2)
    with pytest.raises(UsageError) as caught:
        command("second", "--seed", "5", "--lr", "0.5")
    message = str(caught.value)
    assert "\n" not in message
    for words in (name, "at step 2", "seed: 0 -> 5", "-> 0.5", "another --store"):
        assert words in message
    assert [path.name for path in second.iterdir()] == [".lock"]  # nothing was fetched
    # One that has begun elsewhere, with the same settings, is another run all the same.
    (second / "config.toml").write_bytes((first / "config.toml").read_bytes())
    text = (second / "config.toml").read_text().replace(name, "second-0123")
    (second / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=rf"of run {name}, not of second-0123 in .*second; name"):
        command("second")
    with pytest.raises(UsageError, match=rf"of run {name}, not of second-0123"):
        choose_checkpoint(second, store, pytest.fail)  # nor may it be evaluated as the second's
    one = f"{store}/checkpoints/step-00000002"
    assert choose_checkpoint(first, "", pytest.fail, one).mark.step == 2
    with pytest.raises(
        UsageError, match=rf"{store}/checkpoints holds .* of run {name}, not of second-0123 in"
    ):
        choose_checkpoint(second, "", pytest.fail, one)
    assert command("first", "--steps", "4") == 0
    assert saved_by(store, first) == (name, 4)


def test_a_run_whose_folder_was_lost_goes_on_under_its_name(command, store, tmp_path):
    assert command("first") == 0
    name = read_run_id(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    assert command("elsewhere", "--steps", "3") == 0
    assert read_run_id(tmp_path / "elsewhere") == name
    assert saved_by(store, tmp_path) == (name, 3)
    assert rows(tmp_path / "elsewhere")[-1]["step"] == 3


def test_a_store_is_one_runs_while_it_lives(command, store, tmp_path):
    with claim_store(tmp_path / "first", store, "first-0123", pytest.fail):
        with pytest.raises(UsageError) as caught:
            command("second")
        message = str(caught.value)
        assert "is in use by another training (run first-0123, process" in message
        assert "\n" not in message
    assert command("second") == 0


def test_checkpoints_of_before_have_no_name_and_their_run_gets_one(command, store, tmp_path):
    assert command("first") == 0
    first = tmp_path / "first"
    text = (first / "config.toml").read_text()
    (first / "config.toml").write_text(text[: text.index("# The run,")])
    if (folder := Path(store) / "checkpoints/step-00000002").is_dir():
        table = json.loads((folder / "checkpoint.json").read_text())
        for key in ("run", "sha256"):
            del table[key]
        (folder / "checkpoint.json").write_text(json.dumps(table))
    assert command("first", "--steps", "3") == 0
    assert saved_by(store, first) == (read_run_id(first), 3)
    assert len(learned(first)) == 3


def test_where_no_lock_has_helped_neither_run_removes_the_others_checkpoints(tmp_path):
    """Two nodes whose shared file system locks for each of them alone."""
    (store := tmp_path / "store").mkdir()
    (store / "checkpoints").mkdir()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = Run(tmp_path / "one", keep=1, store=str(store), name="one-1")
    other = Run(tmp_path / "other", keep=1, store=str(store), name="other-2")
    one.save(3, seed=1)
    other.begin(2, seed=2)
    with pytest.raises(SetupError, match=r"step-00000003 is there, of run one-1, not of other-2"):
        other.checkpoints.finish(must=True)
    assert [path.name for path in (store / "checkpoints").iterdir()] == ["step-00000003"]
    with pytest.raises(SetupError, match="holds checkpoints of run one-1, not of other-2"):
        other.checkpoints.resume(*network(99))
    one.save(6, seed=1)


def test_names_of_runs_are_plain_and_differ():
    for folder in ("über runs", "a\nb", "\x1b[31m", "x" * 300, "\udcff", "/"):
        name = make_run_id(Path(folder))
        assert is_run_id(name)
        assert name != make_run_id(Path(folder))


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_run_on_a_file_system_without_flock_is_held_by_leases(command, store, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert command("first") == 0
    with (
        claim_store(Path(store).parent, store, "second-1", pytest.fail),
        pytest.raises(UsageError, match=r"another training \(run second-1, process"),
    ):
        command("first", "--steps", "3")
    assert command("first", "--steps", "3") == 0
