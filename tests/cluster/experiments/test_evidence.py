"""The page of evidence: groups of seeds, each claim beside our number, and what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.checkpoint.writer import CheckpointManager
from cluster.config import Config
from cluster.experiments.evidence.__main__ import (
    choose_file,
    main,
    make_page,
    render,
)
from cluster.experiments.evidence.runs import Evidence
from cluster.experiments.evidence.significance import compute_binomial_margin, compute_view_margins
from cluster.mesh import ProcessMesh
from cluster.report import kernels
from cluster.run.folder import Mark, format_toml
from cluster.run.kernels import copy_first_kernels, encode_kernels
from cluster.run.probabilities import ProbabilityInfo, open_writer, probability_path
from model.alexnet import AlexNet
from model.architecture import Design
from model.optimizer import Sgd2012
from pipeline.tools.errors import DataError, UsageError
from tests.cluster.report.test_report import Page as Html
from tests.helpers.processes import call_command

CLASSES = tuple("abcdefgh")
BASE = Config(design=Design(width=0.0625), steps=60, batch_size=128)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a run of 60 steps over 4,000 images: its name, its errors by views, settings.

    Its page lacks the charts over time, which take a second a run; `test_report` looks at them.
    """
    monkeypatch.setattr(kernels, "_draw_over_time", lambda past: [])

    def made(
        name: str, errors: dict[int, float], step: int = 60, saved: bool = True, **settings: Any
    ) -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        config = Config.from_settings(BASE.to_settings() | settings)
        (run / "config.toml").write_text(format_toml(config, "ab" * 32))
        row = {"position": 128 * step, "step": step, "epoch": 128 * step / 4000, "img_s": 250.0}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        net = AlexNet(classes=len(CLASSES), design=config.design, seed=config.seed)
        if saved:
            (run / "checkpoints").mkdir()
            checkpoints = CheckpointManager(
                run, ProcessMesh(), {"classes": CLASSES}, lambda event: None, keep=1
            )
            checkpoints.begin(
                Mark(step=step, position=128 * step), net, Sgd2012(net.named_parameters())
            )
            checkpoints.finish(must=True)
        first = {
            "position": 128,
            "step": 1,
            "epoch": 0.0,
            "columns": encode_kernels([copy_first_kernels(net)]),
        }
        (run / "kernels.jsonl").write_text(json.dumps(first) + "\n")
        for views, error in errors.items():
            table = {"views": views, "split": "val", "step": 60, "samples": 10_000,
                     "top1_error": error, "top5_error": error / 10}  # fmt: skip
            (run / f"evaluation-{views}.json").write_text(json.dumps(table))
        return run

    return made


@pytest.fixture
def three(make: Make) -> list[Path]:
    """Two seeds with normalisation, two without, which are worse by ten points."""
    return [
        make("s0", {1: 0.30, 10: 0.28}, seed=0),
        make("s1", {1: 0.31, 10: 0.285}, seed=1),
        make("n0", {1: 0.40, 10: 0.38}, seed=0, norm="none"),
        make("n1", {1: 0.41, 10: 0.386}, seed=1, norm="none"),
    ]


def rows(page: Evidence, key: str) -> list[Any]:
    return [row for item in page.items if item.claim.key == key for row in item.rows]


def test_runs_that_differ_in_their_seed_alone_are_a_group(three, make):
    shorter = make("s2", {}, step=40, seed=2)
    page = make_page([*three, shorter])
    found = {g.letter: [run.name for run in g.runs] for g in page.groups}
    assert found == {"A": ["s0", "s1"], "B": ["n0", "n1"], "C": ["s2"]}
    assert [group.differs for group in page.groups] == ["", "norm none", "step 40"]


def test_errors_stand_beside_the_papers_with_spread_and_scale(three):
    one, ten, *_ = rows(make_page(three), "errors")
    assert one.ours == "30.5 ± 0.7 % / 3.0 ± 0.1 %"
    assert one.seeds == "2 seeds (top-1: 30.0, 31.0; top-5: 3.0, 3.1)"
    assert ten.paper == "40.7 % / 18.2 % (ILSVRC-2012 validation, ten views)"
    assert ten.verdict == "another scale"
    for words in ("4,000 training images", "8 classes", "width 0.0625", "10,000 images"):
        assert words in ten.scale


def test_ten_views_are_compared_within_each_network(three):
    first, *_ = rows(make_page(three), "views")
    assert first.paper == "−1.5 points"
    assert first.ours.startswith("−2.2 ±") or first.ours.startswith("−2.3 ±")
    assert first.seeds == "2 seeds (−2.0, −2.5)"
    assert first.verdict == "as the paper says"


def test_of_two_answers_to_the_same_images_those_that_change_sides_count(make):
    run, rng = make("s0", {1: 0.3, 10: 0.29}), np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 8, 500))
    rows = {1: torch.from_numpy(rng.random((500, 8))).float()}
    rows[10] = rows[1].clone()
    rows[10][:40] = torch.from_numpy(rng.random((40, 8))).float()
    for views, table in rows.items():
        about = ProbabilityInfo(views=views, split="val", samples=500, classes=CLASSES,
                      data_sha256="ab" * 32, step=60)  # fmt: skip
        with open_writer(probability_path(run, views), about) as writer:
            writer.add(table, labels, torch.ones(500))
    wrong = {views: (table.argmax(1) != labels).numpy() for views, table in rows.items()}
    changes = wrong[10].astype(float) - wrong[1]
    found = compute_view_margins(run)
    assert found is not None
    assert found[0] == pytest.approx(1.959964 * changes.std() / 500**0.5)
    assert found[0] < compute_binomial_margin(wrong[1].mean(), wrong[10].mean(), 500) / 2
    probability_path(run, 1).unlink()
    assert compute_view_margins(run) is None


def test_a_setting_is_worth_what_the_groups_differ_by(three):
    page = make_page(three)
    top1, top5 = rows(page, "lrn")
    assert (top1.group, top1.paper) == ("A − B", "−1.4 points")
    assert top1.ours.startswith("−10.0 ±") or top1.ours.startswith("−10.1 ±")
    assert top1.verdict == top5.verdict == "as the paper says"
    assert rows(page, "pooling") == []
    (lacking,) = [one for one in page.missing if one["title"] == "Overlapping pooling"]
    assert lacking["command"].endswith("s0-pooling --pool 2/2")


def test_the_opposite_of_the_paper_is_told_as_it_is(make):
    runs = [make(f"{norm}{seed}", {1: error + seed / 1000}, seed=seed, norm=norm)
            for norm, error in (("lrn", 0.5), ("none", 0.3)) for seed in (0, 1)]  # fmt: skip
    assert {row.verdict for row in rows(make_page(runs), "lrn")} == {"contrary to the paper"}


def test_one_seed_each_gives_no_verdict(three):
    page = make_page([three[0], three[2]])
    assert {row.verdict for row in rows(page, "lrn")} == {"no verdict: one seed each"}


def test_groups_that_differ_in_more_than_the_setting_are_not_compared(make):
    runs = [make("a", {1: 0.3}), make("b", {1: 0.4}, norm="none", lr=0.02)]
    assert rows(make_page(runs), "lrn") == []
    assert [row.group for row in rows(make_page([*runs, make("t", {1: 0.5}, lr=0.003,
            activation="tanh")]), "relu")] == ["A − C"] * 2  # fmt: skip


def test_every_run_says_whether_its_columns_specialise(three):
    page = make_page(three)
    found = rows(page, "kernels")
    assert [row.group for row in found] == list("AAABBB")
    assert all("seed 0: p = " in row.seeds and "seed 1: p = " in row.seeds for row in found)
    assert {row.verdict for row in found} == {"not beyond a random split"}, "they are noise"
    (item,) = [item for item in page.items if item.claim.key == "kernels"]
    assert [run.name for run, _ in item.body] == ["s0", "s1", "n0", "n1"]


def test_an_old_evaluation_is_not_taken_for_the_newest(make):
    run = make("s0", {1: 0.3}, step=90)
    page = make_page([run])
    assert rows(page, "errors") == []
    (one,) = [one for one in page.missing if "one view" in one["title"]]
    assert one["why"] == "its evaluation is of step 60"
    assert f"duet evaluate {run} --views 1" in one["command"]


def test_the_last_validation_stands_in_for_one_view(make):
    run = make("s0", {})
    row = {"position": 7680, "step": 60, "top1_error": 0.25, "top5_error": 0.05, "samples": 800}
    (run / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = rows(make_page([run]), "errors")
    assert found.ours == "25.0 % / 5.0 %"
    assert "800 images counted" in found.scale


def study(folder: Path, **more: Any) -> Path:
    folder.mkdir()
    values = {"relu": (20_000, 22_000), "tanh": (90_000, 94_000), "slow": (80_000, None)}
    table = {
        "study": "figure1", "title": "ReLU & tanh", "claim": "Six times as fast.",
        "paper": "6 times", "source": "section 3.1", "measure": "pictures", "goal": 0.25,
        "scale": "5,000 images", "plot": "study.png",
        "rows": [{"variant": name, "seed": seed, "lr": 0.01, "measure": "pictures", "value": value}
                 for name, both in values.items() for seed, value in enumerate(both)],
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(table | more))
    return folder


def test_a_study_is_told_with_its_own_claim(tmp_path):
    page = make_page([study(tmp_path / "figure1")])
    relu, tanh, slow = rows(page, "study-figure1")
    assert relu.ours == "21,000 ± 1,414"
    assert relu.what == "relu, lr 0.01: images to 25% training error"
    assert (tanh.verdict, tanh.paper, tanh.scale) == (
        "4.38 times relu",
        "6 times",
        "5,000 images",
    )
    assert (slow.seeds, slow.verdict) == (
        "1 of 2 seeds (80,000, not reached)".replace("80,000", "8e+04"),
        "not reached by all, relu was",
    )  # fmt: skip
    assert "ReLU & tanh" in html_of(page, tmp_path).text
    assert {row.command for row in (relu, tanh, slow)} == {
        f"duet study figure1 --out {tmp_path}/figure1"
    }


def test_a_study_with_goals_has_its_factor_at_each(tmp_path):
    def variant(name: str, at: float, each: list[float | None], **more: Any) -> dict[str, Any]:
        reached = sum(one is not None for one in each)
        unknown = {"against_first": None, "factors": None, "above": None}
        return {"variant": name, "at": at, "n": 2, "came_to_it": reached, "each": each,
                **unknown, **more}  # fmt: skip

    goals = [
        {"goal": 0.45, "variants": [
            variant("relu", 0.003, [100, 120]),
            variant("tanh", 0.01, [300, 420], against_first=3.27, factors=[3.0, 3.5])]},
        {"goal": 0.25, "variants": [
            variant("relu", 0.003, [400, 440]),
            variant("tanh", 0.03, [None, 2000], above=3.6)]},
    ]  # fmt: skip
    command = "duet study small/figure1 --data c"
    page = make_page([study(tmp_path / "figure1", goals=goals, command=command)])
    first, second, third, last = rows(page, "study-figure1")
    assert (first.what, first.ours) == (
        "relu, 0.003: images to 45% training error", "110 ± 14",
    )  # fmt: skip
    assert (second.verdict, second.seeds) == (
        "3.27 times relu (3.00, 3.50)", "2 of 2 seeds (300, 420)",
    )  # fmt: skip
    assert third.ours == "420 ± 28"
    assert (last.ours, last.verdict, last.seeds) == (
        "not reached", "more than 3.6 times relu", "1 of 2 seeds (not reached, 2,000)",
    )  # fmt: skip
    assert [row.paper for row in (second, last)] == ["no number", "6 times"]
    assert last.command == f"{command} --out {tmp_path}/figure1"
    assert page.items[0].weight == 0


def test_a_goal_has_its_decimals_and_a_grid_may_be_of_words(tmp_path):
    one = {"variant": "relu", "at": "lcn", "n": 1, "came_to_it": 1, "each": [100],
           "against_first": None, "factors": None, "above": None}  # fmt: skip
    page = make_page([study(tmp_path / "norms", goals=[{"goal": 0.125, "variants": [one]}])])
    (row,) = rows(page, "study-figure1")
    assert row.what == "relu, lcn: images to 12.5% training error"


def test_what_says_something_comes_first(three):
    page = make_page(three)
    weights = [item.weight for item in page.items]
    assert weights == sorted(weights)
    keys = [item.claim.key for item in page.items]
    assert {"views", "lrn"} == {item.claim.key for item in page.items if item.weight == 0}
    assert keys.index("lrn") < keys.index("kernels") < keys.index("errors")
    assert all(row.seeds and row.command for item in page.items for row in item.rows
               if item.claim.key != "competition")  # fmt: skip


def test_the_competition_has_its_rows(three, make, monkeypatch):
    seven, second = rows(make_page(three), "competition")
    assert "36.7 % / 15.4 %" in seven.paper
    assert "15.3 %" in seven.paper
    assert seven.verdict.startswith("not tested")
    assert (second.paper, second.group) == ("26.2 % (test)", "")
    assert second.ours == "no run on the 1,000 classes has been evaluated"
    monkeypatch.setattr("cluster.experiments.evidence.claims.CLASSES", len(CLASSES))
    _, second = rows(make_page(three), "competition")
    assert second.ours == "2.8 % (s0, ten views, validation)"
    assert second.verdict == "below that, on other images: the test labels are not public"
    assert second.command.endswith("s0 --views 10 --save-probabilities")


def test_validation_curves_are_drawn_where_errors_are_compared(make):
    runs = [make(f"{norm}{seed}", {1: 0.3}, seed=seed, norm=norm)
            for norm in ("lrn", "none") for seed in (0, 1)]  # fmt: skip
    for run in runs:
        lines = [{"position": 128 * step, "step": step, "top1_error": 0.9 - step / 100,
                  "top5_error": 0.1, "samples": 800} for step in (20, 40, 60)]  # fmt: skip
        (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    page = make_page(runs)
    for key in ("errors", "lrn"):
        (item,) = [item for item in page.items if item.claim.key == key]
        (chart,) = item.body
        assert chart.title == "Validation top-1 error"
        assert [name for name, _, _ in chart.legend] == [
            f"{letter}, {run.name} 30 %" for letter, run in zip("AABB", runs, strict=True)
        ]
    assert "<svg" in render(page)


def test_ensembles_of_both_forms(tmp_path, make):
    run = make("s0", {})
    errors = {"top1_error": 0.3, "top5_error": 0.05, "loss": 1.0}
    table = {"views": 10, "split": "val", "samples": 10_000}
    runs = [{"run": "a", **errors}, {"run": "b", **errors, "top1_error": 0.32}]
    average = table | {"searched": False, "runs": runs, "average": {**errors, "top1_error": 0.28}}
    (run / "ensemble.json").write_text(json.dumps(average))
    single, both = rows(make_page([run]), "ensemble")
    assert (single.ours, single.paper) == ("31.0 % / 5.0 %", "40.7 % / 18.2 %")
    assert (both.ours, both.verdict) == ("28.0 % / 5.0 % (−3.0 / +0.0 points)",
                                         "as the paper says")  # fmt: skip

    def line(nets: int, error: float) -> dict[str, Any]:
        kinds = ("equal", "searched", "held_out")
        each = {"top1_error": error, "top1_error_sd": 0.01, "top5_error": 0.1}
        return {"nets": nets, "combinations": 5, **dict.fromkeys(kinds, each)}

    nets = [line(1, 0.3), line(5, 0.32)]
    sizes = table | {"runs": list("abcde"), "sizes": nets}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(sizes))
    one, equal, *others = rows(make_page([path]), "ensemble")
    assert one.what == "top-1 / top-5 error of 1 network"
    assert one.seeds == f"{tmp_path.name}/table.json: 5 combinations (top-1 ± 1.0)"
    assert (equal.paper, equal.verdict) == ("38.1 % / 16.4 %", "not lower: contrary to the paper")
    assert [row.verdict.endswith("(flattered: fitted to them)") for row in others] == [True, False]
    (folder := tmp_path / "study").mkdir()
    made = {"study": "ensemble", "rows": [], "nets": nets, "views": 10, "scale": "few", "plot": "x"}
    (folder / "study.json").write_text(json.dumps(made))
    again = rows(make_page([folder]), "ensemble")
    assert [row.ours for row in again] == [row.ours for row in (one, equal, *others)]
    assert again[0].scale == "few; 10 views"


def test_neighbours_and_codes_where_a_run_has_them(make):
    run = make("s0", {})
    (run / "neighbours").mkdir()
    counted = {"queries": {"split": "val", "pictures": 1000},
                "base": {"split": "train", "pictures": 4000}, "k": 6}  # fmt: skip
    near = {"precision_at_k": 0.5, "precision_by_chance": 0.1, "auc": 0.7, "auc_error": 0.01,
            "units": 256, **counted}  # fmt: skip
    code = {"method": "auto-encoder", "bits": 128, "bytes": 16, "recall_at_k": 0.3,
            "precision_at_k": 0.4, "queries_s": 1e3}  # fmt: skip
    rival = {"method": "product", "bits": 64, "bytes": 8, "missing": "no such library"}
    table = {"step": 40, "neighbours": near, "codes": {"rows": [code, rival], **counted}}
    (run / "neighbours" / "summary.json").write_text(json.dumps(table))
    page = make_page([run])
    precision, auc = rows(page, "neighbours")
    assert (precision.ours, precision.verdict) == ("50.0 % (by chance 10.0 %)", "above chance")
    assert auc.ours == "70.0 ± 2.0 % (by chance 50 %)"
    (one,) = rows(page, "codes")
    assert (one.ours, one.verdict) == ("30.0 % / 40.0 %", "16 bytes an image, 1,000 queries/s")
    (item,) = [item for item in page.items if item.claim.key == "neighbours"]
    assert item.notes == ["s0: features of step 40, it has come to 60."]
    assert "duet neighbors" not in " ".join(one["command"] for one in page.missing)


def html_of(page: Evidence, folder: Path) -> Html:
    path = folder / "page.html"
    path.write_text(render(page), encoding="utf-8")
    return Html(path)


def test_page_stands_alone_and_says_what_is_missing(three, tmp_path):
    page = html_of(make_page([tmp_path / "runs"]), tmp_path)
    links = [link for link in page.links if not link.startswith("#")]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert "http" not in page.source
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.source.startswith("<!doctype html>")
    for words in ("What is missing", "duet neighbors",
                  "duet ensemble", "duet study",
                  "A − B", "section 3.3", "instead of 1,281,167"):  # fmt: skip
        assert words in page.text, words


def test_another_data_set_is_said_and_named_in_no_command(three, tiny_data):
    page = make_page(three, str(tiny_data))
    assert page.skipped == [f"{tiny_data}: none of the runs was trained on it."]
    assert all(str(tiny_data) not in one["command"] for one in page.missing)
    with pytest.raises(UsageError, match="gone"):
        make_page(three, str(tiny_data / "gone"))


def test_command_line(three, tmp_path, capsys):
    assert main([str(tmp_path / "runs"), "--json"]) == 0
    told = capsys.readouterr()
    table = json.loads(told.out)
    assert (tmp_path / "runs" / "evidence.html").is_file()
    assert "4 runs" in told.err
    assert [group["seeds"] for group in table["groups"]] == [[0, 1], [0, 1]]
    assert choose_file(three[:2]) == tmp_path / "runs" / "evidence.html"
    assert choose_file(three[:1]) == three[0] / "evidence.html"
    with pytest.raises(UsageError, match="is a folder; name a file"):
        main([str(tmp_path / "runs"), "--out", str(tmp_path)])


def test_a_young_run_among_others_is_left_out_and_named(three, make, tmp_path):
    make("young", {}, saved=False)
    page = make_page([tmp_path / "runs"])
    assert len(page.runs) == 4
    (line,) = page.skipped
    assert "young has no complete checkpoint yet" in line


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "cannot be read"), ('{"a": 1}', "is neither a run nor the result")],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, content, reason):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=reason):
        make_page([tmp_path / "x.json"])


def test_damaged_parts_of_a_result_are_left_out(tmp_path):
    folder = study(tmp_path / "s", rows=[{"seed": 1}])
    page = make_page([folder])
    assert "is no result of a study" in page.skipped[0]


def test_bad_input_is_one_line_with_its_exit_code(make, tmp_path):
    young = make("young", {}, saved=False)
    broken = make("broken", {})
    for path in broken.glob("checkpoints/step-*/column-a.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no checkpoint of .*broken is sound"):
        make_page([broken])
    for path, words in ((tmp_path, "is no run"), (young, "has no complete checkpoint yet"),
                        (tmp_path / "gone", "is no run")):  # fmt: skip
        found = call_command(
            [sys.executable, "-m", "cluster.experiments.evidence", str(path)],
        )
        assert (found.returncode, found.stdout) == (2, "")
        assert words in found.stderr
        assert found.stderr.count("\n") == 1
