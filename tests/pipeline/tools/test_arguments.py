"""Command lines: empty words, ranges, and errors of the system as one line."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.samples import read_classes
from pipeline.throughput.report import load_report
from pipeline.tools.arguments import Options, parse_options, require_range
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write, read_document


@dataclass(frozen=True, kw_only=True)
class Inner:
    store: str = ""
    """An address."""


@dataclass(frozen=True, kw_only=True)
class Sample(Options):
    data: Annotated[Path, tyro.conf.Positional]
    """A folder."""
    out: Path | None = None
    """A folder."""
    count: int = 3
    """A number."""
    inner: Annotated[Inner, tyro.conf.OmitArgPrefixes]
    """More."""


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([""], "an argument"),
        (["d", "--out", ""], "--out"),
        (["d", "--out="], "--out"),
        (["d", "--count", ""], "--count"),
        (["--store", "", ""], "an argument"),
    ],
)
def test_an_empty_word_is_an_unset_variable_and_not_this_folder(words, name):
    with pytest.raises(UsageError, match=f"^{name} is empty .a variable that is not set"):
        parse_options(Sample, words, "x")


@pytest.mark.parametrize("words", [["d", "--store", ""], ["d", "--store="]])
def test_a_setting_that_is_empty_by_default_may_be_empty(words):
    assert parse_options(Sample, words, "x") == Sample(data=Path("d"), inner=Inner())


@pytest.mark.parametrize("flag", ["--out", ""])
def test_a_local_folder_is_no_address(flag):
    words = ["s3://bucket/run"] if not flag else ["d", flag, "s3://bucket/run"]
    with pytest.raises(UsageError, match="s3://bucket/run is an address; name a local one"):
        parse_options(Sample, words, prog="x")
    with pytest.raises(UsageError, match="is an address"):
        parse_options(Sample, ["file://"], prog="x")
    assert parse_options(Sample, ["a:b/c"], prog="x").data == Path("a:b/c")


@given(st.one_of(st.floats(), st.integers()), st.integers(-5, 5), st.integers(0, 9))
def test_a_number_is_from_low_to_high_or_refused(value, low, more):
    if low <= value <= low + more:
        require_range("at_once", value, low, low + more)
        return
    with pytest.raises(UsageError) as refused:
        require_range("at_once", value, low, low + more)
    assert str(refused.value) == f"--at-once {value} is out of range; give {low} to {low + more}"


def test_not_a_number_is_in_no_range():
    for low in (-math.inf, 0):
        with pytest.raises(UsageError):
            require_range("x", math.nan, low, math.inf)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 9), 2, "xxxxxxxxx: File name too"),
        (OSError(errno.EIO, "Input/output error", b"d"), 3, "Input/output error; mend it"),
        (OSError(errno.EMFILE, "Too many open files"), 3, "Too many open files; mend it"),
        (OSError("odd"), 3, "odd; mend it"),
        (MemoryError(), 3, "out of memory (MemoryError)"),
    ],
)
def test_an_error_of_the_system_is_one_line(capsys, error, code, text):
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(fail)
    told = capsys.readouterr().err
    assert ended.value.code == code
    assert told.startswith("error: ")
    assert text in told
    assert told.count("\n") == 1


def test_a_device_or_a_pipe_is_never_replaced_by_a_file(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(UsageError, match=f"{path} is a device or a pipe"), atomic_write(path):
            raise AssertionError
    assert pipe.is_fifo()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_full_disk_names_the_file(tmp_path, capsys):
    def fill() -> int:
        with atomic_write(tmp_path / "index.npy"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        run(fill)
    told = capsys.readouterr().err
    assert (
        told == f"error: {tmp_path}/index.npy: No space left on device; mend it, or name another\n"
    )


def test_a_device_is_no_document():
    for read in (read_document, read_classes, load_report):
        with pytest.raises((OSError, UsageError), match="a device"):
            read(Path("/dev/zero"))
