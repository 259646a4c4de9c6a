"""Learning rates as pure functions: of progress, of a list of changes, of the validation errors.

Three ways to lower them (setting `schedule`): `dexp`, which the original source's network 170 used
on its own; `manual`, a list of changes by epoch, as its network 145, the paper's, was trained; and
`plateau`, the paper's words: "divide the learning rate by 10 when the validation error rate stopped
improving with the current learning rate" (section 5).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from model.changes import COLOUR

DROP = "drop"
DROP_BIASES = "drop_bias"


@dataclass(frozen=True)
class Rates:
    """The learning rates of one step, each 0 or above; 0 freezes."""

    weights: float
    biases: float
    layers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Rates (of weights, of biases) of the layers that do not have the common ones."""

    def of(self, parameter: str) -> float:
        """Rate of a parameter by its name: `conv1.weight`, `conv1.bias`, `conv1.norm.weight`."""
        layer, kind = parameter.partition(".")[0], parameter.rpartition(".")[2]
        weights, biases = self.layers.get(layer, (self.weights, self.biases))
        return biases if kind == "bias" else weights


def dexp(
    progress: float,
    lr: float,
    bias_factor: float = 2.0,
    drop: float = 250.0,
    drops: int = 4,
    bias_drop: float = 10.0,
    bias_drops: int = 2,
) -> tuple[float, float]:
    """Learning rates of weights and biases: equal stretches, each with a constant rate.

    The schedule `dexp` of the original with the values of its network 170 (layer-params-170.cfg),
    which came as far on its own as the paper's network did with rates lowered by hand: .01, .0016,
    .00025, .00004 and, for biases, .02, .002.

    Args:
        progress: share of the training done, in [0, 1].
        lr: first rate of the weights.
        bias_factor: first rate of the biases, as a multiple of `lr`.
        drop: first rate of the weights over their last.
        drops: number of stretches for the weights; 1 keeps the rate constant.
        bias_drop: as `drop`, for biases.
        bias_drops: as `drops`, for biases.

    Raises:
        ValueError: progress outside [0, 1], or fewer than 1 stretch.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it is the share of the training done, 0 to 1")
    return (
        _stretch_rate(progress, lr, drop, drops),
        _stretch_rate(progress, lr * bias_factor, bias_drop, bias_drops),
    )


def _stretch_rate(progress: float, first: float, drop: float, stretches: int) -> float:
    if stretches < 1:
        raise ValueError(f"a schedule has at least 1 stretch, not {stretches}")
    if stretches == 1:
        return first
    # The end of a stretch still belongs to it, as in the original (cuda-convnet2, src/lr.cu).
    place = next(i for i in range(stretches) if progress <= (i + 1) / stretches)
    return float(first * (1.0 / drop) ** (place / (stretches - 1)))


def scaled(lr: float, batch_size: int, rule: str, base: int = 128) -> float:
    """Return the rate for batches of another size than it was found for.

    "One weird trick for parallelizing convolutional neural networks" (arXiv 1404.5997): for k times
    the batch, theory asks for sqrt(k) times the rate, which keeps the variance of the update; in
    practice k times the rate did best.

    Args:
        lr: rate for batches of `base` pictures.
        batch_size: pictures in a batch.
        rule: "none", "linear" or "sqrt".
        base: 128, as in the paper.

    Raises:
        ValueError: another rule.
    """
    factors = {"none": 1.0, "linear": batch_size / base, "sqrt": math.sqrt(batch_size / base)}
    if rule not in factors:
        raise ValueError(f"rate_scaling is {rule!r}; it is one of {', '.join(factors)}")
    return lr * factors[rule]


def in_force(
    lr: float,
    lr_bias: float,
    settings: Iterable[tuple[str, float]],
    factors: Mapping[str, float] | None = None,
) -> Rates:
    """Return the rates after a row of settings, of which later ones win.

    A rate that a layer was given of its own (`lr.conv1`) is absolute: later changes of `lr` and the
    layer's factor leave it alone, as conv1 of the original's network 145 stayed at 0 when the other
    layers went on to 1e-5. Only `drop` divides it, too.

    Args:
        lr: first rate of the weights.
        lr_bias: first rate of the biases.
        settings: (name, value): `lr`, `lr_bias`, `lr.LAYER`, `lr_bias.LAYER` set a rate; `drop`
            divides all rates of weights by its value, `drop_bias` those of biases; `colour` is
            passed over.
        factors: `layer_factors`.

    Raises:
        ValueError: a setting of another name.
    """
    common = {"lr": lr, "lr_bias": lr_bias}
    own: dict[str, dict[str, float]] = {"lr": {}, "lr_bias": {}}
    for name, value in settings:
        kind, _, layer = name.partition(".")
        if kind in common and layer:
            own[kind][layer] = value
        elif name in common:
            common[name] = value
        elif name in (DROP, DROP_BIASES):
            kind = "lr" if name == DROP else "lr_bias"
            common[kind] /= value
            own[kind] = {layer: rate / value for layer, rate in own[kind].items()}
        elif name != COLOUR:
            raise ValueError(f"no rate is called {name!r}")
    factors = factors or {}
    layers = {
        layer: (
            own["lr"].get(layer, common["lr"] * factors.get(layer, 1.0)),
            own["lr_bias"].get(layer, common["lr_bias"] * factors.get(layer, 1.0)),
        )
        for layer in sorted({*own["lr"], *own["lr_bias"], *factors})
    }
    return Rates(common["lr"], common["lr_bias"], layers)


def plateau_drops(
    history: Iterable[tuple[int, float]],
    patience: int,
    most: int = 3,
    threshold: float = 0.0,
    restarts: Collection[int] = (),
) -> list[int]:
    """Return after which steps the rate is divided because the validation error has stalled.

    The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau` with `threshold_mode="rel"`: a
    validation is an improvement if its error is below best * (1 - threshold); the rate is divided
    at the validation that makes more than `patience` in a row without one. The best error is kept
    over a division, the count begins anew. An error that is no number is no improvement.

    Args:
        history: (step, error) of each validation, in order.
        patience: validations without improvement that are put up with, 0 or above.
        most: divisions in all; the paper had three.
        threshold: share of the best error, in [0, 1).
        restarts: steps after which the rates were set by hand: the count begins anew there, too.
    """
    drops: list[int] = []
    best, stalled = math.inf, 0
    left = sorted(restarts)
    for step, error in history:
        while left and left[0] < step:
            left.pop(0)
            stalled = 0
        if error < best * (1.0 - threshold):
            best, stalled = error, 0
        else:
            stalled += 1
        if stalled > patience and len(drops) < most:
            drops.append(step)
            stalled = 0
    return drops
