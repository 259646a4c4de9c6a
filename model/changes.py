"""What a recipe says in words: changes by epoch, factors on the rates of single layers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COLOUR = "colour"


@dataclass(frozen=True)
class Change:
    """An entry of `changes`."""

    epoch: float
    """Passes over the training pictures after which it holds."""
    name: str
    """lr, lr_bias, lr.LAYER, lr_bias.LAYER or colour."""
    value: float


def parse_changes(entries: Sequence[str], layers: Sequence[str]) -> tuple[Change, ...]:
    """Read the entries of `changes`, each "EPOCH NAME VALUE", and sort them by epoch.

    Of one epoch, the later entry in the list comes later. An entry holds from the first step that
    begins with its number of passes made. The original counts epochs from 1 (its models start with
    `epoch = 1`, cuda-convnet2's gpumodel.py), and its notes name the epoch in which a run was
    stopped, to go on with another rate: "epoch 25: set epsw to 0.001" was done with 24 to 25 passes
    made. We take such a note to be at the end of its epoch, with 25 made, so that its numbers stay
    as they are. Network 145 (layer-params-145.cfg), with lr 0.01, bias_factor 2 and 91 epochs
    ("epoch 91: killed"), is:

        25 lr 0.001, 51 lr 0.0001, 67 lr.conv1 0.00001, 67 colour 0, 72 lr.conv1 0,
        72 lr_bias.conv1 0, 79 lr 0.00001

    (That conv1's biases were stopped with its weights is not in the notes; in the file they are.)

    Args:
        entries: for example "25 lr 0.001". EPOCH is 0 or above, for `colour` a whole number.
        layers: names of the network's layers.

    Raises:
        ValueError: one line that names the entry, what is wrong with it, and what would do.
    """
    known = [*rate_names(layers), COLOUR]
    changes = [_parse_change(entry, known) for entry in entries]
    return tuple(sorted(changes, key=lambda change: change.epoch))


def _parse_change(entry: str, known: Sequence[str]) -> Change:
    words = entry.split()
    if len(words) != 3:
        raise ValueError(
            f"changes: {entry!r} should be three words, EPOCH NAME VALUE, such as '25 lr 0.001'"
        )
    epoch, value = (_number(word) for word in (words[0], words[2]))
    name = words[1]
    if epoch is None:
        raise ValueError(f"changes: {entry!r}: the epoch {words[0]!r} should be a number from 0 up")
    if name not in known:
        raise ValueError(f"changes: {entry!r}: nothing is called {name!r}; {nearest(name, known)}")
    if value is None:
        raise ValueError(f"changes: {entry!r}: the value {words[2]!r} should be a number from 0 up")
    if name == COLOUR and not epoch.is_integer():
        raise ValueError(f"changes: {entry!r}: colour changes between whole epochs only")
    return Change(epoch, name, value)


def rate_names(layers: Sequence[str]) -> list[str]:
    """Names under which rates can be set: lr, lr_bias, lr.LAYER ..., lr_bias.LAYER ..."""
    return ["lr", "lr_bias", *(f"{kind}.{layer}" for kind in ("lr", "lr_bias") for layer in layers)]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for whoever wrote a name that is not known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _number(text: str) -> float | None:
    """A finite number from 0 up; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def colour_steps(changes: Iterable[Change], first: float) -> tuple[tuple[int, float], ...]:
    """Return the deviations of the colour draws: (epoch, value) from epoch 0 on.

    Each value holds for the epochs from its own up to the next one's, counted from 0. The original
    went from .1 to 0 in its epoch 67 (layer-params-145.cfg).

    Args:
        changes: `parse_changes`; those of rates are passed over.
        first: value until it is changed.
    """
    values = {0: first}
    for change in changes:
        if change.name == COLOUR:
            values[int(change.epoch)] = change.value
    return tuple(sorted(values.items()))


def layer_factors(entries: Sequence[str], layers: Sequence[str]) -> dict[str, float]:
    """Read factors on both rates of a layer: "conv1=0.1", "fc8=10"; 0 freezes the layer.

    Args:
        entries: LAYER=FACTOR; the factor is 0 or above.
        layers: names of the network's layers.

    Raises:
        ValueError: one line that names the entry, what is wrong with it, and what would do.
    """
    factors: dict[str, float] = {}
    for entry in entries:
        layer, equals, text = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ValueError(f"layer_rates: {entry!r} should be LAYER=FACTOR, such as 'conv1=0.1'")
        if layer not in layers:
            hint = nearest(layer, layers)
            raise ValueError(f"layer_rates: {entry!r}: no layer is called {layer!r}; {hint}")
        if layer in factors:
            raise ValueError(f"layer_rates: {entry!r}: {layer} has a factor already; give one")
        factor = _number(text)
        if factor is None:
            raise ValueError(
                f"layer_rates: {entry!r}: the factor {text!r} should be a number from 0 up"
            )
        factors[layer] = factor
    return factors
