"""Processes for tests, forked from a server that has torch and DALI loaded already.

To start Python and import all that a command needs takes 4 s of a core; a fork of such a server
takes a tenth of one. Each process has an interpreter, signals, and an exit code of its own, as one
that was started from a shell; only module-level code of what is loaded before has run once before.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import multiprocessing.context
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

from pipeline.tools.errors import run


class _Fork(multiprocessing.context.ForkServerProcess):
    """A fork that has its starter's environment, and forks from the same server itself."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
        fork_where_code_spawns()
        super().run()


class _Forks(multiprocessing.context.ForkServerContext):
    Process = _Fork


FORKS = _Forks()
FORKS.set_forkserver_preload(
    [
        "cluster",  # before torch: it says how OpenMP's threads wait
        "torch",
        "torch.distributed",
        "torch.utils._python_dispatch",
        "nvidia.dali.fn",
        "pytest",
        "cluster.checkpoint.loader",
        "cluster.report.page",
        "cluster.training.loop",
        "pipeline.batches",
        "pipeline.packing.build",
    ]
)


def fork_where_code_spawns() -> None:
    """Have `get_context("spawn")` mean `FORKS` from now on, in this process.

    What is sent to a process is pickled either way. Real spawns are those of the commands that
    `tests/end_to_end` starts with Python.
    """
    multiprocessing.context._concrete_contexts["spawn"] = FORKS


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call `work(rank, *arguments)` in `count` processes; raise what one of them raises."""
    torch.multiprocessing.spawn(work, arguments, nprocs=count)


def start(
    target: Callable[..., None],
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> multiprocessing.process.BaseProcess:
    """Start `target(*arguments)` in a process, with an environment and a folder, and return it."""
    process = FORKS.Process(target=_call, args=(env, cwd, target, arguments))
    process.start()
    return process


def _call(
    env: Mapping[str, str] | None,
    cwd: Path | None,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    target(*arguments)


def start_command(
    command: Sequence[object],
    out: Path,
    err: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> multiprocessing.process.BaseProcess:
    """Start `python -m …`, `python -c …` or `python FILE …`; its output goes to two files."""
    python, *words = map(str, command)
    assert python == sys.executable, python
    assert words[0] in ("-m", "-c") or words[0].endswith(".py"), words
    return start(_run, out, err, words, env=env, cwd=cwd)


def run_command(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Do as `subprocess.run` with captured text does, for what `start_command` starts.

    Raises:
        TimeoutExpired: it takes longer than `timeout` seconds; it is killed.
        CalledProcessError: with `check`, its exit code is not 0.
    """
    words = list(map(str, command))
    with tempfile.TemporaryDirectory() as work:
        out, err = Path(work, "out"), Path(work, "err")
        process = start_command(command, out, err, env=env, cwd=cwd)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        code = process.exitcode
        done = subprocess.CompletedProcess(
            words, code, out.read_text("utf-8"), err.read_text("utf-8")
        )
    if check and code:
        raise subprocess.CalledProcessError(code, words, done.stdout, done.stderr)
    return done


def call_command(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Do what `python -m MODULE …` does, exit code and messages included, in this process.

    It takes no time beyond the work: for all that does not test the process itself.
    """
    python, flag, name, *words = map(str, command)
    assert (python, flag) == (sys.executable, "-m"), command
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(lambda: module.main(words))
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.unfreeze()  # this process, whose end `run` takes it for, goes on
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def drop_progress(errors: str) -> str:
    """Return what a command wrote to stderr without the progress that a slow machine adds."""
    return re.sub(
        r"(?m)^(?!error|note)[^:\n]+: (?:[\d,]+ of [\d,]+ |[\d,]+ s so far$).*\n", "", errors
    )


def _run(out: Path, err: Path, words: list[str]) -> None:
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, write), (2, err, write)):
        file = os.open(name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = str(Path.cwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path[0] = ""
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end, and multiprocessing does not
