"""Learning rates as pure functions of progress, of scheduled changes and of validation errors.

Four schedules lower them (setting `schedule`): `dexp`, which the original source's network 170
used on its own; `manual`, a list of changes by epoch, as its network 145, the paper's, was trained;
`plateau`, the paper's words: "divide the learning rate by 10 when the validation error rate
stopped improving with the current learning rate" (section 5); and `poly` of recipes for large
batches.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

COLOR = "colour"
DROP = "drop"
DROP_BIASES = "drop_bias"


@dataclass(frozen=True)
class Rates:
    """The learning rates of one step, each 0 or above; 0 freezes."""

    weights: float
    biases: float
    layers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Rates (of weights, of biases) of the layers that differ from the common ones."""

    def get(self, parameter: str) -> float:
        """Rate of a parameter by its name: `conv1.weight`, `conv1.bias`, `conv1.norm.weight`."""
        layer, kind = parameter.partition(".")[0], parameter.rpartition(".")[2]
        weights, biases = self.layers.get(layer, (self.weights, self.biases))
        return biases if kind == "bias" else weights

    def scale(self, factor: float) -> Rates:
        """All rates times a factor."""
        layers = {name: (w * factor, b * factor) for name, (w, b) in self.layers.items()}
        return Rates(self.weights * factor, self.biases * factor, layers)


@dataclass(frozen=True)
class ScheduledChange:
    """An entry of the setting `changes`."""

    epoch: float
    """Passes over the training images after which the change takes effect."""
    name: str
    """lr, lr_bias, lr.LAYER, lr_bias.LAYER or colour."""
    value: float


def parse_changes(entries: Sequence[str], layers: Sequence[str]) -> tuple[ScheduledChange, ...]:
    """Parse the entries of `changes`, each "EPOCH NAME VALUE", and sort them by epoch.

    The sort is stable: entries of one epoch stay in their order. An entry takes effect at the first
    step that begins with that many passes made. The original counts epochs from 1 (its models start
    with `epoch = 1`, cuda-convnet2's gpumodel.py), and its notes name the epoch in which a run was
    stopped and resumed with another rate: "epoch 25: set epsw to 0.001" was done with 24 to 25
    passes made. We read such a note as the end of its epoch, with 25 made, so that its numbers stay
    as they are. Network 145 (layer-params-145.cfg), with lr 0.01, bias_factor 2 and 91 epochs
    ("epoch 91: killed"), is:

        25 lr 0.001, 51 lr 0.0001, 67 lr.conv1 0.00001, 67 colour 0, 72 lr.conv1 0,
        72 lr_bias.conv1 0, 79 lr 0.00001

    (That conv1's biases were stopped with its weights is not in the notes; in the file they are.)

    Args:
        entries: for example "25 lr 0.001". EPOCH is 0 or above, for `colour` a whole number.
        layers: names of the network's layers.

    Raises:
        ValueError: one line that names the entry, what is wrong with it, and what would be right.
    """
    known = [*list_rate_names(layers), COLOR]
    changes = [_parse_change(entry, known) for entry in entries]
    return tuple(sorted(changes, key=lambda change: change.epoch))


def _parse_change(entry: str, known: Sequence[str]) -> ScheduledChange:
    words = entry.split()
    if len(words) != 3:
        raise ValueError(
            f"changes: {entry!r} should be three words, EPOCH NAME VALUE, such as '25 lr 0.001'"
        )
    epoch = _parse_number(words[0], f"changes: {entry!r}: the epoch")
    name = words[1]
    if name not in known:
        hint = suggest_name(name, known)
        raise ValueError(f"changes: {entry!r}: nothing is called {name!r}; {hint}")
    value = _parse_number(words[2], f"changes: {entry!r}: the value")
    if name == COLOR and not epoch.is_integer():
        raise ValueError(f"changes: {entry!r}: colour changes between whole epochs only")
    return ScheduledChange(epoch, name, value)


def list_rate_names(layers: Sequence[str]) -> list[str]:
    """Names under which rates can be set: lr, lr_bias, lr.LAYER ..., lr_bias.LAYER ..."""
    return ["lr", "lr_bias", *(f"{kind}.{layer}" for kind in ("lr", "lr_bias") for layer in layers)]


def suggest_name(name: str, known: Sequence[str]) -> str:
    """A hint for an unknown name: the nearest of the known ones, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _parse_number(text: str, what: str) -> float:
    """A finite number from 0 up; the `ValueError` for anything else begins with `what`."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise ValueError(f"{what} {text!r} should be a number from 0 up")


def list_color_steps(
    changes: Iterable[ScheduledChange], first: float
) -> tuple[tuple[int, float], ...]:
    """Standard deviations of the color augmentation as (epoch, value) pairs, from epoch 0 on.

    Each value holds for the epochs from its own up to the next one's, counted from 0. The original
    went from .1 to 0 in its epoch 67 (layer-params-145.cfg).

    Args:
        changes: from `parse_changes`; changes of rates are ignored.
        first: value until it is changed.
    """
    values = {0: first}
    for change in changes:
        if change.name == COLOR:
            values[int(change.epoch)] = change.value
    return tuple(sorted(values.items()))


def parse_layer_rates(
    entries: Sequence[str], layers: Sequence[str], setting: str = "layer_rates"
) -> dict[str, float]:
    """Parse numbers for single layers, such as factors on their rates: "conv1=0.1", "fc8=10".

    Args:
        entries: LAYER=FACTOR; the factor is 0 or above.
        layers: names of the network's layers.
        setting: name of the setting, for messages.

    Raises:
        ValueError: one line that names the entry, what is wrong with it, and what would be right.
    """
    factors: dict[str, float] = {}
    for entry in entries:
        layer, equals, text = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ValueError(f"{setting}: {entry!r} should be LAYER=FACTOR, such as 'conv1=0.1'")
        if layer not in layers:
            hint = suggest_name(layer, layers)
            raise ValueError(f"{setting}: {entry!r}: no layer is called {layer!r}; {hint}")
        if layer in factors:
            raise ValueError(f"{setting}: {entry!r}: {layer} has a factor already; give one")
        factors[layer] = _parse_number(text, f"{setting}: {entry!r}: the factor")
    return factors


def compute_warmup(step: int, steps: float, first: float) -> float:
    """Factor on the rates in a linear warm-up (Goyal et al. 2017, arXiv 1706.02677).

    Args:
        step: number of the step, from 1.
        steps: length of the warm-up in steps; the factor is 1 from its end on.
        first: factor where it begins, in [0, 1].
    """
    return 1.0 if step >= steps else first + (1.0 - first) * step / steps


def dexp(
    progress: float,
    lr: float,
    bias_factor: float = 2.0,
    drop: float = 250.0,
    drops: int = 4,
    bias_drop: float = 10.0,
    bias_drops: int = 2,
) -> tuple[float, float]:
    """Learning rates of weights and biases: stretches of equal length, each with a constant rate.

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
        _compute_stretch_rate(progress, lr, drop, drops),
        _compute_stretch_rate(progress, lr * bias_factor, bias_drop, bias_drops),
    )


def _compute_stretch_rate(progress: float, first: float, drop: float, stretches: int) -> float:
    if stretches < 1:
        raise ValueError(f"a schedule has at least 1 stretch, not {stretches}")
    if stretches == 1:
        return first
    # The end of a stretch still belongs to it, as in the original (cuda-convnet2, src/lr.cu).
    index = next(i for i in range(stretches) if progress <= (i + 1) / stretches)
    return float(first * (1.0 / drop) ** (index / (stretches - 1)))


def scale_rate(lr: float, batch_size: int, rule: str, base: int = 128) -> float:
    """The rate for another batch size than the one it was tuned for.

    "One weird trick for parallelizing convolutional neural networks" (arXiv 1404.5997): for k times
    the batch, theory asks for sqrt(k) times the rate, which keeps the variance of the update; in
    practice k times the rate did best.

    Args:
        lr: rate for batches of `base` images.
        batch_size: images in a batch.
        rule: "none", "linear" or "sqrt".
        base: 128, as in the paper.

    Raises:
        ValueError: another rule.
    """
    factors = {"none": 1.0, "linear": batch_size / base, "sqrt": math.sqrt(batch_size / base)}
    if rule not in factors:
        raise ValueError(f"rate_scaling is {rule!r}; it is one of {', '.join(factors)}")
    return lr * factors[rule]


def compute_rates(
    lr: float,
    lr_bias: float,
    settings: Iterable[tuple[str, float]],
    factors: Mapping[str, float] | None = None,
) -> Rates:
    """The rates after a sequence of settings, of which later ones win.

    A rate that a layer was given of its own (`lr.conv1`) is absolute: later changes of `lr` and the
    layer's factor do not touch it, as conv1 of the original's network 145 stayed at 0 when the
    other layers were lowered to 1e-5. Only `drop` divides it, too.

    Args:
        lr: first rate of the weights.
        lr_bias: first rate of the biases.
        settings: (name, value): `lr`, `lr_bias`, `lr.LAYER`, `lr_bias.LAYER` set a rate; `drop`
            divides all rates of weights by its value, `drop_bias` those of biases; `colour` is
            ignored.
        factors: from `parse_layer_rates`.

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
        elif name != COLOR:
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


def find_plateau_drops(
    history: Iterable[tuple[int, float]],
    patience: int,
    most: int = 3,
    threshold: float = 0.0,
    restarts: Collection[int] = (),
) -> list[int]:
    """Steps after which the rate is divided because the validation error has stopped falling.

    The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau` with `threshold_mode="rel"`: a
    validation is an improvement if its error is below best * (1 - threshold); the rate is divided
    at the validation that makes more than `patience` in a row without one. A division keeps the
    best error and restarts the count. An error of NaN is no improvement.

    Args:
        history: (step, error) of each validation, in order.
        patience: validations in a row without improvement that are tolerated, 0 or above.
        most: divisions in all; the paper had three.
        threshold: share of the best error, in [0, 1).
        restarts: steps after which the rates were set by hand: these restart the count, too.
    """
    drops: list[int] = []
    best, stalled, previous = math.inf, 0, -1
    for step, error in history:
        if any(previous <= restart < step for restart in restarts):
            stalled = 0
        previous = step
        if error < best * (1.0 - threshold):
            best, stalled = error, 0
        else:
            stalled += 1
        if stalled > patience and len(drops) < most:
            drops.append(step)
            stalled = 0
    return drops
