"""Answers of nvidia-smi, the program that tells what the driver knows of its GPUs."""

from __future__ import annotations

import re
import subprocess


def query_smi(query: str) -> list[list[str]]:
    """Return the rows of nvidia-smi's answer; none without that program."""
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[list[str]]:
    """Parse nvidia-smi's CSV into rows of cells."""
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]


def select_rows(rows: list[list[str]], uuid: str) -> list[list[str]]:
    """Return the rows of one GPU, without its uuid; torch's uuids lack the prefix `GPU-`."""
    return [row[1:] for row in rows if uuid and row[0].removeprefix("GPU-") == uuid]


def find_watts(rows: list[list[str]], uuid: str) -> float | None:
    """Return the watts of one GPU from rows of uuid and power; None: its driver tells none."""
    for row in select_rows(rows, uuid):
        if found := re.fullmatch(r"(\d+(?:\.\d+)?) W", row[0]):
            return float(found[1])
    return None
