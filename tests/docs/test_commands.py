"""Commands and Python blocks of the pages run: on small data, with flags that make them short."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import re
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import train
from cluster.cli import __main__ as duet
from cluster.config import Config
from cluster.experiments.neighbors import extract
from pipeline import withdraw
from pipeline.packing import additions
from tests.docs.pages import PAGES, README, REPOSITORY, Block, blocks
from tests.helpers.foreign_shards import made_by_webdataset as made  # noqa: F401
from tests.helpers.training_runs import alone

SHORTER = {
    "train": "--steps 2 --batch-size 8 --width 0.125 --dtype float32 --threads 1 --ledger",
    "neighbors": "--workers 1 --pairs 100",
}
"""Flags that are appended to the commands of the pages."""
EXPORT = "duet export runs/mine --best --out weights.safetensors"
BLOCKS = [block for page in PAGES for block in blocks(page)]


def train_here(config: Config, data: str, run: Path, *_: object) -> None:
    """Train with both columns in this process, without Ray."""
    alone(config, Path(data), run)


class InlinePool:
    """A `LocalPool` that works in this process; another one would take seconds to start."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, task: Any, jobs: Any) -> Iterator[Any]:
        """Do `task` for every job."""
        return map(task, jobs)


class World:
    """The folder that the pages speak of."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def run(self, words: list[str]) -> None:
        """Run a command in this process, unless it was run before."""
        command = shlex.join(words)
        if command in self.done:
            return
        assert words[0] in ("python", "duet"), f"no test knows how to run {command}"
        target, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        rest += shlex.split(SHORTER.get(target, ""))
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [target, *rest])
            try:
                if words[:2] == ["duet", "train"]:
                    assert train.main(rest, trainer=train_here) == 0
                elif words[0] == "duet":
                    assert duet.main([target, *rest]) in (0, None), command
                elif words[1] == "-m" and not is_package(target):
                    assert importlib.import_module(target).main() in (0, None), command
                elif words[1] == "-m":
                    runpy.run_module(target, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(REPOSITORY / target), run_name="__main__")
            except SystemExit as end:
                if end.code not in (0, None):
                    pytest.fail(f"{command} ended with {end.code}")
        signal.signal(signal.SIGTERM, handler)  # entry points set their own
        self.done.add(command)


def is_package(module: str) -> bool:
    """Tell if `python -m MODULE` runs a `__main__` in a folder."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


@pytest.fixture(scope="module")
def world(
    image_folder: Path,
    tiny_data: Path,
    made: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """Images, data sets and runs under the names that the pages use; the current folder."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(image_folder, root / "images")
    shutil.copytree(tiny_data, root / "data" / "demo")
    shutil.copytree(made, root / "DIR")
    shutil.copy(next((image_folder / "val").rglob("*.jpg")), root / "image.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        recipes = blocks(REPOSITORY / "docs/recipes.md")
        (root / "net.toml").write_text(next(b.text for b in recipes if b.language == "toml"))
        for module in (extract, additions, withdraw):
            patch.setattr(module, "LocalPool", InlinePool)
        world = World()
        for block in blocks(README):
            if block.mark == "run" and block.language == "bash":
                for words in block.commands:
                    world.run(words)
        train_command = "duet train narrow --data data/mine --run runs"
        for name in ("a", "b"):
            world.run(shlex.split(f"{train_command}/{name} --seed {ord(name)}"))
        yield world


def named(language: str) -> Any:
    """Parametrize a test with the blocks of a language that run."""
    chosen = [block for block in BLOCKS if block.language == language and block.mark == "run"]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@named("bash")
def test_commands_run(block: Block, world: World):
    for words in block.commands:
        world.run(words)


@named("python")
def test_python_runs(block: Block, world: World):
    if "weights.safetensors" in block.text:
        world.run(shlex.split(EXPORT))
    names: dict[str, Any] = {}
    # As from a file: DALI reads the source of an augmentation.
    linecache.cache[block.place] = len(block.text), None, block.text.splitlines(True), block.place
    exec(compile(block.text, block.place, "exec"), names)
    if "state" in names:
        assert names["state"] == {"position": 1280}


def fenced(*languages: str) -> Any:
    """Parametrize a test with all blocks of some languages."""
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


@fenced("bash", "python")
def test_each_block_says_whether_it_is_run(block: Block):
    if block.mark.startswith("run by "):
        other = REPOSITORY / block.mark.removeprefix("run by ")
        text = other.read_text("utf-8")
        for words in block.commands:
            module = duet.VERBS[words[1]].module if words[0] == "duet" else words[2]
            module = module.removesuffix(".__main__")
            assert module in text, f"{block.place}: {other} does not run {module}"
    else:
        assert block.mark == "run" or re.fullmatch(r"not run: .{5,}", block.mark), (
            f"{block.place}: on the line above, put <!-- run -->, <!-- run by tests/... --> or "
            "<!-- not run: why -->"
        )


@fenced("")
def test_blocks_without_a_language_are_no_commands(block: Block):
    assert not re.search(r"^\s*(\$ |duet [a-z]|python |make |ray |pip )", block.text, re.MULTILINE)


def test_blocks_are_found():
    assert len(BLOCKS) > 30
    assert {block.language for block in BLOCKS} == {"bash", "python", "toml", ""}
    fences = sum(page.read_text("utf-8").count("\n```") for page in PAGES)
    assert fences == 2 * len(BLOCKS)
