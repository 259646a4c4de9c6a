"""The first line of a command comes before its slow imports."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from pipeline.tools import startup
from pipeline.tools.startup import FirstLine, install_first_line, install_for_module
from pipeline.tools.stdio import _Output, standard_streams


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Import hooks of this process, put back afterwards; nothing counts as printed."""
    others = [hook for hook in sys.meta_path if not isinstance(hook, FirstLine)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(_Output, "has_written", False)
    return sys.meta_path


def test_the_line_is_there_before_the_slow_module_runs(
    hooks: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("quick_library", "slow_library"):
        (tmp_path / f"{name}.py").write_text(f"import sys; sys.stderr.write('{name} runs\\n')\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(startup, "SLOW", {"slow_library"})
    install_first_line("evaluate", ["runs/a", "--views", "10", "s3://me:secret@bucket"])
    install_first_line("evaluate", ["s3://me:secret@bucket/a", "--views", "10"])  # in its place
    importlib.import_module("quick_library")
    importlib.import_module("slow_library")
    assert capsys.readouterr().err.splitlines() == [
        "quick_library runs",
        "evaluate s3://***@bucket/a: loading slow_library ...",
        "slow_library runs",
    ]
    assert not any(isinstance(hook, FirstLine) for hook in hooks)


def test_a_command_that_has_printed_says_nothing_more(
    hooks: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    install_first_line("train", ["demo"])
    with standard_streams():
        sys.stderr.write("demo -> runs/demo\n")
        hooks[0].find_spec("torch")
    assert capsys.readouterr().err == "demo -> runs/demo\n"


@pytest.mark.parametrize(
    ("argv", "original", "line"),
    [
        (["-m", "R"], ["python", "-m", "cluster.report", "R"], "report R: loading ray ...\n"),
        (["-m"], ["python", "-Imcluster.report"], "report: loading ray ...\n"),
        (["-m", "--help"], ["python", "-m", "cluster.report", "--help"], ""),
        (["report.py", "R"], ["python", "-m", "cluster.report", "R"], ""),  # a helper process
    ],
)
def test_a_module_is_announced_while_python_looks_for_it(
    hooks: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    argv: list[str], original: list[str], line: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    install_for_module()
    for hook in hooks[:]:
        if isinstance(hook, FirstLine):
            hook.find_spec("ray")
            hook.find_spec("torch")
    assert capsys.readouterr().err == line
