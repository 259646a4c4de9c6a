from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stream.augment import NamedDraw, compute_color_shift, draw, random_uint64

MANY = np.arange(40_000)
EPOCHS = np.zeros_like(MANY)


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2**40)), min_size=1, max_size=20),
)
def test_a_sample_is_drawn_alike_in_any_batch(seed, slots):
    epochs, ids = (np.array(column, np.int64) for column in zip(*slots, strict=True))
    whole = draw(seed, epochs, ids)
    for place in range(len(ids)):
        alone = draw(seed, epochs[place : place + 1], ids[place : place + 1])
        for a, b in zip(whole, alone, strict=True):
            np.testing.assert_array_equal(a[place], b[0])


def test_corners_and_flips_are_uniform_over_their_range():
    draws = draw(3, EPOCHS, MANY)
    for corner in (draws.x, draws.y):
        counts = np.bincount(corner, minlength=33)
        assert len(counts) == 33
        # chi-squared with 32 degrees of freedom: above 75 once in 30,000
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 75
    assert abs(draws.flip.mean() - 0.5) < 0.01


def test_colour_draws_are_standard_normal_and_independent():
    colour = draw(3, EPOCHS, MANY).color
    assert np.abs(colour.mean(0)).max() < 0.02
    assert np.abs(colour.std(0) - 1).max() < 0.02
    assert np.abs((colour**4).mean(0) - 3).max() < 0.25
    assert np.abs(np.corrcoef(colour.T) - np.eye(3)).max() < 0.02


def test_seed_epoch_and_sample_each_change_the_draw():
    ids = np.arange(2000)
    base = draw(0, np.zeros_like(ids), ids)
    for other in (
        draw(1, np.zeros_like(ids), ids),
        draw(0, np.ones_like(ids), ids),
        draw(0, np.zeros_like(ids), ids + 1),
    ):
        assert abs(np.corrcoef(base.x, other.x)[0, 1]) < 0.1
        assert 0.4 < (base.flip == other.flip).mean() < 0.6


def test_the_words_are_splitmix64():
    """Against whole-number arithmetic written from the paper's pseudo-code."""
    full = 2**64 - 1

    def mix(word: int) -> int:
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & full
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & full
        return word ^ (word >> 31)

    golden, seed, epoch, sample = 0x9E3779B97F4A7C15, 2**62 + 1, 17, 13_999_999
    state = mix((mix((mix((seed + golden) & full) + epoch) & full) + sample) & full)
    words = [mix((state + (k + 1) * golden) & full) for k in range(3)]
    draws = draw(seed, np.array([epoch]), np.array([sample]))
    assert draws.x[0] == (words[0] >> 32) * 33 >> 32
    assert draws.y[0] == (words[1] >> 32) * 33 >> 32
    assert draws.flip[0] == words[2] >> 63


def test_the_draws_are_the_ones_runs_were_made_with():
    draws = draw(0, np.array([0, 1]), np.array([0, 12345]))
    assert draws.x.tolist() == GOLDEN["x"]
    assert draws.y.tolist() == GOLDEN["y"]
    assert draws.flip.tolist() == GOLDEN["flip"]
    assert draws.color.round(6).tolist() == GOLDEN["colour"]


def test_tint_is_the_papers_formula():
    """[p1 p2 p3][a1 l1, a2 l2, a3 l3]^T with the deviations as l (fact sheet, section 4)."""
    rng = np.random.default_rng(0)
    vectors, deviations, alpha = rng.normal(size=(3, 3)), rng.uniform(1, 9, 3), rng.normal(size=3)
    expected = vectors @ (alpha * deviations)
    got = compute_color_shift(alpha[None], vectors * deviations)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


GOLDEN = {
    "x": [5, 4],
    "y": [15, 28],
    "flip": [True, False],
    "colour": [[1.622606, -0.1943, -0.517103], [0.844629, 0.825953, 0.484936]],
}


def test_the_words_of_a_name_are_those_of_the_page_on_the_format():
    """docs/format.md, "Draws of a sample"."""
    (word,) = random_uint64(7, np.array([1]), np.array([5]), 1, name="augment x")
    assert int(word[0]) == 0xD18D37A65CF19F07
    value = NamedDraw("x", "uniform", (0.0, 1.0)).compute(7, np.array([1]), np.array([5]))
    assert value[0] == np.float32((0xD18D37A65CF19F07 >> 11) / 2**53)
