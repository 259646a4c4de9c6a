"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_training_loop_runs(tiny_data):
    (code,) = re.findall(r"```python\n(from pipeline|import torch\n.*?)```", README, re.S)
    assert '"data/demo"' in code
    names: dict = {}
    exec(code.replace("data/demo", str(tiny_data)).replace("128", "16"), names)
    assert names["state"] == {"position": 160}


@pytest.mark.parametrize("package", ["pipeline", "model", "cluster"])
def test_the_tree_names_every_module(package):
    tree = README.split("## What is where")[1].split("```")[1]
    part = re.split(r"\n(?=\w+/)", tree)
    (listed,) = [text for text in part if text.strip().startswith(f"{package}/")]
    there = {
        path.name
        for path in (REPOSITORY / package).iterdir()
        if (path.suffix == ".py" or path.is_dir()) and not path.name.startswith("__")
    }
    named = set(re.findall(r"[a-z_]+\.py|[a-z_]+(?=/ )", listed))
    assert there - named == set()
    assert named - there <= {package}
