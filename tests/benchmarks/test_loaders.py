"""The comparison of loaders: what is measured is what was asked for, and the figures add up."""

from __future__ import annotations

import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import loaders  # noqa: E402
from peers import PEERS  # noqa: E402
from peers.crops import CROP, crop_jpeg, draw_box  # noqa: E402
from peers.turns import Turn, check_batches  # noqa: E402
from peers.work import Floats, Work, stored  # noqa: E402

from pipeline.tools.errors import DataError, SetupError, UsageError  # noqa: E402
from tests.helpers.processes import run_command  # noqa: E402

MEAN = (120.0, 110.0, 100.0)
BATCH = 4


def work(data: Path = Path("nowhere")) -> Work:
    """Return the job of a loader in these tests."""
    return Work(
        data=data,
        lane="jpeg",
        folder=data,
        mean=MEAN,
        samples=48,
        passes=1,
        cores=1,
        batch_size=BATCH,
    )


def good() -> Iterator[torch.Tensor]:
    """Batches of noise that have the right shape, type, range and mean."""
    noise = torch.Generator().manual_seed(0)
    while True:
        pixels = torch.randint(0, 256, (BATCH, 3, CROP, CROP), generator=noise)
        yield pixels.float() - 127.5


def test_a_sound_loader_passes() -> None:
    check_batches(good(), work())


@pytest.mark.parametrize(
    ("batches", "named"),
    [
        ((x[:, :, :223] for x in good()), "shape"),
        ((x[:2] for x in good()), "shape"),
        ((x.double() for x in good()), "dtype torch.float64"),
        ((x.to(torch.uint8) for x in good()), "dtype torch.uint8"),
        ((x / 255 for x in good()), "pixels from -0.5 to 0.5"),
        ((x + 127.5 for x in good()), "pixels from 0.0"),
        ((x + 11 for x in good()), r"channel means \+11"),
        ((x + torch.tensor([15, 0, -15.0]).view(3, 1, 1) for x in good()), "channel means"),
        (itertools.repeat(next(good())), "the same pixels"),
    ],
)
def test_another_output_is_refused(batches: Iterator[torch.Tensor], named: str) -> None:
    with pytest.raises(DataError, match=named):
        check_batches(batches, work())


def test_floats_are_the_pixels_minus_the_mean() -> None:
    floats = Floats(MEAN)
    crops = torch.randint(0, 256, (5, BATCH, CROP, CROP, 3), dtype=torch.uint8)
    for batch in crops:
        wanted = batch.numpy().astype(np.float64) - np.array(MEAN)
        np.testing.assert_array_equal(floats(batch).numpy(), wanted.transpose(0, 3, 1, 2))


def test_a_crop_is_a_window_of_the_image(tiny_data: Path) -> None:
    jpeg = next(stored(work(tiny_data)))
    image = np.asarray(Image.open(io.BytesIO(jpeg)))
    windows = np.lib.stride_tricks.sliding_window_view(image, (CROP, CROP), (0, 1))
    seen = set()
    for _ in range(12):
        crop = crop_jpeg(jpeg, "random")
        for flip, pixels in ((False, crop), (True, crop[:, ::-1])):
            # The place is where the first row fits; then everything must.
            fits = (windows[:, :, :, 0] == pixels[0].T).all((2, 3))
            seen |= {
                (x, y, flip)
                for y, x in np.argwhere(fits)
                if np.array_equal(image[y : y + CROP, x : x + CROP], pixels)
            }
    assert len(seen) > 6, "crops do not vary, or are no windows of the image"
    assert {flip for *_, flip in seen} == {False, True}


@pytest.mark.parametrize("crop", ["random", "resized"])
def test_a_box_lies_inside_the_image_and_varies(crop: str) -> None:
    for width, height in ((256, 256), (667, 500), (500, 1377), (2000, 300)):
        boxes = [draw_box(width, height, crop) for _ in range(300)]
        for x, y, w, h in boxes:
            assert 0 <= x <= width - w
            assert 0 <= y <= height - h
            assert crop == "resized" or (w, h) == (CROP, CROP)
        assert len(set(boxes)) > 200 or (width, height) == (2000, 300)
        if crop == "resized":
            areas = [w * h / (width * height) for _, _, w, h in boxes]
            assert min(areas) > 0.07
            assert all(0.74 < w / h < 1.35 for _, _, w, h in boxes)


def test_a_resized_crop_is_pillows(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = next(stored(work(tiny_data)))
    monkeypatch.setattr("peers.crops.draw_box", lambda *_: (10, 20, 100, 120))
    image = Image.open(io.BytesIO(jpeg)).crop((10, 20, 110, 140))
    expected = np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR))
    crop = crop_jpeg(jpeg, "resized")
    assert np.array_equal(crop, expected) or np.array_equal(crop[:, ::-1], expected)


def test_stored_gives_every_image_of_the_tars(tiny_data: Path) -> None:
    found = []
    for shard in sorted(tiny_data.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    assert len(found) == 48
    assert list(stored(work(tiny_data))) == found


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that is twice as slow in one round must not move the ratio."""
    ours, theirs, limit = (
        loaders.LoaderRow(name, PEERS[name]) for name in ("ours", "torch", "limit")
    )
    rates = ((ours, (300, 150, 330)), (theirs, (100, 50, 100)), (limit, (600, 300, 600)))
    for row, values in rates:
        row.turns = [Turn(float(value), 4.0, 10**9) for value in values]
    theirs.resumed, theirs.first, ours.first, limit.first = [3.0], 0.5, 0.5, 0.5
    found = loaders.collect_facts([limit, ours, theirs])
    assert found["torch"]["ours_over_it"] == [3.0, 3.0, 3.3]
    assert found["ours"]["share_of_limit"] == [0.5, 0.5, 0.55]
    assert found["limit"]["ours_over_it"] == []
    table = loaders.make_table(found, loaders.LoaderOptions(data=Path()))
    rows = {cells[0].split(" + ")[0].strip("*"): cells[1:] for cells in table.rows}
    assert rows["Duet stream"][:4] == ("300", "150 to 330", "0.50", "1.00")
    assert rows["torch DataLoader"][3:] == ("3.00", "4.00", "1,000", "0.50", "3.00")
    assert table.notes == ["Not resumed: torch DataLoader + Pillow: DataLoader has no state."]
    figures = loaders.make_figures(found)
    assert figures["ours over torch"].rate.median == 3.0
    assert "limit, resumed" not in figures


def test_a_loader_that_breaks_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken:
        """Ours works; torch is not ready; webdataset breaks in its second turn."""

        def __init__(self, peer: object, work: str, resumed: int = 0) -> None:
            self.name, self.turns = work, 0

        def wait(self, seconds: float | None = None) -> float:
            if self.name == "torch":
                raise SetupError("no torch today")
            return 0.25

        def turn(self, seconds: float) -> Turn:
            self.turns += 1
            if self.name == "webdataset" and self.turns == 2:
                raise SetupError("its process ended")
            return Turn(100.0, 1.0, 1)

        def close(self) -> None:
            pass

    names = {peer.title: name for name, peer in PEERS.items()}
    monkeypatch.setattr(loaders, "Runner", Broken)
    monkeypatch.setattr(loaders, "make_work", lambda peer, *_: names[peer.title])
    rows = [loaders.LoaderRow(name, PEERS[name]) for name in ("ours", "torch", "webdataset")]
    loaders.measure(rows, loaders.LoaderOptions(data=Path(), rounds=3), tmp_path)
    assert [row.missing for row in rows] == ["", "no torch today", "its process ended"]
    assert [len(row.turns) for row in rows] == [3, 0, 0]
    table = loaders.make_table(loaders.collect_facts(rows), loaders.LoaderOptions(data=Path()))
    assert [cells[0] for cells in table.rows] == ["**Duet stream**"]
    assert "torch DataLoader + Pillow: no torch today." in table.notes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"only": "ours,swift"}, "swift: no such loader; there are limit, ours, native"),
        ({"only": "ours-raw"}, "ours-raw: needs --raw"),
        ({"only": "torch", "device": "gpu"}, "torch: knows the CPU only"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(options: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        loaders.select_loaders(loaders.LoaderOptions(data=Path(), **options))  # type: ignore[arg-type]


def test_a_set_of_the_other_encoding_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    options = loaders.LoaderOptions(data=tiny_data, raw=tiny_data)
    with pytest.raises(UsageError, match="holds jpeg images, not raw"):
        loaders.make_work(PEERS["ours-raw"], options, tmp_path / "x")


def test_a_missing_library_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = {row.name: row for row in loaders.select_loaders(loaders.LoaderOptions(data=Path()))}
    assert rows["ours"].missing == ""
    assert rows["litdata"].missing == "not installed (pip install litdata)"
    assert "ours-raw" not in rows, "without --raw there is no raw lane"


def test_the_whole_comparison_in_json(tiny_data: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "loaders.py"), str(tiny_data)]
    command += ["--only", "ours,native,torch", "--rounds", "2", "--seconds", "0.2"]
    command += ["--crop", "resized", "--samples", "20000"]
    done = run_command(
        [*command, "--batch-size", "8", "--json"],
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    found = whole["loaders"]
    assert list(found) == ["ours", "native", "torch"]
    for row in found.values():
        assert len(row["img_s"]) == 2
        assert min(row["img_s"] + row["cpu_ms"] + row["memory_mb"]) > 0
        assert row["first_batch_s"] > 0
    assert found["ours"]["ours_over_it"] == [1.0, 1.0]
    assert len(found["ours"]["resumed_s"]) == 1
    assert found["native"]["resumed_s"] == []
    assert whole["settings"]["data"].startswith("dataset ")
    assert whole["machine"]["cores"] > 0
    assert list(whole["tables"]) == ["loaders-resized"]
    assert "torch DataLoader + Pillow" in done.stderr, "the table is for people"
