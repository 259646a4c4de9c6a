"""Loaders of others: what is measured of them, and how a broken one is told."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipeline.throughput.__main__ import main
from pipeline.throughput.clock import FEWEST, find_descendants
from pipeline.throughput.foreign_loader import ForeignLoader, find_array
from pipeline.tools.errors import DuetError, UsageError

LOADERS = '''
import time
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

WORKS = True


class Noise(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, place):
        if place == 39 and not WORKS:
            raise ValueError("sample 39 is no image")
        sum(range(20000))
        return torch.zeros(3, 16, 16), place


class Broken(Noise):
    def __getitem__(self, place):
        raise ValueError("sample is no image")


def alone():
    return DataLoader(Noise(), 8)


def workers():
    return DataLoader(Noise(), 8, num_workers=2, persistent_workers=True)


def broken():
    return DataLoader(Broken(), 8)


def broken_workers():
    return DataLoader(Broken(), 8, num_workers=1)


def steady():
    while True:
        time.sleep(0.02)
        yield {"ids": 3, "image": np.zeros((10, 4, 4, 3), np.uint8), "label": np.zeros(10)}


def short():
    yield torch.zeros(4, 2), torch.zeros(4)
    yield torch.zeros(2, 2), torch.zeros(2)


class Once:
    """An iterable that gives its batches a single time, and nothing after that."""

    def __init__(self):
        self.batches = [torch.zeros(4)] * 3

    def __iter__(self):
        while self.batches:
            yield self.batches.pop()


def number():
    return 3


def nothing():
    return []


def words():
    return ["a", "b"]


def leaves():
    raise SystemExit(3)
'''


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    """A folder with a module of loaders, in which the command runs."""
    (tmp_path / "their_loaders.py").write_text(LOADERS)
    (tmp_path / "their_typo.py").write_text("import no_such_module_here\n")
    (tmp_path / "their_script.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("their_loaders", "their_typo", "their_script"):
        sys.modules.pop(name, None)


def measure(capsys, name: str, *words: object) -> tuple[dict, str]:
    """Return what the command says of a loader, as JSON and as text."""
    assert main(["--loader", f"their_loaders:{name}", "--json", *map(str, words)]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_a_loader_of_known_rate_is_measured(loaders, capsys):
    found, text = measure(capsys, "steady", "--seconds", 0.5, "--img-s", 1000)
    assert found["batch"] == "batch['image']: uint8 [10, 4, 4, 3]"
    assert "first dimension of batch['image']" in text
    assert 200 < found["img_s"] <= 500, "a batch of 10 in at least 20 ms"
    low, high = found["quartiles"]
    assert low <= found["img_s"] <= high
    assert len(found["rate"]["windows"]) >= FEWEST
    assert found["next_ms"]["median"] >= 20
    assert found["first_batch"] >= 0.02
    assert found["rate"]["cpu"] < 0.7
    assert "bound by processor time" not in found["verdict"]
    # A step of 10 images takes 10 ms, and the generator makes none meanwhile.
    assert 0.5 < found["trainer"]["waits"] < 0.9
    assert found["trainer"]["img_s"] < 340
    assert "waits" in text
    assert found["stream"] is None


@pytest.mark.parametrize(("name", "processes"), [("alone", 1), ("workers", 3)])
def test_a_loader_of_torch_is_measured_with_its_workers(loaders, capsys, name, processes):
    others = len(find_descendants()) - 1  # of the tests before
    found, text = measure(capsys, name, "--seconds", 0.5)
    assert found["batch"] == "batch[0]: float32 [8, 3, 16, 16]"
    assert found["processes"] == processes + others
    assert f"in {processes + others} process" in text
    assert found["memory"] > found["memory_before"] / 2 > 0
    # `sum(range(20000))` alone takes a tenth of a millisecond of whichever process does it.
    assert found["core_us"] > 100
    assert found["passes"] > 1, "5 batches are one pass"


def test_the_stream_on_the_same_images_is_measured_in_turn(loaders, tiny_data, capsys):
    found, text = measure(capsys, "steady", tiny_data, "--seconds", 0.2, "--batch-size", 8)
    assert found["over"] > 0
    assert found["stream"]["img_s"] > 0
    assert f"{found['over']:.2f} times" in text
    assert set(found["limits"]) == {
        "bare libjpeg-turbo, whole images", "a copy of the batch in memory",
    }  # fmt: skip
    assert min(found["limits"].values()) > 0


def test_a_loader_that_ends_is_started_again(loaders):
    loader = ForeignLoader("their_loaders:short")
    assert [loader.take() for _ in range(5)] == [4, 2, 4, 2, 4]
    assert (loader.passes, loader.images) == (3, 16)


@dataclass
class OwnBatch:
    """A batch whose first field counts nothing, like ours."""

    ids: torch.Tensor
    images: np.ndarray


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        (torch.zeros(5, 2), "batch"),
        ((torch.tensor(3), np.zeros((5, 2))), "batch[1]"),
        ([{"data": torch.zeros(5)}], "batch[0]['data']"),
        ({"size": 3, "pixels": [np.zeros((5, 1))]}, "batch['pixels'][0]"),
        (OwnBatch(torch.zeros(9), np.zeros((5, 3))), "batch.images"),
    ],
)
def test_images_are_counted_by_the_first_array(batch, path):
    found = find_array(batch)
    assert found is not None
    assert (found.path, found.shape[0]) == (path, 5)


def test_a_batch_without_an_array_has_none():
    deep: object = torch.zeros(5)
    for _ in range(7):
        deep = [deep]
    for batch in (3, "abc", None, {}, [()], torch.tensor(3), deep):
        assert find_array(batch) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("their_loaders", "give module:function, for example train:make_loader"),
        ("no_such:make", "there is no module no_such in this folder or installed"),
        ("their_loaders:make", "module their_loaders has no function make"),
        ("their_loaders:WORKS", "module their_loaders has no function WORKS"),
        ("their_typo:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_"),
        ("their_script:make", "cannot be imported: ZeroDivisionError: division by zero ("),
        ("their_loaders:number", "returns int, which is no iterable of batches"),
        ("their_loaders:nothing", "ends without a batch"),
        ("their_loaders:words", "gives batches without an array (str)"),
        ("their_loaders:Once", "ends without a batch when it is started again, after 12 images"),
        ("their_loaders:broken", "failed: ValueError: sample is no image ("),
        ("their_loaders:broken_workers", "failed: ValueError: sample is no image ("),
        ("their_loaders:leaves", "failed: SystemExit: 3 ("),
        ("their_loaders:Noise.missing", "has no function Noise.missing"),
    ],
)
def test_a_broken_loader_is_one_line(loaders, name, text):
    with pytest.raises(DuetError) as refused:
        main(["--loader", name, "--seconds", "0.1"])
    said = str(refused.value)
    assert text in said
    assert "\n" not in said
    if "(" in text and "ValueError" in text:
        assert f"{loaders}/their_loaders.py, line " in said
    assert refused.value.exit_code == (1 if "failed" in text else 2)


def test_the_form_excludes_the_others(loaders):
    with pytest.raises(UsageError, match="--rate and --loader exclude each other"):
        main(["data", "--rate", "--loader", "a:b"])
    with pytest.raises(UsageError, match="--compare goes with a whole report"):
        main(["--loader", "their_loaders:steady", "--compare", "x.json"])
