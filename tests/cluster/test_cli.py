"""The command `duet`: verbs, presets, and its own one-line errors."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import VERBS, find_verb, main
from cluster.config import PRESETS, load_settings
from pipeline.tools.errors import UsageError
from tests.helpers.processes import run_command
from tests.helpers.training_processes import REPOSITORY


@pytest.mark.parametrize("name", [name for name in VERBS if name != "presets"])
def test_a_verb_is_a_module_with_a_main_of_words(name):
    spec = importlib.util.find_spec(VERBS[name].module)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text())
    (entry,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert [argument.arg for argument in entry.args.args][:1] == ["argv"]


def test_every_command_of_the_packages_is_a_verb():
    commands = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for package in ("pipeline", "model", "cluster")
        for path in (REPOSITORY / package).rglob("*.py")
        if "parse_options(" in (text := path.read_text()) or "tyro.cli(Summary" in text
    } - {"pipeline.tools.arguments", "cluster.build_shards"}
    assert commands == {verb.module for verb in VERBS.values()} - {"cluster.cli"}


def test_help_and_errors_come_at_once_and_without_the_libraries_of_the_verbs(capsys):
    script = "import sys; from cluster.cli import main; main(['--help']); " + (
        "sys.exit(any(name in sys.modules for name in ('torch', 'tyro', 'numpy', 'ray')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name, verb in VERBS.items():
        (line,) = (one for one in done.stdout.splitlines() if one.split()[:1] == [name])
        assert line.endswith(verb.help)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("duet ")
    for word, near in (("trian", "train"), ("neighbours", "neighbors"), ("--xyz", "--help")):
        with pytest.raises(UsageError, match=f"no verb .*{near}"):
            find_verb(word)
    assert find_verb("build_shards") == "build-shards"


def test_verbs_that_need_no_tensors_are_imported_without_torch():
    """The first line of a command, or its help, comes seconds earlier."""
    names = ["build-shards", "index-shards", "verify", "describe", "demo-images", "train",
             "presets", "status", "doctor", "summary"]  # fmt: skip
    modules = [VERBS[name].module for name in names]
    script = f"import sys, {', '.join(modules)}; " + (
        "sys.exit(', '.join(n for n in ('torch', 'ray', 'nvidia.dali') if n in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_verb_is_the_command(tmp_path):
    """Same help under another name, same error, same exit code."""
    as_verb, as_module = (
        run_command([sys.executable, "-m", *words, "--help"], cwd=REPOSITORY)
        for words in (("cluster.cli", "verify"), ("pipeline.verify",))
    )
    assert as_verb.returncode == as_module.returncode == 0
    assert as_verb.stdout.startswith("usage: duet verify ")
    renamed = as_module.stdout.replace("python -m pipeline.verify", "duet verify")
    assert as_verb.stdout.split() == renamed.split()
    failed = run_command([sys.executable, "-m", "cluster.cli", "verify", tmp_path], cwd=REPOSITORY)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: data set {tmp_path} has no manifest")


def test_presets_are_listed_with_their_claims_and_copied_to_be_edited(
    tmp_path, capsys, monkeypatch
):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(PRESETS.rglob("*.toml")))
    assert "no_conv3                    Without conv3: is depth needed?" in lines
    assert all(len(line.split()) > 2 for line in lines)
    monkeypatch.chdir(tmp_path)
    assert main(["presets", "copy", "dexp"]) == 0
    assert load_settings(tmp_path / "dexp.toml") == load_settings(PRESETS / "dexp.toml")
    assert main(["Presets", "copy", "dexp.toml", "mine.toml"]) == 0
    for words, message in (
        (["copy", "dexp"], r"dexp\.toml is there already; name another"),
        (["copy", "dxep", "new.toml"], "did you mean dexp"),
        (["copy"], r"presets copy NAME \[TO\]"),
        (["copy", "a", "b", "c"], r"presets copy NAME \[TO\]"),
        (["--json"], "use duet presets"),
    ):
        with pytest.raises(UsageError, match=message):
            main(["presets", *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dexp.toml", "mine.toml"]
