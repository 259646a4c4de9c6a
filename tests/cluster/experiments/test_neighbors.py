"""Features against the network run by hand; the command, its files and its refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cluster.checkpoint.format import load_checkpoint
from cluster.config import Config
from cluster.experiments.neighbors import extract
from cluster.experiments.neighbors.__main__ import main
from cluster.experiments.neighbors.extract import cut_stretches, make_features
from cluster.experiments.neighbors.features import Features, FeatureWriter, open_source
from cluster.experiments.neighbors.figures import Pairs, sample_pairs
from cluster.mesh import ProcessMesh
from cluster.run.folder import write_run_config
from cluster.training.loop import train
from model.alexnet import AlexNet
from model.architecture import Design
from pipeline.batches import Stream
from pipeline.dataset.manifest import identity
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.images import flip_bit
from tests.helpers.processes import call_command, run_command
from tests.helpers.resealed_data import edit_manifest

CONFIG = Config(
    dtype="float32",
    design=Design(width=0.125),
    batch_size=8,
    steps=2,
    checkpoint_every=2,
    validate_every=2,
)
UNITS = 512


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("trained"), CONFIG, tiny_data)


@pytest.fixture(autouse=True)
def one_worker_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single worker would be a process, too, and take four seconds to begin."""
    pool = extract.LocalPool
    monkeypatch.setattr(extract, "LocalPool", lambda count: (Here if count == 1 else pool)(count))


def made(run: Path, config: Config, data: Path) -> Path:
    run.mkdir(exist_ok=True)
    origin = {"data": str(data)}
    write_run_config(run, config, identity(data), samples=48, step=0, origin=origin)
    train(config, data, run, ProcessMesh(), lambda event: None)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def by_hand(run: Path, data: Path, split: str) -> np.ndarray:
    """fc7 image by image, the layers called one by one and not by the network's forward."""
    net = AlexNet(classes=4, width=CONFIG.design.width)
    load_checkpoint(run / "checkpoints" / "step-00000002", net)
    net.eval()
    rows = []
    with (
        torch.no_grad(),
        Stream(data, split=split, batch_size=1, crop="center", once=True, threads=1) as stream,
    ):
        for batch in stream:
            seen = {}
            net(batch.images, watch=seen.__setitem__)
            fc6 = F.relu(F.linear(seen["conv5"].flatten(1), net.fc6.weight, net.fc6.bias)) * 0.5
            rows.append(F.relu(F.linear(fc6, net.fc7.weight, net.fc7.bias)) * 0.5)
    return torch.cat(rows).numpy()


def called(capsys, run: Path, data: Path | None, *more: str):
    words = [] if data is None else ["--data", str(data)]
    assert main([str(run), *words, "--json", "-k", "3", "--pairs", "500", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_features_are_what_fc8_reads(run, tiny_data, capsys):
    called(capsys, run, tiny_data, "--dtype", "float32")
    for split, count in (("train", 48), ("val", 20)):
        found = Features(run / "neighbours", split)
        assert found.values.shape == (count, UNITS)
        expected = by_hand(run, tiny_data, split)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-6)
        with Stream(tiny_data, split=split, batch_size=count, once=True, crop="center") as stream:
            assert found.labels.tolist() == next(stream).labels.tolist()


def test_numbers_are_those_of_brute_force(run, tiny_data, capsys):
    said = called(capsys, run, tiny_data)
    facts = said["neighbours"]
    assert json.loads((run / "neighbours" / "summary.json").read_text()) == said
    asked, base = (Features(run / "neighbours", split) for split in ("val", "train"))
    far = np.square(asked.values[:, None].astype(np.float64) - base.values).sum(-1)
    ids = np.argsort(far, axis=1, kind="stable")[:, :3]
    saved = np.load(run / "neighbours" / "nearest.npz")
    np.testing.assert_array_equal(saved["ids"], ids)
    np.testing.assert_allclose(saved["distances"], np.take_along_axis(far, ids, 1))
    right = base.labels[ids] == asked.labels[:, None]
    assert facts["precision_at_k"] == pytest.approx(right.mean())
    assert facts["precision_at"] == pytest.approx([right[:, :n].mean() for n in (1, 2, 3)])
    assert facts["precision_by_chance"] == 0.25
    assert (facts["units"], facts["bytes_per_picture"]) == (UNITS, 2 * UNITS)
    same = asked.labels[:, None] == base.labels
    closer = [(s < far[~same]).mean() + (s == far[~same]).mean() / 2 for s in far[same]]
    assert facts["auc"] == pytest.approx(np.mean(closer), abs=5 * facts["auc_error"])
    ratio = np.sqrt(far[same]).mean() / np.sqrt(far[~same]).mean()
    assert facts["mean_ratio"] == pytest.approx(ratio, rel=0.1)
    assert "<svg" in (run / "neighbours" / "distances.svg").read_text()


def test_the_sheet_frames_neighbours_by_whether_their_class_is_right(run, tiny_data, capsys):
    facts = called(capsys, run, None, "--show", "5")["neighbours"]
    sheet = np.asarray(Image.open(run / "neighbours" / "sheet.png").convert("RGB"))
    frames = {"right": (0x12, 0x80, 0x6A), "wrong": (0xB5, 0x44, 0x1C)}
    rows = facts["sheet"]
    assert len(rows) == 5
    assert len({row["class"] for row in rows[:4]}) == 4  # each class before the second of any
    for number, row in enumerate(rows):
        for column, name in enumerate(row["classes"]):
            top, left = 26 + 10 + number * 164, 10 + 20 + (1 + column) * 144
            colour = frames["right" if name == row["class"] else "wrong"]
            assert tuple(sheet[top, left]) == colour
            assert tuple(sheet[top + 135, left + 135]) == colour


def test_a_second_call_takes_what_is_there(run, tiny_data, capsys):
    first = called(capsys, run, tiny_data)
    file = run / "neighbours" / "features-train.npy"
    before = file.stat()
    shutil.move(tiny_data / "train-000000.tar", tiny_data / "away")  # no image is read again
    try:
        second = called(capsys, run, tiny_data, "--split", "val", "--show", "1")
    except DataError:
        second = None  # the sheet may want an image of that shard
    finally:
        shutil.move(tiny_data / "away", tiny_data / "train-000000.tar")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    if second:
        assert second["neighbours"]["precision_at"] == first["neighbours"]["precision_at"]


def test_an_image_is_not_its_own_neighbour(run, tiny_data, capsys):
    called(capsys, run, tiny_data, "--split", "train")
    saved = np.load(run / "neighbours" / "nearest.npz")
    assert not (saved["ids"] == saved["queries"][:, None]).any()
    assert saved["distances"].shape == (48, 3)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 rows, in this process and, by the environment, in workers."""
    for module in ("features", "extract"):
        monkeypatch.setattr(f"cluster.experiments.neighbors.{module}.BLOCK_ROWS", 8)
    monkeypatch.setattr("cluster.experiments.neighbors.extract.BATCH", 8)


class Here:
    """A pool that works in this process, and may be killed."""

    after = 99

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, task, jobs):
        for number, job in enumerate(jobs):
            if number == self.after:
                raise KeyboardInterrupt
            yield task(job)


def test_what_was_complete_when_it_was_killed_is_not_made_again(
    run, tiny_data, tmp_path, small_blocks, monkeypatch
):
    monkeypatch.setattr("cluster.experiments.neighbors.extract.LocalPool", Here)
    monkeypatch.setattr("cluster.experiments.neighbors.extract.STRETCH", 2)
    trained = open_source(run, str(tiny_data))
    whole = make_features(tmp_path, trained, "train")
    cut = tmp_path / "cut"
    cut.mkdir()
    monkeypatch.setattr(Here, "after", 2)
    with pytest.raises(KeyboardInterrupt):
        make_features(cut, trained, "train")
    assert not (cut / "features-train.npy").exists()
    growing = FeatureWriter(cut, whole.about)
    assert (growing.count_rows(), growing.reset_incomplete()) == (32, [4, 5])
    with (cut / "features-train.growing").open("r+b") as file:  # a torn write of block 1
        file.seek(128 + 9 * UNITS * 2)
        file.write(b"\xff\xff")
    made = []
    put = FeatureWriter.put
    monkeypatch.setattr(
        FeatureWriter, "put", lambda self, b, *rest: (made.append(b), put(self, b, *rest))
    )
    monkeypatch.setattr(Here, "after", 99)
    resumed = make_features(cut, trained, "train")
    assert made == [1, 4, 5]
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert not list(cut.glob("*.growing")) + list(cut.glob("*.state"))


def test_killed_between_the_last_two_renames(run, tiny_data, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr("cluster.experiments.neighbors.extract.LocalPool", Here)
    trained = open_source(run, str(tiny_data))
    with monkeypatch.context() as patched:
        patched.setattr("cluster.experiments.neighbors.features.seal_features", killed)
        with pytest.raises(KeyboardInterrupt):
            make_features(tmp_path, trained, "val")
    assert (tmp_path / "features-val.npy").exists()
    monkeypatch.setattr(
        "cluster.experiments.neighbors.extract.extract", killed
    )  # no image is read again
    found = make_features(tmp_path, trained, "val")
    np.testing.assert_allclose(found.values, by_hand(run, tiny_data, "val"), rtol=2e-3, atol=1e-4)


def killed(*_):
    raise KeyboardInterrupt


def test_two_workers_make_what_one_makes(run, tiny_data, tmp_path):
    trained = open_source(run, str(tiny_data))
    (tmp_path / "two").mkdir()
    one = make_features(tmp_path, trained, "train")
    two = make_features(tmp_path / "two", trained, "train", devices=("cpu", "cpu"))
    np.testing.assert_array_equal(one.values, two.values)
    assert one.about == two.about


@pytest.mark.slow
def test_a_killed_command_goes_on(run, tiny_data):
    command = [
        sys.executable,
        "-m",
        "cluster.experiments.neighbors",
        str(run),
        "--data",
        str(tiny_data),
    ]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = run / "neighbours" / "features-val.state"
    deadline = time.monotonic() + 60
    while not state.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = run_command(command, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "precision at 6" in done.stdout
    left = {path.suffix for path in (run / "neighbours").iterdir()}
    assert not left & {".growing", ".state"}


def test_stretches_cover_what_is_missing_once():
    for workers in (1, 2, 7):
        for missing in ([], [0], [3, 4, 5, 9], list(range(100)), list(range(0, 50, 2))):
            cut = list(cut_stretches(missing, workers))
            assert [block for stretch in cut for block in stretch] == missing
            assert all(len(stretch) <= 16 for stretch in cut)
            assert len(cut) >= min(workers, len(missing))


def test_damaged_images_have_no_features_and_are_no_neighbours(run, data, capsys):
    flip_bit(data, "train", 7)
    facts = called(capsys, run, data)["neighbours"]
    found = Features(run / "neighbours", "train")
    assert np.flatnonzero(~found.sound).tolist() == [7]
    assert not found.values[7].any()
    assert facts["base"]["pictures"] == 47
    assert 7 not in np.load(run / "neighbours" / "nearest.npz")["ids"]


def refused(run: Path, data: Path, *more: str) -> tuple[int, str]:
    module = "cluster.experiments.neighbors"
    done = call_command([sys.executable, "-m", module, run, "--data", data, *more])
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    return done.returncode, line


def test_a_run_without_checkpoints_is_refused(run, tiny_data, tmp_path):
    code, line = refused(tmp_path, tiny_data)
    assert (code, "holds no run" in line) == (2, True)
    shutil.rmtree(run / "checkpoints")
    code, line = refused(run, tiny_data)
    assert (code, "has no complete checkpoint yet" in line) == (2, True)


def test_data_of_other_classes_are_refused(run, data):
    edit_manifest(data, lambda table: table["classes"].__setitem__(0, "another"))
    code, line = refused(run, data)
    assert (code, "not in that order" in line) == (2, True)


def test_the_best_checkpoint_and_one_of_a_step_are_not_both_taken(run, tiny_data):
    code, line = refused(run, tiny_data, "--best", "--checkpoint", "2")
    assert (code, "give --best or --checkpoint 2, not both" in line) == (2, True)


def test_more_neighbours_than_images_are_refused(run, tiny_data):
    code, line = refused(run, tiny_data, "-k", "49")
    assert code == 2
    assert "49 neighbours asked for, and split train" in line
    assert "has 48 images" in line
    assert not (run / "neighbours" / "features-val.npy").exists()  # before anything is computed
    code, line = refused(run, tiny_data, "-k", "48", "--queries", "train")
    assert (code, "has 47 images" in line) == (2, True)


def test_features_of_another_run_or_data_set_are_refused(run, tiny_data, tmp_path, capsys):
    called(capsys, run, tiny_data)
    other = made(tmp_path / "other", replace(CONFIG, seed=1), tiny_data)
    shutil.copytree(run / "neighbours", other / "neighbours")
    code, line = refused(other, tiny_data)
    assert (code, "of another run or step (checkpoint step-00000002" in line) == (4, True)
    assert main([str(other), "--data", str(tiny_data), "--anew"]) == 0
    another = Path(shutil.copytree(tiny_data, tmp_path / "another"))
    edit_manifest(another, lambda table: table.update(seed=5))
    code, line = refused(run, another)
    assert (code, "of another data set (manifest" in line) == (4, True)


def test_damaged_features_are_refused(run, tiny_data, capsys):
    called(capsys, run, tiny_data)
    with (run / "neighbours" / "features-train.npy").open("r+b") as file:
        file.seek(5000)
        (byte,) = file.read(1)
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    code, line = refused(run, tiny_data)
    assert (code, "rows 0 to 47 are not those that were written" in line) == (4, True)


def test_another_call_at_the_same_features_is_refused(run, tiny_data, capsys):
    import fcntl

    (run / "neighbours").mkdir()
    with (run / "neighbours" / "features-val.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, line = refused(run, tiny_data)
    assert (code, "neighbours is in use by another call" in line) == (2, True)


def test_features_too_large_for_float16_are_told(run, tiny_data, monkeypatch):
    monkeypatch.setattr("cluster.experiments.neighbors.extract.LocalPool", Here)
    monkeypatch.setattr(
        "cluster.experiments.neighbors.extract._compute_batch",
        lambda net, batch: torch.full((64, UNITS), 7e4),
    )
    trained = open_source(run, str(tiny_data))
    with pytest.raises(UsageError, match="image 0 of val is 70000, which float16 cannot hold"):
        make_features(run, trained, "val")
    assert make_features(run, trained, "val", dtype="float32").values[3, 3] == 7e4


def test_auc_counts_ties_half():
    rng = np.random.default_rng(0)
    same, other = rng.integers(0, 9, 300) * 1.0, rng.integers(2, 12, 300) * 1.0
    by_pairs = [(s < o) + (s == o) / 2 for s in same for o in other]
    assert Pairs(same, other).auc == pytest.approx(np.mean(by_pairs))


def test_pairs_are_of_the_kind_they_say_and_never_of_an_image_with_itself(run, tiny_data, capsys):
    called(capsys, run, tiny_data)
    base = Features(run / "neighbours", "train")
    # Features by which a distance tells the class and the image of the other side.
    base.values = np.zeros((48, 2))
    base.values[:, 0] = base.labels * 1000
    base.values[:, 1] = np.arange(48)
    pairs = sample_pairs(base, base, 5000, seed=0)
    assert pairs is not None
    assert pairs.same.max() < 48
    assert pairs.same.min() >= 1
    assert pairs.other.min() >= 1000
    expected = [abs(i - j) for i in range(48) for j in range(48)
                if i != j and base.labels[i] == base.labels[j]]  # fmt: skip
    assert pairs.same.mean() == pytest.approx(np.mean(expected), rel=0.05)
