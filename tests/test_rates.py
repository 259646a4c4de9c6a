"""Rates of a run: as the recipe says at every step, through crashes, by hand, on all processes."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import hand_rates
from cluster.config import Config
from cluster.events import Event, Rated, Warned
from cluster.log import VALIDATION, cut
from cluster.place import Place
from cluster.rate_events import Recipe
from cluster.rates import RATES, RateControl
from model.changes import parse_changes
from model.schedule import Rates, dexp, plateau_drops
from tests.rates import manual

LAYERS = tuple(layer.name for layer in Config().design.layers())


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_rates, "SETTLED", 0.0)


def recipe(total: int = 40, **settings: object) -> Recipe:
    """A run of 40 steps of 8 pictures, 4 epochs of 80."""
    config = Config(**{"batch_size": 8, **settings})  # type: ignore[arg-type]
    return Recipe(config=config, samples=80, total=total)


def rows(run: Path) -> list[dict]:
    path = run / RATES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def texts(heard: Iterable[Event], kind: type) -> list[str]:
    return [event.text for event in heard if isinstance(event, kind)]


@dataclass
class Story:
    """A run as `cluster.worker` makes it, without the network; it may be cut off and go on."""

    recipe: Recipe
    run: Path
    errors: dict[int, float] = field(default_factory=dict)
    """Validation error after each step that has a validation."""
    hand: dict[int, str] = field(default_factory=dict)
    """Text that the user puts into rates.toml just before the review of a step, once."""
    checkpoints: frozenset[int] = frozenset()
    rates: dict[int, Rates] = field(default_factory=dict)
    heard: list[Event] = field(default_factory=list)
    saved: int = 0

    def go_on(self, kill: int | None = None, lost: int | None = None) -> None:
        """From the newest checkpoint to the end, or until it is killed in the review of a step.

        Args:
            kill: the step.
            lost: bytes by which that review's last row comes out too short; None: it is whole.
        """
        control = RateControl(self.recipe, self.run, Place(), self.heard.append, self.saved)
        cut(self.run / VALIDATION, self.saved)
        for step in range(self.saved + 1, self.recipe.total + 1):
            self.rates[step] = control.at(step)
            self.review(control, step)
            if step == kill:
                return self.lose(step, lost or 0)
            if step in self.checkpoints:
                self.saved = step
        return None

    def review(self, control: RateControl, step: int) -> None:
        error = self.errors.get(step)
        if error is not None:
            with (self.run / VALIDATION).open("a") as file:
                file.write(json.dumps({"step": step, "top1_error": error}) + "\n")
        if text := self.hand.pop(step, None):
            (self.run / "rates.toml").write_text(text)
        if error is not None or step in self.checkpoints or text:
            control.review(step, error)

    def lose(self, step: int, lost: int) -> None:
        found = rows(self.run)
        if lost and found and found[-1]["step"] == step:
            raw = (self.run / RATES).read_bytes()
            last = len(raw.splitlines(keepends=True)[-1])
            (self.run / RATES).write_bytes(raw[: len(raw) - min(lost, last)])


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
        control = RateControl(made, Path(run), Place(), lambda _: None, 0)
        for step in range(1, total + 1):
            rates = dexp(step / total, 0.04, 2.0, 250.0, drops, 10.0, bias_drops)
            assert control.at(step) == Rates(*rates)


def test_manual_changes_hold_from_the_first_step_that_begins_at_their_epoch(tmp_path: Path) -> None:
    # 12 pictures a step of 80: step 8 begins with 84 pictures consumed, step 7 with 72.
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


def test_manual_rates_are_scaled_with_the_batch_and_colour_is_not() -> None:
    made = recipe(
        schedule="manual", changes=("1 lr 0.1", "1 colour 0.1"), rate_scaling="sqrt", batch_size=512
    )
    assert made.rates([]) == Rates(0.02, 0.04)
    (event,) = made.scheduled()
    assert event.settings == {"lr": 0.2, "colour": 0.1}


def test_layers_may_be_changed_by_epoch_under_any_schedule(tmp_path: Path) -> None:
    made = recipe(changes=("1 lr.conv1 0.5", "2 colour 0", "3 lr.conv1 0"), bias_drops=1)
    story = Story(made, tmp_path)
    story.go_on()
    for step, rates in story.rates.items():
        weights, biases = dexp(step / 40, 0.01, bias_drops=1)
        own = {"conv1": (0.0 if step > 30 else 0.5, biases)} if step > 10 else {}
        assert rates == Rates(weights, biases, own), step


ERRORS = dict(zip(range(4, 41, 4), (9, 8, 8, 8, 7, 7, 7, 7, 7, 7), strict=True))
"""Step -> validation error."""


@pytest.mark.parametrize("biases", [True, False])
def test_plateau_divides_after_the_validation_that_is_one_too_many(
    tmp_path: Path, biases: bool
) -> None:
    made = recipe(
        schedule="plateau", patience=1, plateau_drops=2, plateau_factor=4.0, plateau_biases=biases
    )
    story = Story(made, tmp_path, errors=ERRORS)
    story.go_on()
    steps = plateau_drops(ERRORS.items(), patience=1, most=2, threshold=0.002)
    assert steps == [16, 28]
    for step, rates in story.rates.items():
        factor = 4.0 ** sum(step > drop for drop in steps)
        assert rates == Rates(0.01 / factor, 0.02 / factor if biases else 0.02)
    assert [(row["step"], row["why"]) for row in rows(tmp_path)] == [
        (16, "plateau"), (28, "plateau")
    ]  # fmt: skip
    told = "lr 0.01 -> 0.0025, lr_bias 0.02 -> 0.005" if biases else "lr 0.01 -> 0.0025"
    assert texts(story.heard, Rated)[0] == f"{told} (plateau)"


def test_rates_set_by_hand_hold_until_the_schedule_changes_them(tmp_path: Path) -> None:
    story = Story(
        recipe(),
        tmp_path,
        hand={
            4: "lr = 0.5  # faster\nlr.conv1 = 0\nlr_bias.fc8 = 3\n",
            24: "[lr]\nconv2 = 2\n",
            32: "drop = true\n",
            36: 'drop = false\n"lr_bias" = 1e-1\n',
        },
    )
    story.go_on()
    first, second, third, fourth = (dexp(p, 0.01)[0] for p in (0.25, 0.5, 0.75, 1))
    at = story.rates
    assert at[4] == Rates(first, 0.02)
    assert at[5] == at[10] == Rates(0.5, 0.02, {"conv1": (0.0, 0.02), "fc8": (0.5, 3.0)})
    assert at[11].weights == second
    assert at[11].of("conv1.weight") == 0.0  # its own
    assert at[21] == Rates(third, 0.002, {"conv1": (0.0, 0.002), "fc8": (third, 3.0)})
    assert at[25].of("conv2.weight") == 2.0
    assert at[31].weights == fourth
    dropped = Rates(
        fourth / 10,
        0.002 / 10,
        {"conv1": (0.0, 0.002 / 10), "conv2": (0.2, 0.002 / 10), "fc8": (fourth / 10, 0.3)},
    )
    assert at[33] == dropped
    assert at[37].biases == 0.1
    assert at[37].weights == dropped.weights
    by_hand = [row["step"] for row in rows(tmp_path) if row["why"] == "by hand"]
    assert by_hand == [4, 24, 32, 36]
    assert not (tmp_path / "rates.toml").exists()
    assert (tmp_path / "rates-applied-4.toml").read_text().startswith("lr = 0.5  # faster")
    assert "lr 0.01 -> 0.5, lr.conv1 0.01 -> 0, lr_bias.fc8 0.02 -> 3 (by hand)" in texts(
        story.heard, Rated
    )


def test_a_setting_by_hand_begins_the_count_of_plateau_anew(tmp_path: Path) -> None:
    made = recipe(schedule="plateau", patience=1)
    story = Story(made, tmp_path, errors=ERRORS, hand={12: "lr = 1\n"})
    story.go_on()
    drops = [row["step"] for row in rows(tmp_path) if row["why"] == "plateau"]
    assert drops == plateau_drops(ERRORS.items(), 1, 3, 0.002, restarts=[12])
    assert drops != plateau_drops(ERRORS.items(), 1, 3, 0.002)


def test_after_one_and_the_same_step_the_hand_has_the_last_word(tmp_path: Path) -> None:
    made = recipe(schedule="plateau", patience=1)
    story = Story(made, tmp_path, errors=ERRORS, hand={16: "lr = 1\n"})
    story.go_on()
    assert [row["why"] for row in rows(tmp_path)][:2] == ["plateau", "by hand"]
    assert story.rates[17] == Rates(1.0, 0.02 / 10)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr = ", "it is not TOML"),
        ("lr 0.1", "it is not TOML"),
        ("lr.conv9 = 1", r"no rate is called 'lr.conv9'; did you mean 'lr.conv"),
        ("momentum = 1", "no rate is called 'momentum'; there are lr, lr_bias, lr.conv1"),
        ("colour = 0", "no rate is called 'colour'"),
        ("drop = 10", "drop is 10; it takes true"),
        ("lr = -1", "lr is -1; it takes a number from 0 up"),
        ("lr = nan", "lr is nan; it takes a number from 0 up"),
        (f"lr = 1{'0' * 400}", "it takes a number from 0 up"),
        ("lr = true", "lr is True; it takes a number from 0 up"),
        ('lr_bias = "0.1"', "lr_bias is '0.1'; it takes a number"),
        ("# nothing", "it sets nothing; write lines such as lr = 0.001"),
        ("drop = false", "it sets nothing"),
        ("[lr.conv1]\na = 1", "lr.conv1 is {'a': 1}; it takes a number"),
    ],
)
def test_a_bad_file_is_told_in_one_line_and_put_aside(
    tmp_path: Path, text: str, complaint: str
) -> None:
    story = Story(recipe(lr_drops=1, bias_drops=1), tmp_path, hand={8: text, 16: text})
    story.go_on()
    assert set(map(repr, story.rates.values())) == {repr(Rates(0.01, 0.02))}
    first, second = texts(story.heard, Warned)
    assert complaint in first
    assert "\n" not in first
    assert first.endswith("(it is now rates-bad-8.toml)")
    assert second.endswith("(it is now rates-bad-16.toml)")
    assert (tmp_path / "rates-bad-8.toml").read_text() == text
    assert rows(tmp_path) == []


def test_a_file_that_cannot_be_read_does_not_stop_the_run(tmp_path: Path) -> None:
    heard: list[Event] = []
    control = RateControl(recipe(), tmp_path, Place(), heard.append, 0)
    (tmp_path / "rates.toml").write_bytes(b"lr = \xff\n")
    control.review(1)
    assert (tmp_path / "rates-bad-1.toml").read_bytes() == b"lr = \xff\n"  # told once
    (tmp_path / "rates.toml").mkdir()
    control.review(2)
    assert len(texts(heard, Warned)) == 2
    assert "not text" in texts(heard, Warned)[0]
    assert "Is a directory" in texts(heard, Warned)[1]
    assert control.at(3) == Rates(*dexp(3 / 40, 0.01))


def test_a_file_that_is_still_being_written_is_left_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = RateControl(recipe(), tmp_path, Place(), lambda _: None, 0)
    path = tmp_path / "rates.toml"
    path.write_text("lr = 0.0")
    monkeypatch.setattr(hand_rates.time, "sleep", lambda _: path.write_text("lr = 0.05\n"))
    control.review(1)
    assert control.at(2).weights == 0.01
    control.review(2)
    assert control.at(3).weights == 0.05
    path.write_text("")
    control.review(3)
    assert path.exists()


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
        control = RateControl(made, tmp_path, Place(), heard.append, last)
        assert (tmp_path / RATES).read_bytes() == whole
        assert control.at(last + 1) == undisturbed[last + 1]
        assert len(texts(heard, Rated)) == (1 if cut_off else 0)


def test_what_was_set_by_hand_comes_again_unless_its_file_is_deleted(tmp_path: Path) -> None:
    for delete in (False, True):
        run = tmp_path / str(delete)
        run.mkdir()
        story = Story(recipe(), run, hand={12: "lr = 0.5\n"}, checkpoints=frozenset({8}))
        story.go_on(kill=20)
        assert story.rates[13].weights == 0.5
        if delete:
            (run / "rates-applied-12.toml").unlink()
        story.go_on()
        assert (story.rates[13].weights == 0.5) is not delete
        warned = [text for text in texts(story.heard, Warned) if "by hand after step 12" in text]
        assert len(warned) == (0 if delete else 1)


def test_a_file_that_lies_there_at_the_start_counts_from_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "rates.toml").write_text("lr = 0.5\n")
    story = Story(recipe(), tmp_path)
    story.go_on()
    assert story.rates[1].weights == 0.5
    assert rows(tmp_path)[0]["step"] == 0
    # and two at one and the same step come one after the other
    for text in ("lr = 0.25\n", "lr = 0.125\n"):
        (tmp_path / "rates.toml").write_text(text)
        control = RateControl(recipe(), tmp_path, Place(), lambda _: None, 0)
    assert control.at(1).weights == 0.125
    assert [row["lr"] for row in rows(tmp_path)] == [0.5, 0.25, 0.125]
    kept = (tmp_path / RATES).read_bytes().splitlines(keepends=True)[:2]
    (tmp_path / RATES).write_bytes(b"".join(kept))
    assert RateControl(recipe(), tmp_path, Place(), lambda _: None, 0).at(1).weights == 0.125
    assert [row["lr"] for row in rows(tmp_path)] == [0.5, 0.25, 0.125]


@dataclass(frozen=True, kw_only=True)
class Told(Place):
    """The leader, or a process that only hears what the leader shared."""

    box: deque = field(default_factory=deque)
    leader: bool = True

    @property
    def leads(self) -> bool:
        return self.leader

    def share(self, value):
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
    control = RateControl(recipe(bias_drops=1), tmp_path, Place(), heard.append, 0)
    for step in range(1, 12):
        control.note(step - 1)
    assert texts(heard, Rated) == ["lr 0.01 -> 0.001587 (schedule)"]
    control.review(12)
    assert len(rows(tmp_path)) == 1


def test_a_recipe_knows_the_layers_of_its_network() -> None:
    config = Config(lr=0.5, layer_rates=("fc8=2",), without="conv4", batch_size=64)
    made = Recipe(config=config, samples=1000, total=50)
    assert made.layers == ("conv1", "conv2", "conv3", "conv5", "fc6", "fc7", "fc8")
    assert made.rates([]) == Rates(0.5, 1.0, {"fc8": (1.0, 2.0)})
