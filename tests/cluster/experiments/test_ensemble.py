"""Averages of networks: against counts by hand and a transcription of the original's search."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cluster.experiments import ensemble
from cluster.experiments.ensemble import main
from cluster.run.probabilities import (
    ProbabilityInfo,
    SavedProbabilities,
    open_writer,
    probability_path,
)
from model.metrics import count_errors
from pipeline.tools.errors import DataError, UsageError

IMAGES, CLASSES = 240, 12
NAMES = tuple(f"class {number}" for number in range(CLASSES))
ABOUT = ProbabilityInfo(
    views=10, split="val", samples=IMAGES, classes=NAMES, data_sha256="ab" * 32, step=7
)
LABELS = torch.arange(IMAGES) * 7 % CLASSES


def drawn(seed: int, skill: float = 1.0) -> torch.Tensor:
    """Probabilities [IMAGES, CLASSES] of a net that knows something; some of them are level."""
    shared = torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(99))
    own = torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(seed))
    logits = shared + own + skill * torch.nn.functional.one_hot(LABELS, CLASSES)
    return torch.softmax((logits * 2).round() / 2, dim=1)


def saved(
    run: Path,
    rows: torch.Tensor,
    about: ProbabilityInfo = ABOUT,
    labels: torch.Tensor = LABELS,
    damaged: Sequence[int] = (),
) -> Path:
    """A run with probabilities, written in batches of 64 of which the last one is padded."""
    run.mkdir()
    counts = torch.ones(len(rows))
    counts[list(damaged)] = 0
    with open_writer(probability_path(run, about.views), about) as writer:
        for start in range(0, len(rows), 64):
            part = slice(start, start + 64)
            lacking = max(0, start + 64 - len(rows))
            repeated = torch.cat((rows[part], rows[-1:].expand(lacking, -1)))
            padded = torch.cat((labels[part], labels[-1:].expand(lacking)))
            weight = torch.cat((counts[part], torch.zeros(lacking)))
            writer.add(repeated, padded, weight)
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three nets of differing skill."""
    return [
        saved(tmp_path / name, drawn(seed, skill))
        for seed, (name, skill) in enumerate({"good": 2.0, "fair": 1.0, "poor": 0.2}.items())
    ]


def by_hand(rows: torch.Tensor, places: int, skip: Sequence[int] = ()) -> float:
    """Errors counted one image at a time, in Python: ties as lots drawn."""
    wrong = 0.0
    for number, (row, label) in enumerate(zip(rows.tolist(), LABELS.tolist(), strict=True)):
        if number in skip:
            continue
        ahead = sum(value > row[label] for value in row)
        level = sum(value == row[label] for value in row)
        wrong += 1 - min(max((places - ahead) / level, 0), 1)
    return wrong / (IMAGES - len(skip))


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    result: dict = json.loads(capsys.readouterr().out)
    return result


def test_the_average_is_counted_as_by_hand(runs, capsys):
    found = told(capsys, *runs)
    tables = [drawn(0, 2.0), drawn(1, 1.0), drawn(2, 0.2)]
    for one, table in zip(found["runs"], tables, strict=True):
        assert one["top1_error"] == pytest.approx(by_hand(table, 1))
        assert one["top5_error"] == pytest.approx(by_hand(table, 5))
        assert (one["step"], one["weight"]) == (7, pytest.approx(1 / 3))
    mean = ensemble.combine(torch.stack(tables), [1 / 3] * 3)
    assert found["average"]["top1_error"] == pytest.approx(by_hand(mean, 1))
    assert found["average"]["top5_error"] == pytest.approx(by_hand(mean, 5))
    exact = np.mean([np.asarray(table, np.float64) for table in tables], axis=0)
    loss = -np.log(exact[np.arange(IMAGES), LABELS]).mean()
    assert found["average"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert (found["split"], found["views"], found["samples"]) == ("val", 10, IMAGES)
    assert [one["run"] for one in found["runs"]] == [str(run) for run in runs]


def test_given_weights_are_used(runs, capsys):
    equal, heavy = told(capsys, *runs), told(capsys, *runs, "--weights", 3, 1, 0)
    mean = ensemble.combine(torch.stack([drawn(0, 2.0), drawn(1, 1.0)]), [0.75, 0.25])
    assert heavy["average"]["top1_error"] == pytest.approx(by_hand(mean, 1))
    assert heavy["average"] != equal["average"]
    assert [one["weight"] for one in heavy["runs"]] == [0.75, 0.25, 0]
    alone = told(capsys, *runs, "--weights", 0, 2, 0)
    same = {key: alone["runs"][1][key] for key in alone["average"]}
    assert alone["average"] == same


def of_the_original(tables: torch.Tensor) -> list[float]:
    """`find_coeffs` of avg-valid.py over whole tables, as it stands, but for ties and zeros."""

    def errors_of(coeffs: list[float]) -> tuple[float, float]:
        if sum(coeffs) == 0:
            return (float("inf"), float("inf"))
        preds = ensemble.combine(tables, coeffs)
        top1, top5 = count_errors(preds, LABELS, torch.ones(IMAGES))
        return float(top5), float(top1)

    coeffs = [0.5 for _ in range(len(tables))]
    best, changed = errors_of(coeffs), -1
    for _ in range(5):
        for i in range(len(coeffs)):
            if changed == i:
                changed = -2
                break
            for c in [step / 20 for step in range(21)]:
                oldc = coeffs[i]
                coeffs[i] = c
                if (err := errors_of(coeffs)) < best:
                    best = err
                    changed = i
                else:
                    coeffs[i] = oldc
        if changed == -2:
            break
    return [c / sum(coeffs) for c in coeffs]


class Tables:
    """Tables in memory, in chunks of 50 images."""

    def __init__(self, tables: torch.Tensor) -> None:
        self.tables, self.networks, self.read = tables, len(tables), 0

    def read_chunks(self, start=0):
        for first in range(start, IMAGES, 50):
            last = min(first + 50, IMAGES)
            self.read += last - first
            part = slice(first, last)
            ones = torch.ones(last - first)
            yield last, ensemble.Probabilities(self.tables[:, part], LABELS[part], ones)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_what_the_originals_finds(seed):
    count = 2 + seed
    tables = torch.stack([drawn(10 * seed + k, skill=0.5 + k) for k in range(count)])
    expected = of_the_original(tables)
    kept = Tables(tables)
    assert ensemble.search_weights(kept) == pytest.approx(expected)
    assert kept.read == IMAGES  # once, and never again
    assert expected != pytest.approx([1 / count] * count)
    for room in (0, 2_000):  # nothing of it, or a part, may stay in memory
        again = Tables(tables)
        assert ensemble.search_weights(again, kept=room) == pytest.approx(expected)
        assert again.read > 2 * IMAGES


def test_what_is_left_for_the_search_decides_as_all_of_it():
    tables = torch.stack([drawn(k) for k in range(3)])
    tables[1, 5, 3] = float("nan")
    full = ensemble.Probabilities(tables, LABELS, (torch.arange(IMAGES) % 9 > 0).float())
    blocks = list(ensemble.select_undecided(full))
    assert 0 < sum(block.probabilities.numel() for block in blocks) < tables.numel()

    def counts(chunks, one):
        return sum(
            torch.stack(count_errors(ensemble.combine(p, one), labels, w)).double()
            for p, labels, w in chunks
        )

    base = counts([full], (1, 1, 1)) - counts(blocks, (1, 1, 1))
    for one in [(1, 0, 0), (0, 0, 1), (0.05, 0.95, 0.5), (0, 0.3, 1), (0.2, 0, 0.7)]:
        torch.testing.assert_close(
            counts([full], one) - counts(blocks, one), base, rtol=0, atol=1e-4
        )


def test_searched_weights_are_no_worse_and_said_to_be_searched(runs, capsys):
    equal, found = told(capsys, *runs), told(capsys, *runs, "--search")
    assert found["average"]["top5_error"] < equal["average"]["top5_error"]
    assert sum(one["weight"] for one in found["runs"]) == pytest.approx(1)
    assert (equal["searched"], found["searched"]) == (False, True)
    main([str(run) for run in runs] + ["--search"])
    assert "weights searched on these images" in capsys.readouterr().out


def test_small_chunks_change_nothing(runs, capsys, monkeypatch):
    whole = told(capsys, *runs, "--search")
    monkeypatch.setattr(ensemble, "CHUNK", 3 * CLASSES * 17)
    parts = told(capsys, *runs, "--search")
    assert [one["weight"] for one in parts["runs"]] == [one["weight"] for one in whole["runs"]]
    assert parts["average"] == pytest.approx(whole["average"], rel=1e-6)


def test_an_image_counts_if_it_was_sound_for_all(runs, tmp_path, capsys):
    other = saved(tmp_path / "damaged", drawn(5), damaged=[3, 100])
    found = told(capsys, runs[0], other)
    assert found["samples"] == IMAGES - 2
    assert found["runs"][0]["top1_error"] == pytest.approx(by_hand(drawn(0, 2.0), 1, [3, 100]))
    rows = load_file(probability_path(other, 10))
    assert not rows["probabilities"][[3, 100]].any()
    assert rows["weights"].sum() == IMAGES - 2


def test_the_file_is_plain_safetensors(runs):
    rows = load_file(probability_path(runs[1], 10))
    np.testing.assert_array_equal(rows["probabilities"], drawn(1, 1.0))
    np.testing.assert_array_equal(rows["labels"], LABELS)
    np.testing.assert_array_equal(rows["ids"], np.arange(IMAGES))
    assert (rows["weights"] == 1).all()
    assert {name: str(array.dtype) for name, array in rows.items()} == {
        "probabilities": "float32", "labels": "int64", "ids": "int64", "weights": "float32",
    }  # fmt: skip
    opened = SavedProbabilities(runs[1], 10)
    assert opened.about == ABOUT
    assert torch.equal(opened.rows(30, 33), drawn(1, 1.0)[30:33])


def test_rows_that_lack_leave_no_file(tmp_path):
    path = tmp_path / "probabilities-10.safetensors"
    with (
        pytest.raises(ValueError, match="64 rows were written, not 240"),
        open_writer(path, ABOUT) as w,
    ):
        w.add(drawn(0)[:64], LABELS[:64], torch.ones(64))
    assert not list(tmp_path.iterdir())


def refused(*words: object, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as error:
        main([str(word) for word in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_without_probabilities_is_told_how_to_make_them(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    command = f"duet evaluate {bare} --views 10 --save-probabilities"
    assert command in refused(*runs, bare)
    assert "--views 1 --save-probabilities" in refused(*runs, "--views", 1)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (replace(ABOUT, split="train"), "are of split 'train', those of"),
        (replace(ABOUT, data_sha256="cd" * 32), "another data set (manifest cdcdcdcdcdcd)"),
        (replace(ABOUT, classes=(*NAMES[:-1], "zebra")), "number 11 is 'zebra', not 'class 11'"),
        (replace(ABOUT, classes=(*NAMES, "zebra")), "of other classes (13, not 12)"),
    ],
)
def test_probabilities_of_something_else_are_refused(runs, tmp_path, about, message):
    table = torch.nn.functional.pad(drawn(4), (0, len(about.classes) - CLASSES))
    other = saved(tmp_path / "other", table, about)
    said = refused(runs[0], other)
    assert message in said
    assert str(other) in said
    assert str(runs[0]) in said


def test_probabilities_with_other_labels_are_refused(runs, tmp_path):
    other = saved(tmp_path / "other", drawn(4), labels=LABELS.roll(1))
    assert "another data set" in refused(runs[0], other)


def test_options_that_cannot_work_are_refused(runs, tmp_path):
    assert "0 runs given; name at least two" in refused()
    assert "1 runs given; name at least two" in refused(runs[0])
    assert "2 weights for 3 runs" in refused(*runs, "--weights", 1, 2)
    assert "each must be finite, 0 or above" in refused(*runs, "--weights", 1, -1, 1)
    assert "each must be finite, 0 or above" in refused(*runs, "--weights", 1, "nan", 1)
    assert "one at least must be above 0" in refused(*runs, "--weights", 0, 0, 0)
    assert "give one of the two" in refused(*runs, "--search", "--weights", 1, 1, 1)
    assert "is a folder; name a file" in refused(*runs, "--out", tmp_path)
    nothing = [
        saved(tmp_path / f"half-{k}", drawn(k), damaged=range(120 * k, 120 * k + 120))
        for k in range(2)
    ]
    assert "no image was sound for all runs" in refused(*nothing)


@pytest.mark.parametrize("harm", ["cut", "no safetensors", "other metadata"])
def test_a_file_that_was_harmed_is_told(runs, harm):
    path = probability_path(runs[0], 10)
    content = path.read_bytes()
    if harm == "other metadata":
        content = content.replace(b'\\"version\\": 1', b'\\"version\\": 9')
    path.write_bytes({"cut": content[:-5], "no safetensors": b"\0" * 30}.get(harm, content))
    said = refused(*runs, kind=DataError)
    assert str(path) in said
    assert "--save-probabilities makes it anew" in said


def test_probabilities_older_than_the_network_are_told(runs, capsys):
    (runs[0] / "checkpoints" / "step-00000009").mkdir(parents=True)
    main([str(run) for run in runs])
    said = capsys.readouterr()
    assert f"of {runs[0]} are those of step 7; it has come to step 9 since" in said.err
    assert said.out.count("step 7") == 3


def test_nothing_is_written_but_out(runs, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    found = told(capsys, *runs)
    assert sorted(tmp_path.rglob("*")) == before
    path = tmp_path / "new" / "average.json"
    assert told(capsys, *runs, "--out", path) == found
    assert json.loads(path.read_text()) == found
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path.parent, path])


def test_the_table_has_a_line_for_each_size_over_all_choices_of_the_runs(runs, capsys):
    found = told(capsys, *runs, "--sizes", 1, 2, 3)
    tables = [drawn(0, 2.0), drawn(1, 1.0), drawn(2, 0.2)]
    assert [line["nets"] for line in found["sizes"]] == [1, 2, 3]
    assert [line["combinations"] for line in found["sizes"]] == [3, 3, 1]
    for line, size in zip(found["sizes"], (1, 2, 3), strict=True):
        for name, places in (("top1_error", 1), ("top5_error", 5)):
            errors = [
                by_hand(ensemble.combine(torch.stack(some), [1 / size] * size), places)
                for some in itertools.combinations(tables, size)
            ]
            assert line["equal"][name] == pytest.approx(np.mean(errors))
            sd = line["equal"][f"{name}_sd"]
            assert sd == (None if size == 3 else pytest.approx(np.std(errors, ddof=1)))
    searched = told(capsys, *runs, "--search")["average"]
    whole = found["sizes"][2]
    assert {name: whole["searched"][name] for name in ("top1_error", "top5_error")} == {
        name: pytest.approx(searched[name]) for name in ("top1_error", "top5_error")
    }
    assert found["sizes"][0]["held_out"] == found["sizes"][0]["equal"]


def test_weights_of_the_table_are_searched_on_images_that_are_not_counted(runs, capsys):
    (line,) = told(capsys, *runs, "--sizes", 3)["sizes"]
    tables = torch.stack([drawn(0, 2.0), drawn(1, 1.0), drawn(2, 0.2)])
    wrong = {"top1_error": 0.0, "top5_error": 0.0}
    for tested in (0, 1):
        fitted = Tables(tables[:, 1 - tested :: 2])
        fitted.read_chunks = lambda start=0, f=fitted, t=tested: iter(
            [(120, ensemble.Probabilities(f.tables, LABELS[1 - t :: 2], torch.ones(120)))]
        )
        mean = ensemble.combine(tables, ensemble.search_weights(fitted))
        skip = range(1 - tested, IMAGES, 2)
        for name, places in (("top1_error", 1), ("top5_error", 5)):
            wrong[name] += by_hand(mean, places, skip) / 2
    for name, error in wrong.items():
        assert line["held_out"][name] == pytest.approx(error)
    assert line["held_out"]["top5_error"] >= line["searched"]["top5_error"]


def test_sizes_that_cannot_be_are_refused(runs, capsys):
    assert "--sizes has 4; there are 3 runs" in refused(*runs, "--sizes", 1, 4)
    assert "--sizes has 0; there are 3 runs" in refused(*runs, "--sizes", 0)
    assert "leave out the others" in refused(*runs, "--sizes", 1, "--search")
    main([str(run) for run in runs] + ["--sizes", "1", "3"])
    said = capsys.readouterr().out
    assert "1 " in said
    assert "(mean of 3)" in said
