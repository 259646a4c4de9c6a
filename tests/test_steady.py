"""A stream runs for ever in the memory it has, and leaves nothing behind however it ends."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.batches import Stream

SECONDS = 20  # within which a process ends; most of it is for the imports of a busy machine

HEAD = """
import gc, os, signal, sys, time
from pathlib import Path
from pipeline.batches import Stream

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def held():
    return {"files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}

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
    status, out, err = ended(started(code, data, folder))
    assert (status, err) == (0, "")
    return json.loads(out)


def held() -> tuple[int, int]:
    """Open files and threads of this process, DALI's too."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("options", ["shuffle='full', ledger=folder", "shuffle='block', window=2"])
def test_twenty_epochs_take_no_more_memory_or_files_than_two(tiny_data, tmp_path, options):
    code = f"""
    import json
    before = held()
    with Stream(data, batch_size=16, threads=2, {options}) as stream:
        take(stream, 2 * 3)
        early = held() | {{"bytes": resident()}}
        take(stream, 18 * 3)
        late = held() | {{"bytes": resident()}}
    del stream
    print(json.dumps([before, early, late, held()]))
    """
    before, early, late, after = output(code, tiny_data, tmp_path)
    growth = late.pop("bytes") / early.pop("bytes")
    assert growth == pytest.approx(1, abs=0.05)
    assert late == early
    assert after == before


def test_thirty_streams_leave_nothing(tiny_data, tmp_path):
    code = """
    import json
    def use():
        with Stream(data, batch_size=16, threads=2, ledger=folder) as stream:
            take(stream, 2)
    for _ in range(3):
        use()
    before = held() | {"bytes": resident()}
    for _ in range(30):
        use()
    print(json.dumps([before, held() | {"bytes": resident()}]))
    """
    before, after = output(code, tiny_data, tmp_path)
    assert after.pop("bytes") / before.pop("bytes") == pytest.approx(1, abs=0.05)
    assert after == before


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "stream.close()", "del stream"])
def test_an_interpreter_that_exits_with_an_open_stream_is_silent(tiny_data, tmp_path, end):
    code = f"""
    stream = Stream(data, batch_size=16)
    take(stream, 4)
    {end}
    """
    assert ended(started(code, tiny_data, tmp_path)) == (0, "", "")
