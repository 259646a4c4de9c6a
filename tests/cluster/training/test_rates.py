"""Rates of a run: as the recipe says at every step, through crashes, by hand, on all processes."""

from __future__ import annotations

import pickle
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Event, Rated
from cluster.training import learning_rate
from cluster.training.learning_rate import RATES, RateControl, RateSettings
from model.architecture import Design
from model.schedule import Rates, dexp, find_plateau_drops, parse_changes
from tests.helpers.schedules import ERRORS, Story, manual, recipe, rows, texts

LAYERS = tuple(layer.name for layer in Config().design.rows())


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "SETTLED", 0.0)


@given(
    total=st.integers(1, 300),
    drops=st.integers(1, 6),
    bias_drops=st.integers(1, 6),
)
@settings(deadline=None)
def test_dexp_at_every_step(total: int, drops: int, bias_drops: int) -> None:
    made = recipe(
        total=total, lr_drops=drops, bias_drops=bias_drops, rate_scaling="linear", batch_size=512
    )
    with tempfile.TemporaryDirectory() as run:
        control = RateControl(made, Path(run), ProcessMesh(), lambda _: None, 0)
        for step in range(1, total + 1):
            rates = dexp(step / total, 0.04, 2.0, 250.0, drops, 10.0, bias_drops)
            assert control.at(step) == Rates(*rates)


def test_manual_changes_hold_from_the_first_step_that_begins_at_their_epoch(tmp_path: Path) -> None:
    # 12 images a step of 80: step 8 begins with 84 images consumed, step 7 with 72.
    changes = ("1 lr 0.5", "1 lr.conv1 0.25", "1.5 lr_bias 0.125", "1.5 lr 3", "2 colour 0")
    made = recipe(schedule="manual", changes=changes, batch_size=12, layer_rates=("fc8=10",))
    story = Story(made, tmp_path, checkpoints=frozenset({10, 40}))
    story.go_on()
    for step, rates in story.rates.items():
        passed = 12 * (step - 1) / 80
        expected = manual(passed, parse_changes(changes, LAYERS), 0.01, 0.02, {"fc8": 10.0})
        assert rates == expected, step
    assert story.rates[7].weights == 0.01
    assert story.rates[8].weights == 0.5
    found = rows(tmp_path)
    assert [(row["step"], row["why"]) for row in found] == [(n, "schedule") for n in (7, 10, 14)]
    assert found[0]["what"] == ("lr 0.01 -> 0.5, lr.conv1 0.01 -> 0.25, lr.fc8 0.1 -> 5")
    assert found[0]["set"] == {"lr": 0.5, "lr.conv1": 0.25}
    assert (found[1]["lr"], found[1]["lr_bias"]) == (3.0, 0.125)
    assert found[1]["layers"] == {"conv1": [0.25, 0.125], "fc8": [30.0, 1.25]}
    assert (found[1]["position"], found[1]["epoch"]) == (120, 1.5)
    assert found[2]["what"] == "colour -> 0"
    assert [event.step for event in story.heard if isinstance(event, Rated)] == [7, 10, 14]


def test_warm_up_rises_to_the_schedule_and_poly_falls_to_nothing(tmp_path: Path) -> None:
    """12 images a step of 80: a warm-up of 1.2 epochs is 8 steps, as in Goyal et al., from 1/4."""
    settings = {"batch_size": 12, "warmup": 1.2, "warmup_lr": 0.0025, "layer_rates": ("fc8=10",)}
    constant = recipe(total=40, schedule="manual", changes=("3 lr 0.1",), **settings)
    control = RateControl(constant, tmp_path, ProcessMesh(), lambda _: None, 0)
    for step in range(1, 41):
        share = min(1.0, 0.25 + 0.75 * step / 8)
        lr = 0.01 if step <= 20 else 0.1
        found = control.at(step)
        expected = (lr * share, 0.02 * share, lr * 10 * share, 0.2 * share)
        assert (found.weights, found.biases, *found.layers["fc8"]) == pytest.approx(expected)
    assert control.at(9) == Rates(0.01, 0.02, {"fc8": (0.1, 0.2)})
    poly = recipe(total=40, schedule="poly", lr_power=2.0, **settings)
    control = RateControl(poly, tmp_path / "poly", ProcessMesh(), lambda _: None, 0)
    for step in range(1, 41):
        share = min(1.0, 0.25 + 0.75 * step / 8) * (1 - (step - 1) / 40) ** 2
        assert control.at(step).weights == pytest.approx(0.01 * share)
    assert control.at(40).weights == pytest.approx(0.01 / 1600)


def test_a_warm_up_begins_at_its_rate_however_lr_is_scaled() -> None:
    """It goes from the rate of a small batch to that of the large one, as in Goyal et al."""
    settings = {"rate_scaling": "linear", "batch_size": 1024, "warmup": 64.0, "warmup_lr": 0.01}
    made = recipe(schedule="manual", **settings)  # of 80 images: 5 steps
    assert made.compute([]).weights == pytest.approx(0.08)
    first = made.compute([]).scale(made.compute_factor(0)).weights
    assert first == pytest.approx(0.01)
    assert made.compute_factor(5) == 1.0


def test_manual_rates_are_scaled_with_the_batch_and_colour_is_not() -> None:
    made = recipe(
        schedule="manual", changes=("1 lr 0.1", "1 colour 0.1"), rate_scaling="sqrt", batch_size=512
    )
    assert made.compute([]) == Rates(0.02, 0.04)
    (event,) = made.list_scheduled()
    assert event.settings == {"lr": 0.2, "colour": 0.1}


def test_layers_may_be_changed_by_epoch_under_any_schedule(tmp_path: Path) -> None:
    made = recipe(changes=("1 lr.conv1 0.5", "2 colour 0", "3 lr.conv1 0"), bias_drops=1)
    story = Story(made, tmp_path)
    story.go_on()
    for step, rates in story.rates.items():
        weights, biases = dexp(step / 40, 0.01, bias_drops=1)
        own = {"conv1": (0.0 if step > 30 else 0.5, biases)} if step > 10 else {}
        assert rates == Rates(weights, biases, own), step


@pytest.mark.parametrize("biases", [True, False])
def test_plateau_divides_after_the_validation_that_is_one_too_many(
    tmp_path: Path, biases: bool
) -> None:
    made = recipe(
        schedule="plateau", patience=1, plateau_drops=2, plateau_factor=4.0, plateau_biases=biases
    )
    story = Story(made, tmp_path, errors=ERRORS)
    story.go_on()
    steps = find_plateau_drops(ERRORS.items(), patience=1, most=2, threshold=0.002)
    assert steps == [16, 28]
    for step, rates in story.rates.items():
        factor = 4.0 ** sum(step > drop for drop in steps)
        assert rates == Rates(0.01 / factor, 0.02 / factor if biases else 0.02)
    assert [(row["step"], row["why"]) for row in rows(tmp_path)] == [
        (16, "plateau"), (28, "plateau")
    ]  # fmt: skip
    told = "lr 0.01 -> 0.0025, lr_bias 0.02 -> 0.005" if biases else "lr 0.01 -> 0.0025"
    assert texts(story.heard, Rated)[0] == f"{told} (plateau)"


@st.composite
def stories(draw: st.DrawFn) -> dict:
    """Settings, validation errors, files by hand, checkpoints and crashes."""
    validated = draw(st.sampled_from([3, 4, 7]))
    errors = st.sampled_from([0.5, 0.499, 0.45, 0.4])
    steps = range(validated, 41, validated)
    saved = draw(st.sampled_from([2, 5, 8]))
    reviewed = sorted({*steps, *range(saved, 41, saved)})
    lost = st.sampled_from([0, 3, 10**6])  # bytes of the last row
    texts = st.sampled_from(
        ["lr = 0.7\n", "lr = 0.3\nlr.conv1 = 0\n", "drop = true\n", "lr_bias = 1\ndrop = true\n"]
    )
    return {
        "schedule": draw(st.sampled_from(["dexp", "plateau", "manual"])),
        "errors": {step: draw(errors) for step in steps},
        "hand": draw(st.dictionaries(st.sampled_from(reviewed), texts, max_size=3)),
        "checkpoints": frozenset(range(saved, 41, saved)),
        "kills": draw(st.lists(st.tuples(st.sampled_from(reviewed), lost), max_size=4)),
    }


@settings(deadline=None, max_examples=150)
@given(drawn=stories())
def test_a_run_that_is_killed_and_goes_on_has_the_same_rates_and_rows(drawn: dict) -> None:
    changes = ("1 lr 0.004", "1.3 lr.conv1 0.1", "2 colour 0", "3 lr 0.0002")
    made = recipe(
        schedule=drawn["schedule"],
        changes=changes if drawn["schedule"] == "manual" else (),
        patience=1,
        layer_rates=("fc8=10",),
    )
    with tempfile.TemporaryDirectory() as undisturbed, tempfile.TemporaryDirectory() as killed:
        stories = [
            Story(made, Path(run), drawn["errors"], dict(drawn["hand"]), drawn["checkpoints"])
            for run in (undisturbed, killed)
        ]
        stories[0].go_on()
        for step, lost in drawn["kills"]:
            if step > stories[1].saved:
                stories[1].go_on(kill=step, lost=lost)
        stories[1].go_on()
        assert stories[0].rates == stories[1].rates
        assert [(Path(run) / RATES).exists() for run in (undisturbed, killed)] in (
            [True, True],
            [False, False],
        )
        assert rows(Path(undisturbed)) == rows(Path(killed))
        found = rows(Path(killed))
        assert texts(stories[0].heard, Rated) == [f"{row['what']} ({row['why']})" for row in found]
        assert {row["step"] for row in found if row["why"] == "by hand"} == set(drawn["hand"])


@pytest.mark.parametrize("schedule", ["dexp", "plateau", "manual"])
def test_rows_that_a_crash_took_are_written_after_it(tmp_path: Path, schedule: str) -> None:
    changes = ("1 lr 0.004", "3 lr 0.0002") if schedule == "manual" else ()
    made = recipe(schedule=schedule, changes=changes, patience=1, plateau_drops=2)
    story = Story(made, tmp_path, ERRORS, {24: "lr.conv1 = 0\n"})
    story.go_on()
    whole, undisturbed = (tmp_path / RATES).read_bytes(), dict(story.rates)
    last = rows(tmp_path)[-1]["step"]
    heard: list[Event] = []
    for cut_off in (0, 1, len(whole.splitlines()[-1]) + 1):
        heard.clear()
        (tmp_path / RATES).write_bytes(whole[: len(whole) - cut_off])
        control = RateControl(made, tmp_path, ProcessMesh(), heard.append, last)
        assert (tmp_path / RATES).read_bytes() == whole
        assert control.at(last + 1) == undisturbed[last + 1]
        assert len(texts(heard, Rated)) == (1 if cut_off else 0)


@dataclass(frozen=True, kw_only=True)
class Told(ProcessMesh):
    """The leader, or a process that only hears what the leader shared."""

    box: deque = field(default_factory=deque)
    leader: bool = True

    @property
    def is_leader(self) -> bool:
        return self.leader

    def broadcast(self, value):
        if self.leader:
            self.box.append(pickle.dumps(value))
            return value
        return pickle.loads(self.box.popleft())


def test_other_processes_have_the_leaders_rates_and_write_nothing(tmp_path: Path) -> None:
    box: deque = deque()
    mine, theirs = tmp_path / "leader", tmp_path / "other"
    mine.mkdir()
    theirs.mkdir()
    heard: list[Event] = []
    made = recipe(schedule="plateau", patience=0)
    leader = RateControl(made, mine, Told(box=box), heard.append, 0)
    other = RateControl(made, theirs, Told(box=box, leader=False), pytest.fail, 0)
    for step in range(1, 41):
        assert repr(leader.at(step)) == repr(other.at(step))
        if step == 20:
            (mine / "rates.toml").write_text("lr = 0.0123456789012345678\n")
        if step % 4 == 0:
            leader.review(step, 0.5)
            other.review(step, 0.5)
            assert not box
    assert other.at(40) == leader.at(40) != Rates(0.01, 0.02)
    assert not list(theirs.iterdir())
    assert len(texts(heard, Rated)) == len(rows(mine)) == 4


def test_news_of_a_schedule_need_not_wait_for_a_review(tmp_path: Path) -> None:
    heard: list[Event] = []
    control = RateControl(recipe(bias_drops=1), tmp_path, ProcessMesh(), heard.append, 0)
    for step in range(1, 12):
        control.note(step - 1)
    assert texts(heard, Rated) == ["lr 0.01 -> 0.001587 (schedule)"]
    control.review(12)
    assert len(rows(tmp_path)) == 1


def test_a_recipe_knows_the_layers_of_its_network() -> None:
    config = Config(lr=0.5, layer_rates=("fc8=2",), design=Design(without="conv4"), batch_size=64)
    made = RateSettings(config=config, samples=1000, total=50)
    assert made.layers == ("conv1", "conv2", "conv3", "conv5", "fc6", "fc7", "fc8")
    assert made.compute([]) == Rates(0.5, 1.0, {"fc8": (1.0, 2.0)})
