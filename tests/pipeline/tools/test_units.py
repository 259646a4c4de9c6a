"""Sizes in bytes, cores and memory of a container, and one line for an exception."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipeline.tools.errors import DamagedFile, DataError, summarize_error
from pipeline.tools.text import human_bytes
from pipeline.tools.units import (
    cpu_count,
    parse_size,
    read_cpu_quota,
    read_memory_left,
)


def test_a_printed_size_is_read_back():
    for text in ("500 MB", "12.3 kB", "255 GB"):
        assert human_bytes(parse_size(text)) == text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/data/x"), "No space left on device"),
        (OSError("connection reset\nby peer"), "connection reset"),
        (KeyError("files"), "no 'files'"),
        (DataError("x is damaged; build it again"), "x is damaged; build it again"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_exception_is_one_line(error, line):
    assert summarize_error(error) == line


def groups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_containers_limits_are_found_in_either_version_of_control_groups(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("0::/pods/one\n")
    root = groups(tmp_path / "v2", {
        "pods/one/memory.max": "max",
        "pods/memory.max": "4000", "pods/memory.current": "3000",
        "pods/memory.stat": "anon 1000\ninactive_file 500",
        "pods/one/cpu.max": "150000 100000", "pods/cpu.max": "max 100000",
    })  # fmt: skip
    assert (read_memory_left(root, mine), read_cpu_quota(root, mine)) == (1500, 1.5)
    # In a container's own namespace its group is the root, or lies elsewhere than its mount says.
    for place in ("0::/\n", "0::/../../elsewhere\n"):
        mine.write_text(place)
        assert read_cpu_quota(groups(tmp_path / "own", {"cpu.max": "50000 100000"}), mine) == 0.5
    mine.write_text("4:memory:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/\n")
    root = groups(tmp_path / "v1", {
        "memory/a/memory.limit_in_bytes": "4000", "memory/a/memory.usage_in_bytes": "1000",
        "memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "9",
        "cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert (read_memory_left(root, mine), read_cpu_quota(root, mine)) == (3000, 3.0)
    root = groups(tmp_path / "joined", {
        "cpu,cpuacct/a/cpu.cfs_quota_us": "200000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert read_cpu_quota(root, mine) == 2.0
    for there, own in ((tmp_path / "none", mine), (root, tmp_path / "none")):
        assert (read_memory_left(there, own), read_cpu_quota(there, own)) == (None, None)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max", 8), ("1600000", 8), ("200000", 2), ("250000", 2), ("10000", 1), ("0", 8)],
)
def test_as_many_cores_are_kept_busy_as_affinity_and_quota_allow(
    quota, count, tmp_path, monkeypatch
):
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(
        "pipeline.tools.units.CGROUPS", groups(tmp_path, {"cpu.max": f"{quota} 100000"})
    )
    monkeypatch.setattr("pipeline.tools.units.OWN_CGROUPS", tmp_path / "own")
    assert cpu_count() == count


def test_an_error_is_the_same_in_another_process():
    for error in (DataError("x \x1b"), DamagedFile("/d/x\x1b", "it is short")):
        same = pickle.loads(pickle.dumps(error))
        assert (type(same), str(same)) == (type(error), str(error))
        assert "\x1b" not in str(same)
