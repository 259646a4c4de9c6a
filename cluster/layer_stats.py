"""Means of every layer of both columns, brought together on all processes."""

from __future__ import annotations

from cluster.place import Place
from model.alexnet import AlexNet
from model.optim import Means, Sgd2012, layer_statistics


def of_all_columns(place: Place, net: AlexNet, optimiser: Sgd2012) -> dict[str, Means]:
    """Return mean |w|, |v| and |gradient| of "a.conv1.weight", ..., "b.fc8.bias".

    All processes call it, after a step and before the gradients are dropped (they are averaged over
    the replicas by then, so that all replicas have the same). A Means is written to JSON as a list
    of three numbers.
    """
    parts = place.gather(layer_statistics(net, optimiser) if place.replica == 0 else {})
    return dict(sorted((key, means) for part in parts for key, means in part.items()))
