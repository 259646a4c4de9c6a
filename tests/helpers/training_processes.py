"""Small trainings as a user starts them, and the processes of theirs that live."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = "ray::RayTrainWorker"
"""Beginning of the title of workers and spares."""
GLOO = "pt_gloo_runloop"
"""Name of a thread in each process that is in a process group."""
STEPS = 80
SETTINGS = {
    "dtype": "float32",
    "width": 0.125,
    "batch_size": 8,
    "steps": STEPS,
    "checkpoint_every": 10,
    "validate_every": 30,
    "max_failures": 1,
}


@pytest.fixture(name="config", scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in SETTINGS.items()))
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["position"], row["loss"]) for row in map(json.loads, lines)]


def processes(mark: str, title: str = "") -> list[int]:
    """Return the living processes with `mark` in their environment, or in that of an ancestor."""
    parents, titles, ours = {}, {}, set()
    for folder in Path("/proc").iterdir():
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = (folder / "cmdline").read_bytes()
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                ours.add(pid)
        except (OSError, ValueError):
            continue
    # Processes that Ray gives a title lose their environment by it; their parents have theirs.
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return [pid for pid in ours if title.encode() in titles.get(pid, b"")]


def train_processes(mark: str) -> list[int]:
    """Return the workers that train, and not those that wait for a seat, by age."""
    found = []
    for pid in sorted(processes(mark, WORKER)):
        with suppress(OSError):
            threads = Path(f"/proc/{pid}/task").glob("*/comm")
            if any(GLOO in one.read_text() for one in threads):
                found.append(pid)
    return found


def sockets() -> Iterator[tuple[str, int, str]]:
    """Yield (address as /proc has it, port, inode) of every TCP socket that listens."""
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                address, _, port = fields[1].partition(":")
                yield address, int(port, 16), fields[9]


def listening(mark: str) -> list[tuple[str, str]]:
    """Return (title, address as /proc has it) of every TCP socket on which they listen."""
    addresses = {f"socket:[{inode}]": address for address, _, inode in sockets()}
    found = []
    for pid in processes(mark):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if address := addresses.get(str(descriptor.readlink())):
                    title = (
                        Path(f"/proc/{pid}/cmdline").read_bytes()[:40].decode("utf-8", "replace")
                    )
                    found.append((title, address))
    return found


class RunningCommand:
    """A command that runs, its lines as they come.

    Args:
        process: the command, both its outputs in one pipe of text.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def until(self, words: str, seconds: float = 180) -> str:
        """Wait for a line that matches `words`; return it."""
        deadline = time.monotonic() + seconds
        while True:
            ended = not self._reader.is_alive()
            if found := [line for line in self.lines if re.search(words, line)]:
                return found[-1]
            assert not ended, "\n".join(self.lines)
            assert time.monotonic() < deadline, "\n".join([f"no {words!r} in:", *self.lines])
            time.sleep(0.1)

    def end(self, seconds: float = 300) -> int:
        """Wait for its end; return its exit code."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code


LOOPBACK = (
    "0100007F",
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # 127.0.0.1 as IPv6 has it
)


def end_processes(mark: str) -> None:
    """End what is left of them."""
    for pid in processes(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(**more: str) -> tuple[str, dict[str, str]]:
    """Return a mark, and an environment with it."""
    value = str(uuid.uuid4())
    environment = {**os.environ, "DUET_TEST": value, **more}
    environment.pop("RAY_ADDRESS", None)
    return f"DUET_TEST={value}", environment


OURS = re.compile(
    r"\S+tiny\.toml -> |48 images, |starting: |going on from |restarted, going on|stopped; "
    r"|(still )?(starting Ray and|attaching to Ray and starting) the workers"
    r"|replica  column   node |\d        [ab]( and b)?  |stopping: saving first|interrupted"
    r"|the worker of replica \d, (column [ab]|columns a and b) \(node \S+\) "
    r"died: .*; starting again$"
    r"|1 damaged or withdrawn image was replaced|\S+ is finished"
    r"|step +\d+  (loss|validation|checkpoint|done|saved, and ended|from here on: lr)|$"
)


def strangers(lines: list[str]) -> list[str]:
    """Return the lines that a training that goes well does not print."""
    return [line for line in lines if not OURS.match(line)]
