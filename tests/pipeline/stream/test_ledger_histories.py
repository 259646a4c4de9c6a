"""Any history of restarts is proved; none that was tampered with is."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.ledger import proof as proof_module
from pipeline.stream.ledger.proof import prove
from tests.helpers.ledgers import (  # noqa: F401 - fixtures
    attempt,
    change,
    data_set,
    frames,
    ledgers,
    order,
    sixty,
    three_attempts,
)


@contextmanager
def temporary():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def histories(draw):
    """N, and attempts (position, batch, world, steps) each of which starts where one had got to."""
    samples, reached, attempts = draw(st.integers(1, 40)), 0, []
    for _ in range(draw(st.integers(1, 5))):
        batch = draw(st.integers(1, 30))
        world, steps = draw(st.integers(1, min(batch, 5))), draw(st.integers(0, 6))
        position = draw(st.integers(0, reached)) if draw(st.booleans()) else reached
        attempts.append((position, batch, world, steps))
        reached = max(reached, position + batch * steps)
    return samples, attempts, reached


@settings(max_examples=60, deadline=None)
@given(histories(), st.integers(1, 100), st.sets(st.integers(0, 39), max_size=4))
def test_any_history_of_restarts_is_proved(history, window, damaged):
    samples, attempts, reached = history
    with temporary() as folder, mock.patch.object(proof_module, "WINDOW", window):
        data = data_set(folder / "data", samples)
        for one in attempts:
            attempt(folder / "ledger", data, *one, damaged=list(damaged))
        proof = prove(data, [folder])
        assert proof.findings == ()
        assert proof.epochs == tuple(range(reached // samples))
        assert (proof.position, proof.unfinished, proof.torn) == (reached, 0, 0)
        assert proof.worlds == tuple(world for _, _, world, _ in attempts)
        assert proof.deliveries == sum(batch * steps for _, batch, _, steps in attempts)
        assert proof.again == proof.compared == proof.deliveries - reached
        if samples > 1:
            assert proof.replaced == np.isin(order(samples, 0, reached)[1], list(damaged)).sum()


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_a_lost_or_doubled_or_changed_frame_is_never_proved(history, choices):
    """Whatever happens to a frame whose positions nobody else delivered."""
    samples, attempts, _ = history
    position, batch, world, steps = attempts[-1]
    attempts[-1] = position, batch, world, max(steps, 2)
    with temporary() as folder:
        data = data_set(folder / "data", samples)
        attempt(folder / "ledger", data, *attempts[-1])
        after = position + batch * max(steps, 2)
        # Who goes on from there says that all before was consumed; and the epoch ends.
        attempt(folder / "ledger", data, after, batch, world, samples // batch + 1)
        if position:
            attempt(folder / "ledger", data, 0, position, 1, 1)
        assert prove(data, [folder]).findings == ()
        path = ledgers(folder)[choices.draw(st.integers(0, world - 1))]
        number = choices.draw(st.integers(0, max(steps, 2) - 1))
        harm = choices.draw(st.sampled_from(["lost", "doubled", "changed"]))
        if harm == "changed":
            change(path, number, 0, choices.draw(st.integers(1, 2**32 - 1)))
        else:
            parts = frames(path)
            parts[number + 1] *= 0 if harm == "lost" else 2
            path.write_bytes(b"".join(parts))
        assert prove(data, [folder]).findings


def test_no_flipped_bit_is_overlooked(run, data):
    rng = np.random.default_rng(0)
    for _ in range(150):
        path = ledgers(run)[rng.integers(6)]
        whole = path.read_bytes()
        bit = int(rng.integers((whole.index(b"\n") + 1) * 8, len(whole) * 8))
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        proof = prove(data, [run])
        assert proof.findings or proof.torn, (path, bit)
        path.write_bytes(whole)
