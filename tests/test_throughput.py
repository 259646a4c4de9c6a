from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.errors import UsageError
from pipeline.throughput import Throughput, measure


@pytest.mark.parametrize("reader", ["stream", "native"])
def test_both_readers_are_measured(tiny_data, reader):
    rates = measure(
        Throughput(
            data=str(tiny_data), reader=reader, batch_size=8, threads=1, windows=3, batches=2
        )
    )
    assert len(rates) == 3
    assert min(rates) > 1  # img/s: anything slower than that is a stall


def test_the_command_prints_one_object(tiny_data, tmp_path):
    command = [sys.executable, "-m", "pipeline.throughput", "--json", "--windows", "2"]
    small = ["--batches", "2", "--batch-size", "8"]
    done = subprocess.run(
        [*command, *small, str(tiny_data)], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["img_s"] > 0
    assert "img/s (windows" in done.stderr
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no manifest.json" in done.stderr
    assert done.stderr.count("\n") == 1


def test_numbers_out_of_range_are_refused(tiny_data):
    with pytest.raises(UsageError, match="--windows is 0; it must be at least 1"):
        measure(Throughput(data=str(tiny_data), windows=0))
    with pytest.raises(UsageError, match="native reads local folders only, not s3://"):
        measure(Throughput(data="s3://bucket/set", reader="native"))


def test_verify_refuses_an_address_in_one_line():
    command = [sys.executable, "-m", "pipeline.verify", "https://host/set"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: verify reads local folders, and https://host/set is an address\n"
    )
