"""The command `duet`: verbs, presets, and its own one-line errors."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.cli.__main__ import VERBS, find_verb, load_options, main
from cluster.config import PRESETS, Config, load_settings
from pipeline.tools.arguments import format_options, parse_options
from pipeline.tools.errors import UsageError
from pipeline.tools.help import list_flags
from tests.helpers.processes import run_command
from tests.helpers.training_processes import REPOSITORY


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_a_function_of_words(name):
    module, _, function = VERBS[name].module.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text())
    wanted = function or "main"
    (entry,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == wanted)
    assert entry.args.args[0].arg == ("words" if function else "argv")


def test_every_command_of_the_packages_is_a_verb():
    commands = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for package in ("pipeline", "model", "cluster")
        for path in (REPOSITORY / package).rglob("*.py")
        if "parse_options(" in path.read_text()
    } - {"pipeline.tools.arguments", "cluster.build_shards", "cluster.cli.__main__"}
    assert commands == {verb.module for verb in VERBS.values() if ":" not in verb.module}


def test_help_and_errors_come_at_once_and_without_the_libraries_of_the_verbs(capsys):
    script = "import sys; from cluster.cli.__main__ import main; main(['--help']); " + (
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


HEAVY = (
    "torch", "ray", "scipy", "pyarrow", "matplotlib", "nvidia.dali", "fsspec", "numpy",
    "safetensors", "PIL", "jinja2", "rich",
)  # fmt: skip


def test_no_help_and_no_wrong_flag_waits_for_a_library():
    """All verbs in one process: tyro's import is half of the time."""
    script = f"""
import resource, sys
from cluster.cli.__main__ import VERBS, main
for verb in VERBS:
    assert main([verb, "--help"]) == 0, verb
    try:
        main([verb, "--xyz"])
    except Exception as error:
        print(error, file=sys.stderr)
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, (verb, loaded)
spent = resource.getrusage(resource.RUSAGE_SELF)
print("CPU", spent.ru_utime + spent.ru_stime)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in VERBS:
        assert re.search(rf"^usage: duet {name}\b", done.stdout, re.MULTILINE)
        assert name == "presets" or f"duet {name} has no flag --xyz" in done.stderr
    assert float(done.stdout.split()[-1]) < 6


def list_pages(width: int) -> Iterator[tuple[str, str]]:
    """Yield each verb that has flags, and its help at a width."""
    for name, verb in VERBS.items():
        if verb.options:
            yield name, format_options(load_options(verb), f"duet {name}", width)


@pytest.mark.parametrize("width", [80, 120])
def test_a_help_has_no_orphans_and_fits_the_terminal(width):
    for name, text in list_pages(width):
        lines = text.splitlines()
        assert max(map(len, lines)) <= min(width, 100), name
        alone = [
            line
            for before, line in pairwise(lines)
            if len(line.split()) == 1 and line.startswith(" " * 20) and len(before.split()) > 2
        ]
        assert alone == [], name
        assert "examples:" in lines, name
        flags = list_flags(load_options(VERBS[name]), with_text=True)
        assert [flag.field for flag in flags if not flag.text] == []


def test_help_of_train_is_in_groups():
    text = dict(list_pages(80))["train"]
    titles = re.findall("^([a-z ]+):$", text, re.MULTILINE)
    assert titles == [
        "flags", "network", "schedule", "data", "machines", "checkpoints and measurements",
        "examples",
    ]  # fmt: skip
    assert text.count("\n  duet train ") == 3
    kind = load_options(VERBS["train"])
    grouped = [name for names in kind.SECTIONS.values() for name in names]
    assert sorted(grouped) == sorted(Config().to_settings())


def test_examples_are_words_that_the_command_takes():
    for name, verb in VERBS.items():
        if verb.options:
            kind = load_options(verb)
            for example in kind.EXAMPLES:
                parse_options(kind, shlex.split(example), f"duet {name}")


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


def test_a_flag_has_one_kind_of_value_in_all_commands():
    homes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, verb in VERBS.items():
        for flag in list_flags(load_options(verb)) if verb.options else ():
            if not flag.is_positional:
                kind = "switch" if flag.is_switch else flag.kind or "choice"
                homes[flag.names[-1]][kind].append(name)
    various = {word: dict(kinds) for word, kinds in homes.items() if len(kinds) > 1}
    assert various.pop("--out")["TEXT"] == ["index-shards"], "which takes an address"
    # A run that was trained with --ledger is what the others read.
    assert various == {"--ledger": {"switch": ["train"], "PATH": ["verify", "throughput"]}}


def test_an_old_spelling_of_a_flag_works():
    kind = load_options(VERBS["neighbors"])
    words = ["runs/a", "--data", "d", "--step", "4", "--queries=train", "--base", "val"]
    options = parse_options(kind, words, "x")
    assert (options.checkpoint, options.queries, options.base) == ("4", "train", "val")
    for verb in VERBS.values():
        if verb.options:
            kind = load_options(verb)
            known = {word for flag in list_flags(kind) for word in flag.spellings}
            assert set(kind.RENAMED.values()) <= known
            assert not set(kind.RENAMED) & known


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Script of completions, as `duet --print-completion bash` prints it, without heavy modules."""
    check = f"loaded = [n for n in {HEAVY} if n in sys.modules]; assert not loaded, loaded"
    call = "main(['--print-completion', 'bash'])"
    script = f"import sys; from cluster.cli.__main__ import main; {call}; {check}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    path = tmp_path_factory.mktemp("completion") / "duet.bash"
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ("tr", {"train"}),
        ("train --rep", {"--replicas"}),
        ("train d", {"demo", "dexp"}),
        ("train dexp --dtype b", {"bfloat16"}),
        ("evaluate runs/a --be", {"--best"}),
        ("study small/f", {"small/figure1", "small/finetune"}),
        ("presets copy pap", {"paper"}),
    ],
)
def test_bash_completes_verbs_flags_choices_and_presets(bash_script, words, some):
    asked = ["duet", *words.split()]
    quoted = " ".join(map(shlex.quote, asked))
    done = subprocess.run(
        ["bash", "--norc", "-c",
         f'source {bash_script}; COMP_WORDS=({quoted}); COMP_CWORD={len(asked) - 1}; '
         '"$(complete -p duet | sed "s/.*-F \\([^ ]*\\) .*/\\1/")"; '
         'printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == some, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_a_script_with_every_verb(shell, capsys):
    assert main([f"--print-completion={shell}"]) == 0
    script = capsys.readouterr().out
    assert [name for name in VERBS if name not in script] == []
    assert "checkpoint-every" in script
    assert "finetune" in script


def test_an_unknown_shell_is_refused():
    with pytest.raises(UsageError, match="'cmd'; it takes bash or zsh or fish or tcsh"):
        main(["--print-completion", "cmd"])


def test_a_study_is_not_offered_as_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["presets", "copy", "studies/norms"]) == 0
    assert "duet study norms.toml --data DATA --out OUT" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"norms\.toml is a study; duet study runs it"):
        main(["train", "norms.toml", "--run", "r"])


def test_presets_are_listed_with_their_claims_and_copied_to_be_edited(
    tmp_path, capsys, monkeypatch
):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(PRESETS.rglob("*.toml")))
    assert "no_conv3                    Without conv3: is depth needed?" in lines
    assert all(len(line.split()) > 2 and len(line) <= 100 for line in lines)
    monkeypatch.chdir(tmp_path)
    assert main(["presets", "copy", "dexp"]) == 0
    assert load_settings(tmp_path / "dexp.toml") == load_settings(PRESETS / "dexp.toml")
    assert main(["Presets", "copy", "dexp.toml", "mine.toml"]) == 0
    for words, message in (
        (["copy", "dexp"], r"dexp\.toml is there already; name another"),
        (["copy", "dxep", "new.toml"], "did you mean dexp"),
        (["copy"], r"presets copy NAME \[TO\]"),
        (["copy", "a", "b", "c"], r"presets copy NAME \[TO\]"),
        (["--json"], "takes no '--json'; use duet presets"),
    ):
        with pytest.raises(UsageError, match=message):
            main(["presets", *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dexp.toml", "mine.toml"]


@pytest.mark.parametrize("verb", ["evaluate", "export", "neighbors"])
def test_a_run_that_is_not_there_is_told_before_torch_is_loaded(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", _refuse_import(importlib.import_module))
    with pytest.raises(UsageError, match=r"nope holds no run \(config.toml is missing\)"):
        main([verb, str(tmp_path / "nope")])


def _refuse_import(original):
    def import_module(name, *more):
        assert name.endswith("options"), f"{name} was imported"
        return original(name, *more)

    return import_module
