"""What README and docs tell people to type exists: modules, their flags, and what links lead to."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import shlex
import signal
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.training_processes import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OURS = ("pipeline", "model", "cluster", "benchmarks", "tests")


def commands(text: str) -> list[list[str]]:
    """Every `python -m OURS ...` and `python benchmarks/...`, in blocks and in running text."""
    found = []
    text = re.sub(r"[ \t]*\\\n[ \t]*", " ", text)  # continued lines
    for match in re.finditer(r"python (?:-m )?(?=[a-z_]+[./])([^`\n]*)", text):
        words: list[str] = []
        splitter = shlex.shlex(match[0].replace("…", "..."), posix=True, punctuation_chars="|&;><")
        splitter.whitespace_split = True
        for word in splitter:
            if set(word) & set("|&;><"):
                break
            words.append(word)
        name = words[2] if words[1] == "-m" else words[1]
        if re.split(r"[./]", name)[0] in OURS:
            found.append(words)
    return found


def typed() -> list[tuple[str, list[str]]]:
    return [(page.name, words) for page in PAGES for words in commands(page.read_text("utf-8"))]


def test_commands_are_found():
    text = "```\npython -m cluster.train a.toml \\\n    --data b --run c  # d\n```\n`python -m x.y`"
    assert commands(text) == [
        ["python", "-m", "cluster.train", "a.toml", "--data", "b", "--run", "c"]
    ]
    assert len(typed()) > 30


def flags(target: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Flags that the help of a module, or of a script, lists."""
    monkeypatch.setattr(sys, "argv", [target, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    if "/" in target:
        monkeypatch.syspath_prepend(str((REPOSITORY / target).parent))
        run = partial(runpy.run_path, str(REPOSITORY / target), run_name="__main__")
    else:
        run = partial(runpy.run_module, target, run_name="__main__", alter_sys=True)
    out, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with redirect_stdout(out), pytest.raises(SystemExit) as end:
        run()
    signal.signal(signal.SIGTERM, handler)  # entry points set their own
    assert end.value.code in (0, None)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", out.getvalue()))


def test_every_module_exists():
    for page, words in typed():
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]), f"{page}: {shlex.join(words)}"
        else:
            assert (REPOSITORY / words[1]).is_file(), f"{page}: {shlex.join(words)}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_flag_exists(monkeypatch):
    wanted: dict[str, dict[str, str]] = {}
    for page, words in typed():
        target, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        for word in rest:
            flag = re.match(r"\[?(--[a-z][a-z0-9-]*)", word)
            if flag:
                wanted.setdefault(target, {})[flag[1]] = f"{page}: {shlex.join(words)}"
    known = {target: flags(target, monkeypatch) for target in wanted}
    missing = {
        where: flag
        for target, those in wanted.items()
        for flag, where in those.items()
        if flag not in known[target]
    }
    assert missing == {}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"
