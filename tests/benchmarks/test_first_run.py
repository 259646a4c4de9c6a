"""`benchmarks/gpu/first.sh` on a CPU, with what each phase may import; `loop.py` and its parts."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.helpers.training_processes import REPOSITORY

FOLDER = REPOSITORY / "benchmarks" / "gpu"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from parts import loop_table  # noqa: E402
from parts.step_profile import ProfiledSteps, measure_busy  # noqa: E402

ABSENT = (
    "nvidia", "ray", "isal", "tyro", "rich", "safetensors", "simplejpeg", "webdataset", "scipy",
    "braceexpand", "pyarrow", "matplotlib", "hypothesis", "fsspec",
)  # fmt: skip
"""Modules that a machine with torch, triton, numpy, pillow and pytest may lack."""
BLOCK = f"""
import sys
from importlib.machinery import PathFinder
class Finder:
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in {ABSENT} else PathFinder.find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder()
"""
TRACE = """
import atexit, os, sys
@atexit.register
def note():
    with open(os.environ["TRACE"], "a") as file:
        file.writelines(f"{name}\\n" for name in list(sys.modules) if "." not in name)
"""
WITH_TORCH = {"torch", "triton", "numpy", "pillow", "sympy", "mpmath", "torchgen", "jinja2"}
"""Distributions that are there wherever torch and numpy are."""
NOT_NEEDED = {
    "setuptools",
    "py",
    "platformdirs",
    "import-linter",
    "duet-stream",
    "tqdm",
    "colorama",
}
"""Distributions that are imported where they are installed, by others, and not missed elsewhere."""


def run_first(
    data: Path, out: Path, site: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, str]]]:
    """Run `first.sh` with a `sitecustomize` module; return its end, and the rows of its table."""
    folder = out.parent / f"{out.name}-site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(site)
    done = subprocess.run(
        [FOLDER / "first.sh", data, out, "cpu"],
        env=os.environ
        | {"PYTHON": sys.executable, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line.strip("| ").split(" | ") for line in (out / "table.md").read_text().splitlines()]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    return done, rows


@pytest.mark.slow
def test_the_first_phases_run_with_torch_alone(tiny_data: Path, tmp_path: Path) -> None:
    done, rows = run_first(tiny_data, tmp_path / "out", BLOCK, TO="4")
    log = (tmp_path / "out/log.txt").read_text()
    assert done.returncode == 0, log
    assert [*rows] == ["0-machine", "1-kernels", "2-step-128", "3-step-1024", "4-pixels"]
    assert {row["exit"] for row in rows.values()} == {"0", "-"}
    assert sum(int(row["limit"]) for name, row in rows.items() if name < "4") <= 300
    assert "missing for phases 4 to 7: nvidia.dali, isal, tyro" in log
    assert re.match(r"\d+/\d+ tests collected", rows["1-kernels"]["result"])
    for name in ("2-step-128", "3-step-1024"):
        assert re.search(r"duet \w+ fused [\d,]+ img/s, plain \w+ eager", rows[name]["result"])
    assert rows["4-pixels"]["result"] == "skipped: DALI cannot be imported"
    with tarfile.open(tmp_path / "out/results.tar.gz") as packed:
        names = packed.getnames()
    assert {"./table.md", "./0-machine.log", "./3-step-1024.log"} <= {*names}
    assert sum(name.endswith(".json") for name in names) == 2


@pytest.mark.slow
def test_the_other_phases_run_with_what_is_packed(tiny_data: Path, tmp_path: Path) -> None:
    done, rows = run_first(
        tiny_data, tmp_path / "out", TRACE, FROM="4", TRACE=str(tmp_path / "imports")
    )
    assert done.returncode == 0, (tmp_path / "out/log.txt").read_text()
    assert [*rows] == ["4-pixels", "5-loop", "6-tests", "7-rate"]
    assert sum(int(row["limit"]) for row in rows.values()) <= 335
    assert "the same every time: yes" in rows["4-pixels"]["result"]
    assert "same bits in a second run: yes; after a resume: yes" in rows["5-loop"]["result"]
    assert re.search(
        r"jpeg: loop [\d,]+ img/s, .* raw: loop [\d,]+ img/s", rows["5-loop"]["result"]
    )
    assert re.match(r"\d+/\d+ tests collected", rows["6-tests"]["result"])
    assert re.search("ours [0-9,]+ img/s.*native [0-9,]+ img/s", rows["7-rate"]["result"])
    homes = importlib.metadata.packages_distributions()
    loaded = {
        home.lower().replace("_", "-")
        for name in (tmp_path / "imports").read_text().split()
        if name != "nvidia"  # a namespace of many; DALI's own needs are compared below
        for home in homes.get(name, ())
    }
    assert loaded - read_packed() - WITH_TORCH - NOT_NEEDED == set()


def read_packed() -> set[str]:
    """Names of the distributions that `wheels.sh` packs."""
    text = (FOLDER / "wheels.sh").read_text()
    lists = re.findall(r"^(?:tests|stream|dali)=\(([^)]*)\)", text, re.M)
    assert len(lists) == 3
    return {re.split("[<>=]", word.strip('"'))[0] for words in lists for word in words.split()}


def test_all_that_dali_needs_is_packed() -> None:
    needs = importlib.metadata.requires("nvidia-dali-cuda130") or []
    names = {re.split(r"[ ;<>=~!\[]", need)[0] for need in needs if "extra ==" not in need}
    assert "nvidia-nvimgcodec-cu13" in names
    assert names - read_packed() - WITH_TORCH == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "usage: "),
        (["", "{out}", "tpu"], "usage: "),
        (["", "{out}", "cpu"], "error: DATA: '' holds no sealed data set; TO=3 takes"),
        (["/nowhere", "{out}"], "error: DATA: /nowhere holds no sealed data set; TO=3 takes"),
    ],
)
def test_a_wrong_call_is_told_in_a_line(arguments, expected, tmp_path: Path) -> None:
    words = [word.format(out=tmp_path / "out") for word in arguments]
    done = subprocess.run(
        [FOLDER / "first.sh", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


def test_time_in_which_two_kernels_run_counts_once() -> None:
    # Microseconds of two steps: 10 + 25 (two that overlap, one within) + 5 of 100 are busy.
    spans = [(0.0, 10.0), (40.0, 60.0), (50.0, 65.0), (52.0, 53.0), (95.0, 100.0)]
    found = measure_busy(reversed(spans), steps=2, step_seconds=25e-6)
    assert found == pytest.approx(
        {"kernels": 2.5, "gpu_ms": 0.02, "gpu_busy": 0.8, "gpu_busy_profiled": 0.4}
    )
    assert measure_busy([], 2, 1.0)["gpu_busy"] == 0


def test_steps_after_others_are_profiled_and_then_the_run_stops() -> None:
    profiler = ProfiledSteps(torch.device("cpu"), before=2, count=3)
    x, answers = torch.ones(4), []
    for _ in range(6):
        answers.append(profiler())
        x.neg_()
        x.neg_()
    assert answers == [False] * 5 + [True]
    found = profiler.summarize(3, 1.0)
    assert found["launches"] == 2
    assert found["top"][0] == {"share": 1.0, "operation": "aten::neg_"}


def test_the_loop_is_judged_by_raw_images_on_a_gpu() -> None:
    raw = {"stream": 8e4, "step": 5e4, "loop": 4.8e4, "profile": {"gpu_busy": 0.9}}
    found = {"setup": {"width": 1.0}, "machine": {"gpu": "some GPU"}, "raw": raw}
    share, busy = loop_table.goals(found)
    assert (share["found"], share["met"]) == (pytest.approx(0.96), True)
    assert (busy["found"], busy["met"]) == (0.9, False)
    for change in ({"machine": {}}, {"raw": {}}, {"raw": raw | {"stream": None, "profile": {}}}):
        assert [row["met"] for row in loop_table.goals(found | change)] == [None, None]
