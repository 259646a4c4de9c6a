"""Figure 4, left: which images are shown, with which bars, and what is said without any."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.report.images import (
    MissingFigure,
    choose_images,
    collect_answers,
    count_confusions,
    read_rows,
)
from cluster.report.page import write_report
from cluster.run.probabilities import (
    ProbabilityInfo,
    SavedProbabilities,
    open_writer,
    probability_path,
)
from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest, identity
from pipeline.tools.errors import UsageError
from tests.cluster.report.test_report import Page

DAMAGED = 3
VIEWS = 10


@pytest.fixture
def run(tmp_path: Path, tiny_data: Path) -> Path:
    """A run with probabilities of the 20 validation images, one of them damaged."""
    save_probabilities(tmp_path, tiny_data)
    row = {"position": 8, "step": 1, "epoch": 0.1, "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def read_truth(data: Path) -> torch.Tensor:
    with Stream(data, split="val", batch_size=20, crop="center", once=True) as stream:
        return next(stream).labels


def save_probabilities(run: Path, data: Path, sha256: str = "") -> None:
    names = Manifest.load(data).classes
    about = ProbabilityInfo(
        views=VIEWS, split="val", samples=20, classes=names,
        data_sha256=sha256 or identity(data), step=7,
    )  # fmt: skip
    rows = torch.softmax(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)) * 2, 1)
    weights = torch.ones(20)
    weights[DAMAGED] = 0
    with open_writer(probability_path(run, VIEWS), about) as writer:
        writer.add(rows, read_truth(data), weights)


def test_best_and_worst_are_by_the_probability_of_the_truth(run, tiny_data):
    file = SavedProbabilities(run, VIEWS)
    true = file.rows(0, 20)[torch.arange(20), file.labels]
    assert read_rows(file)[0].equal(true)
    order = [number for number in torch.argsort(true).tolist() if number != DAMAGED]
    found = choose_images(file, true, ("worst", "best"), 5)
    assert found == {"worst": order[:5], "best": order[::-1][:5]}
    lot = choose_images(file, true, ("random",), 30)["random"]
    assert sorted(lot) == [number for number in range(20) if number != DAMAGED]
    assert choose_images(file, true, ("random",), 4)["random"] == lot[:4], (
        "the lot is the same every time"
    )


def test_images_are_shown_with_their_truth_and_the_likeliest_classes(run, tiny_data):
    found = collect_answers(run, str(tiny_data), {}, ("worst",), 6)
    ((title, images),) = found.groups
    assert (title, len(images)) == ("Worst: furthest from the truth", 6)
    assert (found.samples, found.step, found.split) == (19, 7, "val")
    file, names = SavedProbabilities(run, VIEWS), Manifest.load(tiny_data).classes
    with Stream(tiny_data, split="val", batch_size=20, crop="center", once=True) as stream:
        batch, mean = next(stream), np.asarray(stream.channel_mean)
    for one in images:
        row = file.rows(one.sample, one.sample + 1)[0]
        assert one.truth == names[int(file.labels[one.sample])]
        assert [guess.share for guess in one.guesses] == sorted(row.tolist(), reverse=True)
        assert [guess.name for guess in one.guesses if guess.true] == [one.truth]
        shown = Image.open(io.BytesIO(base64.b64decode(one.uri.split(",")[1])))
        whole = np.asarray(shown.resize((256, 256)), float)[16:240, 16:240]
        network = batch.images[one.sample].float().numpy().transpose(1, 2, 0) + mean
        assert np.abs(whole - network).mean() < 8, "it is that image"


def test_the_verdict_is_how_the_error_counts_it(run, tiny_data):
    ((_, images),) = collect_answers(run, str(tiny_data), {}, ("random",), 19).groups
    assert {one.verdict for one in images} == {"right", "in the top 5"}  # of four classes
    assert [one.verdict == "right" for one in images] == [
        one.guesses[0].name == one.truth for one in images
    ]


def test_the_page_has_the_groups_that_were_asked_for(run, tiny_data):
    page = Page(write_report(run, str(tiny_data), ("best", "random"), 3))
    assert sum(alt.startswith("val sample") for alt in page.images) <= 6
    assert "Best: surest of the truth" in page.text
    assert "Randomly sampled" in page.text
    assert "Worst: furthest from the truth" not in page.text


def test_the_pairs_most_confused_are_counted_without_damaged_images(run, tiny_data):
    file, names = SavedProbabilities(run, VIEWS), Manifest.load(tiny_data).classes
    answers = file.rows(0, 20).argmax(1).tolist()
    wrong = Counter(
        (names[label], names[answer])
        for number, (label, answer) in enumerate(zip(file.labels.tolist(), answers, strict=True))
        if label != answer and number != DAMAGED
    )
    found = count_confusions(file, read_rows(file)[1])
    assert {(one.truth, one.answer): one.count for one in found} == wrong
    assert [one.count for one in found] == sorted(wrong.values(), reverse=True)
    assert found == collect_answers(run, str(tiny_data), {}).confusions
    page = Page(write_report(run, str(tiny_data)))
    assert f"{found[0].truth} → {found[0].answer}" in page.text, "without a confusion matrix"


def test_what_is_missing_is_said(run, tiny_data, tmp_path):
    with pytest.raises(MissingFigure, match="does not say where its data set is"):
        collect_answers(run, "", {})
    save_probabilities(run, tiny_data, sha256="0" * 64)
    with pytest.raises(MissingFigure, match="is not the data set that was evaluated"):
        collect_answers(run, str(tiny_data), {})
    probability_path(run, VIEWS).write_bytes(b"damaged")
    with pytest.raises(MissingFigure, match="cannot be used"):
        collect_answers(run, str(tiny_data), {})
    probability_path(run, VIEWS).unlink()
    with pytest.raises(MissingFigure, match="--save-probabilities"):
        collect_answers(run, str(tiny_data), {})
    with pytest.raises(UsageError, match="--each is 0"):
        write_report(run, each=0)
