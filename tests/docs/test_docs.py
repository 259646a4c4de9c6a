"""Modules, flags, files and links that README and docs name exist; the pages have their form."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from cluster.cli import __main__ as duet
from tests.docs.pages import DOCS, PAGES, README, REPOSITORY, ROOT_PAGES, blocks

OURS = ("pipeline", "model", "cluster", "benchmarks", "tests")


def commands(text: str) -> list[list[str]]:
    """Every `duet VERB ...`, `python -m OURS ...` and `python benchmarks/...`, in text, too."""
    found = []
    text = re.sub(r"[ \t]*\\\n[ \t]*", " ", text)  # continued lines
    started = r"(?:python (?:-m )?(?=[a-z_]+[./])|(?:(?<=`)|(?<=\n))duet (?=[a-z]))([^`\n]*)"
    for match in re.finditer(started, text):
        words: list[str] = []
        splitter = shlex.shlex(match[0].replace("…", "..."), posix=True, punctuation_chars="|&;><")
        splitter.whitespace_split = True
        for word in splitter:
            if set(word) & set("|&;><"):
                break
            words.append(word)
        name = words[2] if words[1] == "-m" else words[1]
        if words[0] == "duet" or re.split(r"[./]", name)[0] in OURS:
            found.append(words)
    return found


def typed() -> list[tuple[str, list[str]]]:
    return [(page.name, words) for page in PAGES for words in commands(page.read_text("utf-8"))]


def tree(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each path of an indented listing, and whether it is marked as a command."""
    above: list[str] = []
    for line in text.splitlines():
        found = re.match(r"( *)([\w.]+/?)( +▸)?(?: {2,}| |$)", line)
        if found is None or not (above or found[2].endswith("/")):
            return
        depth = len(found[1]) // 2
        above[depth:] = [found[2]]
        yield "".join(above), bool(found[3])


def test_commands_are_found():
    text = "```\npython -m cluster.train a.toml \\\n    --data b --run c  # d\n```\n`python -m x.y`"
    assert commands(text + " a duet of two, `duet verify DATA`") == [
        ["python", "-m", "cluster.train", "a.toml", "--data", "b", "--run", "c"],
        ["duet", "verify", "DATA"],
    ]
    assert len(typed()) > 30


def flags(target: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Flags that the help of a verb, of a module, or of a script lists."""
    monkeypatch.setattr(sys, "argv", [target, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    if target.startswith("duet "):
        run: Callable[[], object] = partial(duet.main, [target.removeprefix("duet "), "--help"])
    elif "/" in target:
        monkeypatch.syspath_prepend(str((REPOSITORY / target).parent))
        run = partial(runpy.run_path, str(REPOSITORY / target), run_name="__main__")
    else:
        run = partial(runpy.run_module, target, run_name="__main__", alter_sys=True)
    out, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with redirect_stdout(out):
        try:
            code = run()
        except SystemExit as end:
            code = end.code
    signal.signal(signal.SIGTERM, handler)  # entry points set their own
    assert code in (0, None)
    # It has just taken --help, whether that lists itself or not.
    return {"--help", *re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", out.getvalue())}


def test_every_module_exists():
    for page, words in typed():
        if words[0] == "duet":
            assert duet.find_verb(words[1]), f"{page}: {shlex.join(words)}"
        elif words[1] == "-m":
            assert importlib.util.find_spec(words[2]), f"{page}: {shlex.join(words)}"
        else:
            assert (REPOSITORY / words[1]).is_file(), f"{page}: {shlex.join(words)}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_flag_exists(monkeypatch):
    wanted: dict[str, dict[str, str]] = {}
    for page, words in typed():
        first = 3 if words[1] == "-m" else 2
        target = " ".join(words[:2]) if words[0] == "duet" else words[first - 1]
        for word in words[first:]:
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
    """Return the anchors that GitHub makes of the headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES], ids=lambda page: page.name)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Paths of the repository in running text and blocks, `tests/cluster/test_export.py`."""
    text = page.read_text("utf-8")
    named = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(OURS)}|docs|examples)(?:/[\w.-]+)+/?", text))
    missing = {path for path in named if not (REPOSITORY / path.rstrip(".")).exists()}
    assert missing == set()


def test_the_readme_is_short():
    assert README.stat().st_size <= 10_240
    before = README.read_text("utf-8").split("```")[0]
    assert len(before.splitlines()) < 30, "one screen before the first command"


def test_the_readme_leads_to_every_page():
    text = README.read_text("utf-8")
    pages = [page.relative_to(REPOSITORY).as_posix() for page in [*DOCS, *ROOT_PAGES]]
    assert [page for page in pages if f"({page})" not in text] == []


def test_the_site_has_every_page():
    text = (REPOSITORY / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r"^ +- [^:]+: ([\w/]+\.md)$", text, re.M)
    docs = [page.relative_to(REPOSITORY / "docs").as_posix() for page in DOCS]
    others = ["examples.md" if page.name == "README.md" else page.name for page in ROOT_PAGES]
    assert sorted(listed) == sorted([*docs, "index.md", *others])


def test_the_commands_are_those_of_duet():
    page = (REPOSITORY / "docs" / "reference" / "commands.md").read_text("utf-8")
    rows = re.findall(r"^\| `duet ([a-z-]+)` \| `([a-z_.]+)` \| (.+) \|$", page, re.M)
    verbs = {name: verb.help for group in duet.GROUPS.values() for name, verb in group.items()}
    assert {name: text for name, _, text in rows} == verbs
    for name, module, _ in rows:
        assert duet.VERBS[name].module.startswith(module), name


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_says_for_whom_it_is_and_what_to_read_next(page):
    title, blank, first, *_, last = page.read_text("utf-8").rstrip().splitlines()
    assert re.fullmatch("# .+", title)
    assert blank == ""
    assert first.startswith("For ")
    paragraph = page.read_text("utf-8").rstrip().rpartition("\n\n")[2]
    assert re.search(r"\b(Next|[Bb]ack to)\b.*\]\(", paragraph, re.S), last


TREE = {
    path: runs
    for block in blocks(REPOSITORY / "docs" / "architecture.md")
    for path, runs in [*tree(block.text)]
}
"""Paths in the listings of architecture.md, and whether they are marked as commands."""


@pytest.mark.parametrize("package", ["pipeline", "model", "cluster"])
def test_the_architecture_names_every_module(package):
    there = {
        path.relative_to(REPOSITORY).as_posix() + "/" * path.is_dir()
        for path in (REPOSITORY / package).rglob("*")
        if (path.suffix == ".py" and not path.name.startswith("__"))
        or (path.is_dir() and not path.name.startswith("__") and "presets" not in path.parts[:-1])
    }
    named = {path for path in TREE if path.startswith(package) and path != f"{package}/"}
    assert sorted(there - named) == []
    assert sorted(named - there) == []


def test_commands_are_marked_in_the_architecture():
    for path in (path for path, runs in TREE.items() if runs):
        file = REPOSITORY / path
        assert file.is_dir() or '__name__ == "__main__"' in file.read_text("utf-8"), path
        assert file.is_file() or (file / "__main__.py").is_file(), path
    for page, words in typed():
        if words[1] == "-m" and words[2].split(".")[0] in ("pipeline", "model", "cluster"):
            path = words[2].replace(".", "/")
            assert TREE.get(f"{path}.py") or TREE.get(f"{path}/"), f"{page}: {words[2]}"


QUOTED = {
    "data.md": ["lines, and", "; give the whole file"],
    "cluster.md": [
        "of them on one node each time",
        "is not on node",
        "is in use by another",
        "does not answer (frozen?)",
        "offers GPUs to Ray, but its torch",
    ],
    "faq.md": ["has no split 'val'", "holds a run at step", "with other settings"],
    "stream.md": ["exactly once (", "all identical"],
    "throughput.md": [
        "compute, slowed by the stream",
        "waiting for the other column",
        "waiting for decoding",
        "waiting for the transfer",
        "the parts add up to",
        "of what the bare decoder does on this machine",
        "What helps most",
    ],
}
"""Parts of messages that the pages quote."""


def test_quoted_messages_are_those_of_the_program():
    code = "".join(
        path.read_text("utf-8")
        for package in ("pipeline", "model", "cluster")
        for path in (REPOSITORY / package).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings over several lines
    for page, messages in QUOTED.items():
        text = " ".join((REPOSITORY / "docs" / page).read_text("utf-8").split())
        for message in messages:
            assert message in text, f"{page}: {message}"
            assert message in code, f"{page} quotes what no command says: {message}"


def templates() -> list[str]:
    """Every text of the packages that has words, with `…` where a value is filled in."""

    def render(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(render, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    return [
        render(node)
        for package in ("pipeline", "model", "cluster")
        for path in (REPOSITORY / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


def test_the_table_of_messages_quotes_the_program():
    """Each message is one text of the program: its fixed parts, in order."""
    page = (REPOSITORY / "docs" / "messages.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 25
    known = templates()
    unknown = []
    for message in messages:
        parts = ".*".join(re.escape(part.strip()) for part in re.split("…+", message))
        if not any(re.search(parts, text, re.S) for text in known):
            unknown.append(message)
    assert "\n".join(unknown) == ""
