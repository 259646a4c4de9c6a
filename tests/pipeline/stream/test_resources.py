"""A stream keeps a constant amount of memory, files and threads, and releases them at any end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.batches import Stream
from pipeline.stream.prefetch import Prefetcher
from tests.helpers.processes import run_command

SECONDS = 20  # within which a process ends; most of it is for the imports of a busy machine

HEAD = """
import gc, json, os, sys, threading
from pathlib import Path
from pipeline.batches import Stream

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def held():
    names = {"files": "fd", "threads": "task"}
    found = {what: len(os.listdir(f"/proc/self/{name}")) for what, name in names.items()}
    # One watchdog serves all streams of a process, from the first on.
    watching = sum(thread.name == "watchdog" for thread in threading.enumerate())
    return found | {"threads": found["threads"] - watching}

def take(stream, count):
    for _ in range(count):
        next(stream)

data, folder = sys.argv[1:]
"""


def started(code: str, data: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(code), data, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that must end by itself."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running: {process.communicate()}")
    return process.returncode, out, err


def output(code: str, data: Path, folder: Path) -> dict:
    """The JSON that `code` prints and nothing else, here or on stderr."""
    done = run_command([sys.executable, "-c", HEAD + textwrap.dedent(code), data, folder])
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", ["shuffle='full', ledger=folder", "shuffle='block', window=2"])
def test_twenty_epochs_take_no_more_memory_or_files_than_two(tiny_data, tmp_path, options):
    """Memory and files are compared between the second epoch and the twentieth, of 12 batches each.

    Batches of 4: a batch more or less on its way is then no 5 % of so small a process.
    """
    code = f"""
    before = held()
    with Stream(data, batch_size=4, threads=2, {options}) as stream:
        take(stream, 2 * 12)
        early = held() | {{"bytes": resident()}}
        take(stream, 18 * 12)
        late = held() | {{"bytes": resident()}}
    del stream
    print(json.dumps([before, early, late, held()]))
    """
    before, early, late, after = output(code, tiny_data, tmp_path)
    assert late.pop("bytes") / early.pop("bytes") == pytest.approx(1, abs=0.05)
    assert late == early
    assert after == before


def test_thirty_streams_leave_nothing(tiny_data, tmp_path):
    code = """
    def use():
        with Stream(data, batch_size=4, threads=2, ledger=folder) as stream:
            take(stream, 2)
    for _ in range(10):
        use()
    before = held() | {"bytes": resident()}
    for _ in range(30):
        use()
    print(json.dumps([before, held() | {"bytes": resident()}]))
    """
    before, after = output(code, tiny_data, tmp_path)
    assert after.pop("bytes") / before.pop("bytes") < 1.1
    assert after == before


def test_a_stream_that_nobody_closed_leaves_nothing_when_it_is_collected(tiny_data, tmp_path):
    code = """
    before = held()
    for _ in range(3):
        stream = Stream(data, batch_size=16, threads=2, ledger=folder)
        take(stream, 2)
    del stream
    gc.collect()
    print(json.dumps([before, held()]))
    """
    before, after = output(code, tiny_data, tmp_path)
    assert after == before


def test_an_exception_in_the_block_comes_out_and_leaves_nothing(tiny_data, tmp_path):
    code = """
    before = held()
    try:
        with Stream(data, batch_size=16, threads=2, ledger=folder) as stream:
            take(stream, 2)
            raise ZeroDivisionError
    except ZeroDivisionError:
        del stream
        print(json.dumps([before, held()]))
    """
    before, after = output(code, tiny_data, tmp_path)
    assert after == before


def test_an_interpreter_that_exits_with_open_streams_is_silent(tiny_data, tmp_path):
    """A stream that still has a name, and one that only a collection of cycles would find."""
    code = """
    stream, lost = (Stream(data, batch_size=16) for _ in range(2))
    take(stream, 4)
    take(lost, 4)
    lost.itself = lost
    del lost
    """
    assert ended(started(code, tiny_data, tmp_path)) == (0, "", "")


LOOP = """
with Stream(data, batch_size=16) as stream:
    for batch in stream:
        if batch.position == 64:
            print("going", flush=True)
"""


def test_ctrl_c_ends_a_loop_over_a_stream_and_nothing_else_is_said(tiny_data, tmp_path):
    process = started(LOOP, tiny_data, tmp_path)
    assert process.stdout.readline() == "going\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    status, out, err = ended(process)
    assert time.monotonic() - start < 8
    assert (status, out) == (-signal.SIGINT, "")
    first, *_, last = err.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "KeyboardInterrupt")
    assert err.count("Traceback") == 1
    assert "ignored" not in err


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_ctrl_c_while_a_batch_is_waited_for_comes_out_at_once(tiny_data, monkeypatch, prefetch):
    """Not behind the batches that are ready: the loop might end before, and never hear of it."""
    take, calls = Prefetcher.take, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return take(self)

    monkeypatch.setattr(Prefetcher, "take", interrupted)
    with Stream(tiny_data, batch_size=16, prefetch=prefetch) as stream:
        next(stream)  # takes `prefetch` batches, and each one after it another
        for _ in range(5 - prefetch):
            next(stream)
        assert len(calls) == 5
        with pytest.raises(KeyboardInterrupt):
            next(stream)


def test_a_closed_stream_gives_no_batch_and_closes_again(tiny_data):
    stream = Stream(tiny_data, batch_size=16)
    kept = next(stream).images
    copy = kept.clone()
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    assert kept.equal(copy)
