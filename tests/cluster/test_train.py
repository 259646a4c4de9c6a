"""The command `train` without Ray: a run knows its data set."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import cluster.train as driver
from cluster.config import Config
from cluster.evaluate import main as evaluate
from cluster.run.folder import read_run_id
from cluster.run.sync import DRIVER_FILES, open_mirror
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.record import read_address
from pipeline.remote.filesystem import StoreError
from pipeline.tools.errors import UsageError
from tests.helpers.http_servers import Server
from tests.helpers.images import packed
from tests.helpers.resealed_data import edit_manifest
from tests.helpers.training_runs import alone, rows

Command = Callable[..., int]


def test_a_set_without_classes_is_refused(tiny_data):
    manifest = replace(Manifest.load(tiny_data), classes=())
    with pytest.raises(UsageError, match="data set d has no classes to train for"):
        driver.check_data(SimpleNamespace(data="d"), manifest, None)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Train in this process, for two steps: `command(FLAGS...)`; the run is tmp_path/run."""

    def train_here(config: Config, data: str, run: Path, _: object) -> None:
        if mirror := open_mirror(run, config.store):
            mirror.push_whole(DRIVER_FILES)  # as the controller does
        alone(config, Path(data), run)

    monkeypatch.setattr(driver, "train_with_ray", train_here)
    monkeypatch.chdir(tmp_path)
    toml = tmp_path / "some.toml"
    toml.write_text(
        'dtype = "float32"\nwidth = 0.0625\nbatch_size = 8\nsteps = 2\nthreads = 1\n'
        "validate_every = 0\nschedule = 'manual'\nlr_drops = 1\n"
    )
    return lambda *words: driver.main([str(toml), "--run", str(tmp_path / "run"), *map(str, words)])


def refused(command: Command, *words: object, kind: type[Exception] = UsageError) -> str:
    """Return the one line with which a command is refused."""
    with pytest.raises(kind) as caught:
        command(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_resumed_run_needs_no_data(command, data, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert refused(command).endswith("run holds no run yet; give its data set by --data")
    assert not run.exists()
    assert command("--data", "data") == 0, "a relative folder"
    assert read_address(run) == str(data)
    assert command("--steps", "3") == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    data.rename(moved)
    said = refused(command, "--steps", "4")
    assert f"was at {data} and is not there" in said
    assert "give its new place by --data" in said
    assert command("--steps", "4", "--data", moved) == 0
    assert read_address(run) == str(moved)
    assert command("--steps", "5") == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    moved.rename(data)  # a finished run notes the new place, too, and else keeps its file
    before = (run / "config.toml").read_text()
    assert command("--steps", "5", "--keep", "7", "--data", data) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (run / "config.toml").read_text() == before.replace(str(moved), str(data))


def test_a_second_training_is_refused_until_the_first_is_killed(command, data, tmp_path):
    command("--data", data)
    lock = tmp_path / "run/.lock"
    hold = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        said = refused(command, "--steps", "3")
        assert f"{lock.parent} is in use by another training (" in said
        assert "wait for it, or name another" in said
        first.kill()
    assert command("--steps", "3") == 0, "at once"


def test_the_hash_is_checked_wherever_the_data_set_is(command, data, tmp_path):
    command("--data", data)
    edit_manifest(data, lambda table: table.update(seed=9))
    assert "data set (manifest)" in refused(command, "--steps", "3")
    assert "data set (manifest)" in refused(command, "--steps", "3", "--data", data)


def test_an_older_run_is_told_to_name_its_data(command, data, tmp_path):
    command("--data", data)
    path = tmp_path / "run/config.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("data =")))
    said = refused(command, "--steps", "3")
    assert "does not say where its data set is (older runs do not); give --data" in said
    assert command("--steps", "3", "--data", data) == 0
    assert read_address(tmp_path / "run") == str(data)


def test_the_record_travels_with_the_run_in_its_store(command, data, tmp_path):
    run, store = tmp_path / "run", f"memory://{uuid.uuid4()}/a"
    assert "holds no run yet" in refused(command, "--store", store)
    command("--store", store, "--data", data)
    name = read_run_id(run)
    shutil.rmtree(run)
    assert command("--store", store, "--steps", "3") == 0, "on a machine that has no RUN"
    assert read_address(run) == str(data)
    assert read_run_id(run) == name
    shutil.rmtree(run)
    data.rename(tmp_path / "moved")
    said = refused(command, "--store", store, "--steps", "4")
    assert f"the data set of {run} was at {data}" in said


def test_an_address_is_kept_without_its_password(command, server: Server, tmp_path, monkeypatch):
    """The server takes any password; the run keeps none."""
    run = tmp_path / "run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "train_with_ray", lambda *_: None)
    command("--data", server.address.replace("://", "://me:secret@"))
    assert "secret" not in (run / "config.toml").read_text()
    said = refused(command)
    assert "***@127.0.0.1" in said
    assert "whose credentials are not kept; give its address by --data" in said
    command("--data", server.address)
    assert read_address(run) == server.address
    command()
    server.fail("manifest.json", iter(["404"] * 9))
    said = refused(command, kind=StoreError)
    assert "it is not there" in said
    assert f"was at {server.address}; if it has moved, give --data" in said


def test_the_network_of_figure_1_reads_images_of_32_pixels_as_they_are(
    command, image_folder, tmp_path, capsys
):
    folders = {"train": image_folder / "train", "val": image_folder / "val"}
    raw, large, varied = (tmp_path / name for name in ("raw", "large", "varied"))
    packed(raw, **folders, size=32, encoding="raw")
    packed(large, **folders, size=64)
    packed(varied, **folders, fit="none")
    flags = ("--net", "four", "--columns", "1", "--norm", "none", "--width", "0.5")
    said = refused(command, "--data", raw)
    assert "images of 32x32, and net = 'paper' reads 224x224; build it with --size 256" in said
    said = refused(command, "--data", large, *flags)
    assert "holds images of 64x64, and net = 'four' reads 224x224; build it with --size 32" in said
    said = refused(command, "--data", varied)
    assert re.search(r"224x224 does not fit into the train sample \d+ of \d+x\d+", said)
    assert command("--data", raw, *flags) == 0
    run = tmp_path / "run"
    assert "image_size = 32" in (run / "config.toml").read_text()
    weights = load_file(run / "checkpoints/step-00000002/column-a.safetensors")
    shapes = {tuple(weights[name].shape) for name in weights if "fc4.weight" in name}
    assert shapes == {(4, 32 * 4 * 4)}  # as in the release: 4x4 maps where 28 pixels leave 3x3
    assert evaluate([str(run), "--views", "1"]) == 0
    assert json.loads((run / "evaluation-1.json").read_text())["samples"] == 20
    with pytest.raises(UsageError, match=r"ten views of .* would all be the same; use --views 1"):
        evaluate([str(run), "--views", "10"])
    with pytest.raises(UsageError, match="net = 'four' reads 32x32; build it with --size 32"):
        evaluate([str(run), "--views", "1", "--data", str(large)])
    assert command("--data", raw, *flags, "--steps", "3") == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    crops = ("--net", "local11", "--columns", "1", "--width", "0.25", "--image-size", "24")
    said = refused(command, "--data", large, *crops, "--run", tmp_path / "crops")
    assert "net = 'local11' reads 24x24; build it with --size 32" in said
    assert command("--data", raw, *crops, "--run", tmp_path / "crops") == 0
    assert evaluate([str(tmp_path / "crops"), "--views", "10"]) == 0  # corners of 24 in 32
