"""Output of commands: any encoding, full and closed streams, control characters, credentials."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.tools.errors import DataError, Interrupted, UsageError, run
from pipeline.tools.stdio import OutputError, standard_streams
from pipeline.tools.terminal import Terminal

ESCAPE = "\x1b[2J\x1b]0;title\x07\x9b31m"
SECRET = "https://user:pass@host/a.tar?X-Amz-Credential=me&X-Amz-Signature=0123secret"


class Streams:
    """Standard output and error of a command, as bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()
        for name, stream in (("stdout", self.out), ("stderr", self.err)):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding))

    def run(self, main: Callable[[], int | None]) -> tuple[object, str, str]:
        """Run a command; return exit code, output and error output."""
        before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
        with pytest.raises(SystemExit) as ended:
            run(main)
        for number, handler in before.items():
            signal.signal(number, handler)
        return ended.value.code, self.out.getvalue().decode(), self.err.getvalue().decode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_written_in_any_encoding(encoding, monkeypatch):
    streams = Streams(monkeypatch, encoding)

    def main() -> None:
        sys.stdout.write("3 × 4 – \udcff ▁█ 猫\n")
        table = Table("a – b")
        table.add_row("━")
        Terminal(sys.stdout, width=40).print(table)
        raise UsageError("no 猫 \ud800 here")

    with pytest.raises(SystemExit):
        run(main)
    shown = streams.out.getvalue().decode(encoding)
    assert (
        shown.splitlines()[0]
        == {
            "ascii": "3 x 4 - \\udcff _# \\u732b",
            "latin-1": "3 × 4 - \\udcff _# \\u732b",
            "utf-8": "3 × 4 – \\udcff ▁█ 猫",
        }[encoding]
    )
    assert streams.err.getvalue().decode(encoding).startswith("error: no ")


def test_nothing_raw_and_no_secret_reaches_a_terminal(monkeypatch):
    def main() -> None:
        sys.stdout.write(f"name {ESCAPE}\n")
        sys.stderr.write(f"note: {SECRET} {ESCAPE}\n")
        terminal = Terminal(sys.stdout, width=200)
        terminal.print(Text(f"node {ESCAPE}"), soft_wrap=True)
        table = Table("name")
        table.add_row(f"node [/x] [red] :bee: {ESCAPE}")
        terminal.print(table)
        with Progress(TextColumn("{task.description}", markup=False), console=terminal) as bar:
            bar.add_task(f"[/x] {ESCAPE}", total=None)
        raise DataError(f"shard {ESCAPE} of {SECRET} is damaged")

    code, out, err = Streams(monkeypatch).run(main)
    assert code == 4
    assert "[/x] [red] :bee: " in out
    for text in (out, err):
        assert not set(text) & {"\x1b", "\x07", "\x9b"}
        assert "secret" not in text
        assert "pass" not in text
    assert "https://***@host/a.tar?***" in err
    assert err.splitlines()[-1].startswith(r"error: shard \x1b[2J\x1b]0;title\x07\x9b31m of ")


def test_colors_of_a_terminal_pass_and_nothing_else(monkeypatch):
    streams = Streams(monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = streams.run(lambda: sys.stdout.write(f"\x1b[1mhelp\x1b[0m{ESCAPE}\n") and 0)
    assert (code, out) == (0, "\x1b[1mhelp\x1b[0m" + repr(ESCAPE)[1:-1] + "\n")


def test_an_error_of_the_program_itself_shows_no_secret(monkeypatch):
    def main() -> None:
        raise ValueError(SECRET)

    code, _, err = Streams(monkeypatch).run(main)
    assert code == 1
    assert "Traceback" in err
    assert "secret" not in err


@pytest.mark.parametrize("word", [None, 3, "a word"])
def test_a_command_that_ends_itself_keeps_its_code(word, monkeypatch):
    code, _, err = Streams(monkeypatch).run(lambda: sys.exit(word))
    assert (code, err) == {None: (0, ""), 3: (3, ""), "a word": (1, "a word\n")}[word]


def test_a_full_output_is_told_once_and_takes_no_more(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with standard_streams():
            sys.stdout.write("x")
            with pytest.raises(OutputError, match="No space left"):
                sys.stdout.flush()
            sys.stdout.write("x")
            sys.stdout.flush()
        monkeypatch.undo()


COMMAND = """
import sys
from pipeline.tools.errors import run
def main():
    with open(sys.argv[1], "w") as file:  # takes no number of a closed stream
        assert file.fileno() > 2
        file.write("whole")
    for out in sys.argv[2:]:
        getattr(sys, out).write("text")
run(main)
"""


@pytest.mark.parametrize(
    ("outputs", "streams", "code", "said"),
    [
        ("stdout", "1>&-", 1, "standard output cannot be written (Bad file descriptor)"),
        ("stdout", ">/dev/full", 1, "standard output cannot be written (No space left on device)"),
        ("stdout", "| true", 141, ""),
        ("stderr", "0<&- 1>&- 2>&-", 0, ""),
        ("stderr", "2>/dev/full", 0, ""),
        ("", "1>&-", 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(outputs, streams, code, said, tmp_path):
    script, out, errors = tmp_path / "script.py", tmp_path / "out", tmp_path / "errors"
    script.write_text(COMMAND)
    line = f"{sys.executable} {script} {out} {outputs} 2>{errors} {streams}"
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        env=os.environ | {"PYTHONPATH": root}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert out.read_text() == "whole"
    assert said in errors.read_text()
    assert len(errors.read_text().splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("kind", "said"), [(KeyboardInterrupt, "\ninterrupted\n"), (Interrupted, "")]
)
def test_an_end_that_has_been_told_is_not_told_again(kind, said, capsys):
    def main():
        raise kind

    with pytest.raises(SystemExit) as ended:
        run(main)
    gc.unfreeze()
    assert (ended.value.code, capsys.readouterr().err) == (130, said)
