"""The house rules that a machine can hold: names of modules and classes, sizes, and levels."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.training_processes import REPOSITORY

PACKAGES = ("pipeline", "model", "cluster")
BESIDE = ("docs", "examples", "benchmarks")
WELL_KNOWN = {
    "attr", "click", "dali", "datasets", "fsspec", "hydra", "jax", "jinja2", "matplotlib", "numpy",
    "nvidia", "pandas", "pytest", "ray", "requests", "rich", "scipy", "sklearn", "tensorboard",
    "torch", "torchvision", "tqdm", "triton", "tyro", "yaml",
}  # fmt: skip
NO_SUBJECT = {
    "as", "at", "by", "for", "from", "how", "if", "in", "like", "of", "on", "that", "to", "what",
    "when", "where", "whether", "which", "who", "whose", "why", "with", "without",
}  # fmt: skip
"""First words of a docstring that leaves the reader to find its subject elsewhere."""
LONGEST_MODULE = 520
MOST_ENTRIES = 16


def modules() -> list[Path]:
    """Every module of the three packages, and no package file."""
    found = [path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")]
    return sorted(path for path in found if not path.name.startswith("__"))


def test_no_module_has_the_name_of_a_library():
    taken = sys.stdlib_module_names | WELL_KNOWN
    # Inside a package an absolute import never meets them, but a reader and a search do.
    beside = [path for name in BESIDE for path in (REPOSITORY / name).rglob("*.py")]
    assert [str(path) for path in modules() + beside if path.stem in taken] == []


def test_no_class_name_stands_for_two_things():
    homes: dict[str, list[str]] = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path.relative_to(REPOSITORY)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a file; fields and constants have one, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks"])
def test_a_docstring_begins_with_its_subject(folder):
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {text[:60]}"
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for line, text in docstrings(path)
        if (words := text.split()) and words[0].rstrip(",:").lower() in NO_SUBJECT
    ]
    assert found == []


def test_modules_are_short_enough_to_be_read():
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {path: count for path, count in lines.items() if count > LONGEST_MODULE} == {}


def test_a_level_has_few_entries():
    def visible(folder: Path) -> list[Path]:
        return [
            path
            for path in folder.iterdir()
            if not path.name.startswith((".", "__"))
            and (path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py"))))
        ]

    folders = [
        path for name in PACKAGES for path in (REPOSITORY / name).rglob("*") if path.is_dir()
    ]
    crowded = {
        str(folder): len(visible(folder))
        for folder in folders
        if len(visible(folder)) > MOST_ENTRIES
    }
    assert crowded == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_what_lies_in_it(package):
    """Each `__init__` names every module and folder beside it, and nothing that is not there."""
    for init in (REPOSITORY / package).rglob("__init__.py"):
        folder = init.parent
        there = {
            path.stem
            for path in folder.iterdir()
            if (path.suffix == ".py" and not path.name.startswith("__"))
            or (path / "__init__.py").is_file()
        }
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        named = set(re.findall(r"^ *(\w+)(?:\.\w+)?(?:  +\S|$)", docstring, re.M))
        assert there - named == set(), f"{init.relative_to(REPOSITORY)} does not list them"
