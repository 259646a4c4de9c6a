"""Folders of runs: none, one that has only just begun, one that may not be read."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.report.records import read_records
from cluster.run.folder import format_toml
from cluster.run.state import read_state
from pipeline.tools.errors import SetupError, UsageError

LOOKING = {
    "status": "cluster.status",
    "report": "cluster.report.page",
    "evaluate": "cluster.evaluate",
    "export": "cluster.export",
    "neighbors": "cluster.experiments.neighbors.__main__",
    "codes": "cluster.experiments.neighbors.codes",
}
"""Module of each command that looks at a run."""


def refused(verb: str, run: Path) -> str:
    """Return the one line with which a command refuses a run, which stays as it was."""
    before = sorted(run.rglob("*"))
    with pytest.raises(UsageError) as caught:
        importlib.import_module(LOOKING[verb]).main([str(run)])
    assert sorted(run.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def begin(run: Path) -> Path:
    """Make RUN what it is when its training has begun, before the first step."""
    run.mkdir()
    origin = {"data": str(run / "nowhere")}
    (run / "config.toml").write_text(format_toml(Config(steps=9), "ab" * 32, "run-1", origin))
    (run / ".lock").touch()
    return run


@pytest.mark.parametrize("verb", LOOKING)
def test_what_is_no_run_yet_is_one_line(verb, tmp_path):
    assert "holds no run (config.toml is missing); name the --run" in refused(verb, tmp_path)
    assert "nowhere holds no run" in refused(verb, tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert f"{file} is a file; name the folder of a run" in refused(verb, file)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked/.lock").touch()
    assert "holds a run that has not begun" in refused(verb, tmp_path / "locked")
    (tmp_path / "config.toml").write_bytes(b"\xff")
    if verb != "report":  # which needs none
        assert "config.toml cannot be read (not text); mend it" in refused(verb, tmp_path)


def test_a_run_that_has_only_just_begun_is_one_line(tmp_path, capsys):
    run = begin(tmp_path / "run")
    for verb in ("evaluate", "export", "neighbors"):
        assert "has no complete checkpoint yet; train on" in refused(verb, run)
    assert "make them with" in refused("codes", run)
    assert importlib.import_module(LOOKING["status"]).main([str(run)]) == 0
    assert "not started" in " ".join(capsys.readouterr().out.split()), "a long name wraps"
    assert importlib.import_module(LOOKING["report"]).main([str(run)]) == 0
    assert (run / "report.html").is_file(), "which says that there is no step yet"


def test_rows_that_may_not_be_read_are_not_taken_for_none(tmp_path, monkeypatch):
    run = begin(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "position": 8}\n')

    opened = Path.open

    def forbid(path: Path, *words: Any, **named: Any) -> Any:
        if path.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *words, **named)

    monkeypatch.setattr(Path, "open", forbid)
    for look in (read_state, read_records):
        with pytest.raises(SetupError, match=r"metrics\.jsonl cannot be read .*permissions"):
            look(run)
