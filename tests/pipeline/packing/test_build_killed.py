"""A build that is killed goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.packing import plan
from pipeline.packing.chunks import FOLDER, chunk_data_name, chunk_facts_name
from pipeline.remote.target import WORK
from pipeline.tools.errors import DuetError, UsageError
from pipeline.verify import verify
from tests.helpers.images import folder_per_class, packed
from tests.helpers.processes import drop_progress, run_command


class Cut(Exception):
    """The build ends here, as if it had been killed."""


SETTINGS = {"samples_per_shard": 20, "holdout": 0.2, "seed": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 x 60 images: with chunks of 8, thirty chunks and a dozen shards."""
    return folder_per_class(tmp_path_factory.mktemp("source"), 60)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 8)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "data"
    packed(out, train=source, **SETTINGS)
    return everything(out)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("many", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(source, undisturbed, tmp_path, many):
    """Forks build; each is killed after a random time, and the next goes on where it was."""
    out, draw = tmp_path / "data", random.Random(0)
    begun = time.monotonic()
    packed(tmp_path / "clock", train=source, **SETTINGS)
    whole = time.monotonic() - begun
    kills, progress, places = 0, set(), many // 4
    # On a busy machine many find nothing done yet: then there are more of them.
    while kills < many or (len(progress) <= places and kills < 10 * many):
        child = os.fork()
        if child == 0:
            try:
                packed(out, train=source, **SETTINGS)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 0.15 * whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):  # it came to the end: begin again, there are kills left
            assert everything(out) == undisturbed
            shutil.rmtree(out)
        else:
            progress.add(len(list((out / WORK).rglob("*.npz"))) if out.exists() else 0)
    packed(out, train=source, **SETTINGS)
    assert everything(out) == undisturbed
    assert verify(out) == []
    assert len(progress) > places  # they were killed in many places, and went on


def test_what_is_done_is_not_done_again(source, undisturbed, tmp_path):
    out = tmp_path / "data"
    seen: list[int] = []

    class Stops:
        """A pool that dies after twelve tasks, and notes what it is given."""

        def run(self, task, jobs):
            for job in jobs:
                if len(seen) == 12:
                    raise Cut
                seen.append(job.number)
                yield task(job)

    from pipeline.packing.build import build
    from tests.helpers.images import options

    for _ in range(3):
        with pytest.raises(Cut):
            build(options(out, train=source, **SETTINGS), pool=Stops())
        done, seen[:] = list(seen), []
        assert len(done) == 12
    packed(out, train=source, **SETTINGS)
    assert everything(out) == undisturbed


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "facts"])
def test_damage_to_what_was_done_is_mended(source, undisturbed, tmp_path, damage):
    out = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.packing.build.write_shards", _interrupted)
        with pytest.raises(Cut):
            packed(out, train=source, **SETTINGS)
    path = out / chunk_data_name(5)
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        (out / chunk_facts_name(5)).write_bytes(b"")
    packed(out, train=source, **SETTINGS)
    assert everything(out) == undisturbed


def _interrupted(*_: object) -> None:
    raise Cut


def test_who_stops_a_build_is_told_how_it_goes_on(source, undisturbed, tmp_path, capsys):
    out = tmp_path / "data"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for stage in ("pack_chunks", "write_shards", "seal"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"pipeline.packing.build.{stage}", stop)
            with pytest.raises(KeyboardInterrupt):
                packed(out, train=source, **SETTINGS)
        assert drop_progress(capsys.readouterr().err) == (
            f"\nstopped; {out} keeps what is packed, and the same command resumes there\n"
        )
    packed(out, train=source, **SETTINGS)
    assert everything(out) == undisturbed


def test_an_image_that_is_garbage_by_now_moves_the_others(source, tmp_path):
    """A chunk must be packed again, and its images are rejects now: shards are written anew."""
    copy, out = tmp_path / "source", tmp_path / "data"
    shutil.copytree(source, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.packing.build.seal", _interrupted)
        with pytest.raises(Cut):
            packed(out, train=copy, max_rejects=0.1, **SETTINGS)
    (out / chunk_facts_name(5)).unlink()
    (out / chunk_data_name(7)).write_bytes(b"")
    for garbage in sorted(copy.glob("*/*.jpg"))[40:48]:  # the images of chunk 5
        garbage.write_bytes(b"no picture")
    packed(out, train=copy, max_rejects=0.1, **SETTINGS)
    assert verify(out) == []
    packed(tmp_path / "anew", train=copy, max_rejects=0.1, **SETTINGS)
    assert everything(out) == everything(tmp_path / "anew")
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 8


def test_a_folder_deleted_under_a_build_leaves_nothing_to_the_next(source, tmp_path):
    """Workers of the first may still be writing chunks of other settings there."""
    out = tmp_path / "data"
    (out / FOLDER).mkdir(parents=True)
    packed(tmp_path / "other", train=source, quality=20, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.packing.build.write_shards", _interrupted)
        with pytest.raises(Cut):
            packed(tmp_path / "half", train=source, quality=20, **SETTINGS)
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "half", out)
    (out / WORK / "build.json").unlink()
    packed(out, train=source, **SETTINGS)
    packed(tmp_path / "anew", train=source, **SETTINGS)
    assert everything(out) == everything(tmp_path / "anew")


def test_an_unfinished_set_of_other_settings_is_refused(source, tmp_path):
    out = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.packing.build.write_shards", _interrupted)
        with pytest.raises(Cut):
            packed(out, train=source, **SETTINGS)
    with pytest.raises(UsageError, match="unfinished data set of seed 3, and this one is of 4"):
        packed(out, train=source, **{**SETTINGS, "seed": 4})
    (source / "cat/extra.jpg").write_bytes(b"")
    try:
        with pytest.raises(UsageError, match="unfinished data set of other images"):
            packed(out, train=source, **SETTINGS)
    finally:
        (source / "cat/extra.jpg").unlink()


def command(out: Path, source: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.build_shards", str(out), "--train", str(source), *more]


def test_a_full_disk_costs_one_line_and_no_work(source, tmp_path):
    """Files may not grow beyond 200 kB here: what a write to a full disk gets is an OSError too."""
    out = tmp_path / "data"
    limited = command(out, source, "--samples-per-shard", "200", "--workers", "1")
    limit = (200_000, 200_000)
    done = subprocess.run(
        limited,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 1, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if not line.startswith("packing: "))
    assert "File too large" in error
    assert "run the same command again" in error
    assert not list(out.rglob("*.partial"))
    done = run_command(limited)
    assert done.returncode == 0, done.stderr
    assert verify(out) == []


def test_room_for_what_is_mapped_is_taken_first(tmp_path):
    """A hole in a mapped file is a bus error on a full disk; room that is taken is not."""
    from pipeline.packing.shards import TAKEN_DTYPE, _allocate

    mapped = _allocate(tmp_path / "taken.bin", TAKEN_DTYPE, (100_000,))
    assert (tmp_path / "taken.bin").stat().st_blocks * 512 >= mapped.nbytes > 2_000_000


@pytest.mark.slow
def test_kill_of_the_command_leaves_nobody_behind(source, tmp_path):
    """kill -9 of the command: its workers end too, and the same command finishes the set."""
    out = tmp_path / "data"
    line = command(out, source, "--samples-per-shard", "20", "--workers", "2")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(process, lambda: (out / WORK / "build.json").exists())
    process.send_signal(signal.SIGSTOP)
    second = run_command(line)
    assert second.returncode == 2
    assert "is in use by another build" in second.stderr
    process.send_signal(signal.SIGCONT)
    _wait_for(process, lambda: list((out / FOLDER).glob("*.bin*")))
    workers = _children(process.pid)
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = run_command(line)
    assert done.returncode == 0, done.stderr
    assert verify(out) == []
    assert not (out / WORK).exists()


def _wait_for(process: subprocess.Popen[bytes], what: Callable[[], object]) -> None:
    while not what():
        assert process.poll() is None
        time.sleep(0.005)


def _children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in found]


def test_a_bad_disk_is_named(source, tmp_path, monkeypatch):
    """A disk that never gives back what was written ends the build, not in an endless loop."""
    from pipeline.packing import shards

    monkeypatch.setattr(shards, "isal_zlib", SimpleNamespace(crc32=lambda data: 1))
    with pytest.raises(DuetError, match="gives back other bytes"):
        packed(tmp_path / "data", train=source, **SETTINGS)
