"""The torture table: its judge finds what was broken and nothing else, and Duet's row is exact."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import resume  # noqa: E402
from torture import PEERS  # noqa: E402
from torture.cases import CASES  # noqa: E402
from torture.consumer import read_notes  # noqa: E402
from torture.images import DAMAGED, damage, stored, write_shards  # noqa: E402
from torture.judge import (  # noqa: E402
    Attempt,
    Delivery,
    Place,
    Verdict,
    compare,
    coverage,
    longest_sorted,
    trainer_view,
)

from pipeline.tools.errors import UsageError  # noqa: E402
from tests.helpers.processes import run_command  # noqa: E402

EPOCHS = 3


@st.composite
def runs(draw: st.DrawFn, worlds: tuple[int, ...] = (1, 2, 3)) -> tuple[list[Delivery], int]:
    """An uncut run: each epoch another order of all samples, in batches of each rank; and N."""
    world, batch = draw(st.sampled_from(worlds)), draw(st.integers(1, 4))
    samples = draw(st.integers(2 * world * batch, 30))
    deliveries = []
    for epoch in range(EPOCHS):
        order = draw(st.permutations(range(samples)))
        for number, start in enumerate(range(0, samples, batch)):
            ids = tuple(order[start : start + batch])
            crcs = tuple(1000 * epoch + one for one in ids)
            step, rank = divmod(number, world)
            deliveries.append(Delivery(epoch, step, rank, ids, crcs))
    return deliveries, samples


def cut(run: list[Delivery], saved: Place, died: Place) -> list[Attempt]:
    """A run that saved at a place, went on to another, died, and resumed without a mistake."""
    first = tuple(one for one in run if one.place < died)
    return [Attempt((0, 0), first), Attempt(saved, tuple(o for o in run if o.place >= saved))]


def places(run: list[Delivery]) -> list[Place]:
    return sorted({one.place for one in run})


@given(runs(), st.data())
def test_a_faultless_resume_is_exact_wherever_it_died(made, data):
    run, _ = made
    died = data.draw(st.sampled_from(places(run)))
    saved = data.draw(st.sampled_from([place for place in places(run) if place <= died]))
    view = trainer_view(cut(run, saved, died))
    assert view == run
    assert compare(run, view) == Verdict()


@given(runs(worlds=(1,)), st.data())
def test_a_state_that_is_one_batch_early_or_late_is_found(made, data):
    run, _ = made
    within = [one for one in run if one.step + 1 < sum(other.epoch == one.epoch for other in run)]
    one = data.draw(st.sampled_from(within))  # saved before this batch
    rest = [other for other in run if other.place >= one.place]
    late = [replace(x, step=x.step - 1) if x.epoch == one.epoch else x for x in rest[1:]]
    again = [replace(x, step=x.step + 1) if x.epoch == one.epoch else x for x in rest]
    first = Attempt((0, 0), tuple(other for other in run if other.place < one.place))
    lost = compare(run, trainer_view([first, Attempt(one.place, tuple(late))]))
    assert (lost.missing, lost.repeated, lost.outcome) == (len(one.ids), 0, "wrong")
    early = compare(run, trainer_view([first, Attempt(one.place, (one, *again))]))
    assert (early.missing, early.repeated, early.pixels) == (0, len(one.ids), 0)


@given(runs(), st.data())
def test_each_fault_is_counted_once_and_as_itself(made, data):
    run, _ = made
    at = data.draw(st.integers(0, len(run) - 1))
    one = run[at]
    shorter = replace(one, ids=one.ids[1:], crcs=one.crcs[1:])
    assert compare(run, [*run[:at], shorter, *run[at + 1 :]]) == Verdict(missing=1)
    longer = replace(one, ids=one.ids + one.ids[:1], crcs=one.crcs + one.crcs[:1])
    assert compare(run, [*run[:at], longer, *run[at + 1 :]]) == Verdict(repeated=1)
    other = replace(one, crcs=(-1, *one.crcs[1:]))
    assert compare(run, [*run[:at], other, *run[at + 1 :]]) == Verdict(pixels=1)


@given(runs(), st.data())
def test_the_order_counts_between_steps_and_not_within_one(made, data):
    run, _ = made
    at = data.draw(st.sampled_from([i for i in range(1, len(run)) if run[i].epoch == run[0].epoch]))
    one, two = run[at - 1], run[at]
    moved = list(run)
    moved[at - 1] = replace(one, ids=(two.ids[0], *one.ids[1:]), crcs=(two.crcs[0], *one.crcs[1:]))
    moved[at] = replace(two, ids=(one.ids[0], *two.ids[1:]), crcs=(one.crcs[0], *two.crcs[1:]))
    found = compare(run, moved)
    if one.step == two.step:  # of two ranks
        assert found == Verdict()
    else:
        assert (found.missing, found.repeated, found.pixels) == (0, 0, 0)
        assert 1 <= found.reordered <= 2
        assert found.outcome == "samples"


@given(runs(worlds=(1,)))
def test_a_skipped_and_a_repeated_epoch_are_found(made):
    run, samples = made
    without = [one for one in run if one.epoch != 1]
    assert compare(run, without).missing == samples
    count = max(one.step for one in run if one.epoch == 1) + 1
    again = [replace(one, epoch=1, step=one.step + count) for one in run if one.epoch == 1]
    assert compare(run, sorted(run + again, key=lambda one: one.place)).repeated == samples
    stale = [replace(one, crcs=tuple(crc - 1000 for crc in one.crcs)) for one in run]
    assert compare(run, stale).pixels == samples * EPOCHS


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=7))
def test_the_longest_sorted_subsequence_is_that_of_all_subsequences(values):
    every = (
        some for count in range(len(values) + 1) for some in itertools.combinations(values, count)
    )
    assert longest_sorted(values) == max(len(some) for some in every if list(some) == sorted(some))


def test_padding_that_changes_with_the_world_is_no_fault():
    padded = [Delivery(0, 0, 0, (0, 1), (0, 1)), Delivery(0, 0, 1, (2, 0), (2, 0))]
    alone = [Delivery(0, 0, 0, (0, 1, 2), (0, 1, 2))]
    assert compare(padded, alone).missing == 1
    assert compare(padded, alone, alone) == Verdict()
    assert compare(alone, padded, padded) == Verdict()
    assert compare(padded, alone[:0], alone).missing == 3
    twice = [*padded, Delivery(0, 1, 0, (0, 1), (0, 1))]
    assert compare(alone, twice, padded).repeated == 2
    assert coverage(padded, 4) == {"missing": 1, "repeated": 1}


def test_notes_of_a_killed_process_are_read(tmp_path):
    path = tmp_path / "0.notes"
    lines = [
        {"epoch": 0, "step": 0, "ids": [3, 1], "crcs": [7, 8]},
        {"saved": [0, 1], "path": "state"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    deliveries, facts = read_notes(path, 1)
    assert deliveries == [Delivery(0, 0, 1, (3, 1), (7, 8))]
    assert facts == {"saved": [((0, 1), Path("state"))]}
    assert read_notes(tmp_path / "none", 0) == ([], {"saved": []})


def test_damage_changes_one_image(tmp_path):
    write_shards(tmp_path)
    before = dict(stored(tmp_path))
    assert len(damage(tmp_path, before[DAMAGED])) == 1
    after = dict(stored(tmp_path))
    assert [number for number in before if before[number] != after[number]] == [DAMAGED]


def test_duet_resumes_exactly_on_any_number_of_ranks(tmp_path):
    """Three cases of its row: SIGKILL, two resumes in one epoch, and another world."""
    cases = ["process", "twice", "shrink"]
    command = [sys.executable, "-m", "torture", "duet", tmp_path, ",".join(cases)]
    path = f"{ROOT / 'benchmarks'}:{ROOT}"
    found = run_command(command, env={"PYTHONPATH": path})
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line.get("case") for line in lines] == [*cases, None]
    assert [line["outcome"] for line in lines[:-1]] == ["exact"] * 3


def row(**more: object) -> dict[str, object]:
    return {"outcome": "exact", "missing": 0, "repeated": 0, "reordered": 0, "pixels": 0} | more


@pytest.mark.parametrize(
    ("case", "found", "said"),
    [
        ("middle", row(), "exact"),
        ("middle", row(outcome="order", pixels=3), "order"),
        ("middle", row(outcome="samples", reordered=3), "each once"),
        ("middle", row(outcome="wrong", missing=3, repeated=1), "**3 lost**, **1 twice**"),
        ("border", row(resumes_in="rest of the epoch"), "exact ¹"),
        ("middle", {"outcome": "none"}, "–"),
        ("worker", {"outcome": "none", "message": "no worker processes"}, "no workers"),
        ("seed", {"outcome": "refused", "message": "ValueError"}, "refused"),
        ("seed", row(outcome="order", pixels=9), "old order kept"),
        ("damage", row(outcome="wrong", missing=2, repeated=2, reported=1), "replaced, listed"),
        ("damage", row(outcome="order", pixels=2, said=False), "2 other, silent"),
        ("damage", {"outcome": "hangs", "said": True}, "hangs, says so"),
    ],
)
def test_an_outcome_has_its_word(case, found, said):
    assert resume.word(case, found, steady=True) == said


def test_the_file_of_results_has_the_tables_of_its_facts():
    found = json.loads((ROOT / "benchmarks" / "results" / "resume.json").read_text("utf-8"))
    tables = {name: asdict(table) for name, table in resume.make_tables(found).items()}
    assert found["tables"] == json.loads(json.dumps(tables))
    notes = {name: (row["page"], row["note"]) for name, row in found["loaders"].items()}
    assert notes == {name: (peer.page, peer.note) for name, peer in PEERS.items()}


def test_a_loader_that_is_missing_has_its_reason_and_no_column():
    found = {
        "cases": {"middle": CASES["middle"].title},
        "loaders": {
            name: {"title": PEERS[name].title, "versions": {}, "page": "p", "note": "n"}
            for name in ("duet", "ffcv")
        },
    }
    found["loaders"]["duet"]["cases"] = {"middle": row()}
    found["loaders"]["ffcv"]["missing"] = "not installed"
    tables = resume.make_tables(found)
    assert tables["resume"].head == ["", "Duet"]
    assert [CASES["middle"].title, "exact"] in tables["resume"].rows
    assert tables["resume-states"].rows[1][-1] == "not installed"
    with pytest.raises(UsageError, match="--only foo"):
        resume.choose("foo", PEERS, "--only")
