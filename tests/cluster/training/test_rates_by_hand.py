"""RUN/rates.toml: taken, put aside, bad, half written, and set again after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.mesh import ProcessMesh
from cluster.run.events import Event, Rated, Warned
from cluster.training import learning_rate
from cluster.training.learning_rate import RATES, RateControl
from model.schedule import Rates, dexp, find_plateau_drops
from tests.helpers.schedules import ERRORS, Story, recipe, rows, texts


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "SETTLED", 0.0)


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
    assert at[11].get("conv1.weight") == 0.0  # its own
    assert at[21] == Rates(third, 0.002, {"conv1": (0.0, 0.002), "fc8": (third, 3.0)})
    assert at[25].get("conv2.weight") == 2.0
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
    assert drops == find_plateau_drops(ERRORS.items(), 1, 3, 0.002, restarts=[12])
    assert drops != find_plateau_drops(ERRORS.items(), 1, 3, 0.002)


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
    control = RateControl(recipe(), tmp_path, ProcessMesh(), heard.append, 0)
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
    control = RateControl(recipe(), tmp_path, ProcessMesh(), lambda _: None, 0)
    path = tmp_path / "rates.toml"
    path.write_text("lr = 0.0")
    monkeypatch.setattr(learning_rate.time, "sleep", lambda _: path.write_text("lr = 0.05\n"))
    control.review(1)
    assert control.at(2).weights == 0.01
    control.review(2)
    assert control.at(3).weights == 0.05
    path.write_text("")
    control.review(3)
    assert path.exists()


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
        control = RateControl(recipe(), tmp_path, ProcessMesh(), lambda _: None, 0)
    assert control.at(1).weights == 0.125
    assert [row["lr"] for row in rows(tmp_path)] == [0.5, 0.25, 0.125]
    kept = (tmp_path / RATES).read_bytes().splitlines(keepends=True)[:2]
    (tmp_path / RATES).write_bytes(b"".join(kept))
    assert RateControl(recipe(), tmp_path, ProcessMesh(), lambda _: None, 0).at(1).weights == 0.125
    assert [row["lr"] for row in rows(tmp_path)] == [0.5, 0.25, 0.125]
