"""Schedules against the original's rates and torch's plateau scheduler; errors name the way out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.schedule import (
    Rates,
    ScheduledChange,
    compute_rates,
    dexp,
    find_plateau_drops,
    list_color_steps,
    parse_changes,
    parse_layer_rates,
    scale_rate,
)
from tests.helpers.schedules import manual

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
NETWORK_145 = (
    "25 lr 0.001", "51 lr 0.0001", "67 lr.conv1 0.00001", "67 colour 0", "72 lr.conv1 0",
    "72 lr_bias.conv1 0", "79 lr 0.00001",
)  # fmt: skip


@pytest.mark.parametrize(
    ("progress", "weights", "biases"),
    [
        # layer-params-170: .01 .001587 .000252 .00004 in equal quarters, .02 and .002 in halves;
        # the end of a stretch belongs to it (lr.cu)
        (0.0, 0.01, 0.02),
        (0.25, 0.01, 0.02),
        (0.2500001, 0.001587, 0.02),
        (0.5, 0.001587, 0.02),
        (0.6, 0.000252, 0.002),
        (0.75, 0.000252, 0.002),
        (0.8, 0.00004, 0.002),
        (1.0, 0.00004, 0.002),
    ],
)
def test_dexp_is_the_schedule_of_network_170(
    progress: float, weights: float, biases: float
) -> None:
    assert dexp(progress, 0.01) == pytest.approx((weights, biases), rel=1e-3)


def test_one_stretch_is_a_constant_rate() -> None:
    for progress in (0.0, 0.3, 1.0):
        rates = dexp(progress, 0.005, bias_factor=3, drops=1, bias_drops=1)
        assert rates == pytest.approx((0.005, 0.015), rel=1e-12)


def test_dexp_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        dexp(1.5, 0.01)
    with pytest.raises(ValueError, match="progress is nan"):
        dexp(float("nan"), 0.01)
    with pytest.raises(ValueError, match="at least 1"):
        dexp(0.5, 0.01, drops=0)


def test_rates_scale_with_the_batch() -> None:
    assert scale_rate(0.01, 512, "none") == 0.01
    assert scale_rate(0.01, 512, "linear") == 0.04
    assert scale_rate(0.01, 512, "sqrt") == 0.02
    assert scale_rate(0.01, 64, "sqrt") == pytest.approx(0.01 / math.sqrt(2), rel=1e-15)
    assert scale_rate(0.01, 64, "linear", base=32) == 0.02
    with pytest.raises(ValueError, match="'cubic'; it is one of none, linear, sqrt"):
        scale_rate(0.01, 128, "cubic")


@pytest.mark.parametrize(
    ("epoch", "weights", "conv1"),
    [
        # layer-params-145.cfg: at its end epsW .00001, epsB .02, and both 0 in conv1
        (0.0, 0.01, (0.01, 0.02)),
        (24.999, 0.01, (0.01, 0.02)),
        (25.0, 0.001, (0.001, 0.02)),
        (51.0, 0.0001, (0.0001, 0.02)),
        (66.9, 0.0001, (0.0001, 0.02)),
        (67.0, 0.0001, (0.00001, 0.02)),
        (72.0, 0.0001, (0.0, 0.0)),
        (79.0, 0.00001, (0.0, 0.0)),
        (90.0, 0.00001, (0.0, 0.0)),
    ],
)
def test_manual_is_the_schedule_of_network_145(
    epoch: float, weights: float, conv1: tuple[float, float]
) -> None:
    rates = manual(epoch, parse_changes(NETWORK_145, LAYERS), 0.01, 0.02)
    assert (rates.weights, rates.biases) == (weights, 0.02)
    assert (rates.get("conv1.weight"), rates.get("conv1.bias")) == conv1
    assert (rates.get("conv2.weight"), rates.get("fc8.bias")) == (weights, 0.02)


def test_colour_noise_of_network_145_ends_with_its_epoch_67() -> None:
    changes = parse_changes(NETWORK_145, LAYERS)
    assert list_color_steps(changes, 0.1) == ((0, 0.1), (67, 0.0))
    assert list_color_steps((), 0.1) == ((0, 0.1),)
    later = parse_changes(["9 colour 0.1", "0 colour 0.3", "9 colour 0.2", "5 lr 1"], LAYERS)
    assert list_color_steps(later, 0.1) == ((0, 0.3), (9, 0.2))


def test_changes_are_sorted_by_epoch_and_the_later_in_the_list_wins() -> None:
    changes = parse_changes(["3 lr .1", "1 lr .2", "3 lr .3", "  2.5  lr_bias.fc8\t4e-1 "], LAYERS)
    assert changes == (
        ScheduledChange(1.0, "lr", 0.2),
        ScheduledChange(2.5, "lr_bias.fc8", 0.4),
        ScheduledChange(3.0, "lr", 0.1),
        ScheduledChange(3.0, "lr", 0.3),
    )
    assert manual(3, changes, 1.0, 2.0) == Rates(0.3, 2.0, {"fc8": (0.3, 0.4)})


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("25 lr", "'25 lr' should be three words, EPOCH NAME VALUE, such as '25 lr 0.001'"),
        ("25 lr = 1", "should be three words"),
        ("ten lr 0.1", "the epoch 'ten' should be a number from 0 up"),
        ("-1 lr 0.1", "the epoch '-1' should be a number"),
        ("inf lr 0.1", "the epoch 'inf' should be a number"),
        ("1 lr.conv9 0.1", r"nothing is called 'lr\.conv9'; did you mean 'lr\.conv"),
        ("1 lr_bia 0.1", "did you mean 'lr_bias'"),
        ("1 momentum 0.1", r"there are lr, lr_bias, lr\.conv1, .*colour"),
        ("1 drop 10", "nothing is called 'drop'"),
        ("1 lr fast", "the value 'fast' should be a number from 0 up"),
        ("1 lr -0.1", "the value '-0.1' should be"),
        ("1 lr nan", "the value 'nan' should be"),
        ("66.5 colour 0", "colour changes between whole epochs only"),
    ],
)
def test_a_wrong_change_is_named_in_one_line(entry: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        parse_changes(["1 lr 0.1", entry], LAYERS)
    assert repr(entry) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (["conv1"], "'conv1' should be LAYER=FACTOR"),
        (["conv9=1"], r"'conv9=1': no layer is called 'conv9'; did you mean 'conv"),
        (["weird=1"], "there are conv1, conv2"),
        (["fc8=ten"], "the factor 'ten' should be a number from 0 up"),
        (["fc8=-1"], "the factor '-1' should be"),
        (["fc8="], "the factor '' should be"),
        (["fc8=1", "fc8=2"], "'fc8=2': fc8 has a factor already"),
    ],
)
def test_a_wrong_factor_is_named_in_one_line(entries: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_layer_rates(entries, LAYERS)


def test_factors_apply_to_both_rates_and_not_to_a_rate_of_its_own() -> None:
    factors = parse_layer_rates(["conv1=0.1", " fc8 = 10 ", "conv2=0"], LAYERS)
    assert factors == {"conv1": 0.1, "fc8": 10.0, "conv2": 0.0}
    rates = compute_rates(1.0, 2.0, [], factors)
    assert rates.layers == {"conv1": (0.1, 0.2), "fc8": (10.0, 20.0), "conv2": (0.0, 0.0)}
    rates = compute_rates(1.0, 2.0, [("lr", 0.5), ("lr.fc8", 0.25)], factors)
    assert rates.get("conv1.weight") == 0.05
    assert (rates.get("fc8.weight"), rates.get("fc8.bias")) == (0.25, 20.0)
    assert rates.get("conv3.weight") == 0.5


def test_a_drop_divides_common_and_own_rates_of_its_kind() -> None:
    settings = [("lr.fc8", 4.0), ("lr_bias.fc8", 6.0), ("drop", 2.0), ("colour", 0.0)]
    assert compute_rates(1.0, 3.0, settings) == Rates(0.5, 3.0, {"fc8": (2.0, 6.0)})
    settings.append(("drop_bias", 2.0))
    assert compute_rates(1.0, 3.0, settings) == Rates(0.5, 1.5, {"fc8": (2.0, 3.0)})
    with pytest.raises(ValueError, match="no rate is called 'momentum'"):
        compute_rates(1.0, 3.0, [("momentum", 0.5)])


errors = st.one_of(
    # few values, so that ties and small steps are frequent
    st.sampled_from([0.5, 0.4995, 0.499, 0.49, 0.3, 0.0]),
    st.floats(0, 1),
    st.just(math.nan),
)


@given(
    history=st.lists(errors, max_size=40),
    patience=st.integers(0, 4),
    most=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 1e-4, 0.002, 0.1]),
)
def test_plateau_divides_where_torchs_scheduler_does(
    history: list[float], patience: int, most: int, threshold: float
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=threshold, eps=0.0
    )
    expected, rate = [], 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses calls of optimizer.step
        for place, error in enumerate(history):
            oracle.step(error)
            if optimizer.param_groups[0]["lr"] != rate:
                rate = optimizer.param_groups[0]["lr"]
                expected.append(10 * place)
    numbered = [(10 * place, error) for place, error in enumerate(history)]
    assert find_plateau_drops(numbered, patience, most, threshold) == expected[:most]


def test_plateau_by_hand() -> None:
    history = list(enumerate([0.9, 0.8, 0.8, 0.81, 0.7, 0.7, 0.7, 0.7, 0.7]))
    assert find_plateau_drops(history, patience=1) == [3, 6, 8]
    assert find_plateau_drops(history, patience=1, most=2) == [3, 6]
    assert find_plateau_drops(history, patience=1, threshold=0.2) == [2, 6, 8]
    # Set by hand after step 5: the validation after step 5 no longer counts, that of 6 does.
    assert find_plateau_drops(history, patience=1, restarts=[5]) == [3, 7]
    assert find_plateau_drops(history, patience=1, restarts=[2]) == [6, 8]
    assert find_plateau_drops([], patience=0) == []
