"""Figure 4 (left) of the paper: pictures, what they are, and the five answers of the network.

The paper shows eight test pictures of its own choice. Here they are chosen by rule, from the
probabilities that `cluster.evaluate --save-probabilities` leaves: those in which the true class got
the most, those in which it got the least, and some drawn by lot among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cluster.report.images import Unavailable, cache_of, first_line, small_jpeg
from cluster.run.probabilities import Saved, file_of
from pipeline.dataset.images import Pixels
from pipeline.dataset.manifest import identity
from pipeline.remote.dataset import metadata, open_dataset
from pipeline.stored_picture import Undecodable, pixels_of
from pipeline.stream.shard_reader import Storage
from pipeline.tools.errors import DuetError

Choice = Literal["best", "worst", "random"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
EACH = 8
"""Pictures of a choice."""
ANSWERS = 5
BORDER = 16
"""Pixels around the centre view, 224x224 of 256x256."""
ROWS = 4096
"""Pictures whose probabilities are in memory at a time."""
TITLES = {
    "best": "Surest of the truth",
    "worst": "Furthest from the truth",
    "random": "Drawn by lot",
}


@dataclass(frozen=True)
class Guess:
    """One of the most probable classes."""

    name: str
    share: float
    """Its probability, 0..1."""
    true: bool


@dataclass(frozen=True)
class Answer:
    """A picture with the network's answers, the most probable first."""

    uri: str
    sample: int
    """Place in the split's stored order."""
    truth: str
    share: float
    """Probability of the true class."""
    guesses: tuple[Guess, ...]

    @property
    def verdict(self) -> str:
        """How it counts: "right", "in the top 5" or "wrong"."""
        if self.guesses[0].true:
            return "right"
        return "in the top 5" if any(guess.true for guess in self.guesses) else "wrong"


@dataclass(frozen=True)
class Answers:
    """Pictures by choice, and what the probabilities are of."""

    groups: tuple[tuple[str, tuple[Answer, ...]], ...]
    """(title, pictures)."""
    views: int
    split: str
    samples: int
    step: int


def answers(
    run: Path,
    data: str | None,
    config: dict[str, Any],
    choices: Sequence[Choice] = CHOICES,
    each: int = EACH,
) -> Answers:
    """Pictures of the evaluated split with the five most probable classes.

    Args:
        run: folder of the run; its probabilities of ten views if there are, else of one.
        data: the data set that they are of.
        config: of the run, for its cache.
        choices: which pictures.
        each: how many of each choice.

    Raises:
        Unavailable: there are no probabilities, or no such pictures.
    """
    views = next((views for views in (10, 1) if file_of(run, views).is_file()), 0)
    if not views:
        raise Unavailable(
            "No answers: the probabilities were not kept (cluster.evaluate --save-probabilities)."
        )
    if data is None:
        raise Unavailable("No answers: no data folder was given (--data).")
    try:
        saved = Saved(run, views)
        _check(saved, data, config)
        chosen = choose(saved, choices, each)
        with (
            closing(open_dataset(data, **cache_of(config))) as dataset,
            closing(Storage(dataset, saved.about.split)) as storage,
        ):
            groups = tuple(
                (TITLES[choice], tuple(_answers(saved, storage, ids, views)))
                for choice, ids in chosen.items()
            )
    except (DuetError, OSError, ValueError) as error:
        raise Unavailable(f"No answers: {first_line(error)}.") from error
    about = saved.about
    return Answers(groups, views, about.split, int((saved.weights > 0).sum()), about.step)


def _check(saved: Saved, data: str, config: dict[str, Any]) -> None:
    """Refuse another data set than the probabilities are of.

    Raises:
        Unavailable: it is another.
    """
    if identity(metadata(data, **cache_of(config))) != saved.about.data_sha256:
        raise Unavailable(f"No answers: {data} is not the data set that was evaluated.")


def choose(saved: Saved, choices: Sequence[Choice], each: int) -> dict[Choice, list[int]]:
    """Which pictures each choice shows, by their ids; damaged ones are never shown."""
    sound = torch.nonzero(saved.weights > 0).flatten()
    true = torch.cat(
        [
            _true(saved.rows(first, min(first + ROWS, len(saved.labels))), saved.labels[first:])
            for first in range(0, len(saved.labels), ROWS)
        ]
    )[sound]
    order = torch.argsort(true, stable=True)
    lot = np.random.default_rng(0).permutation(len(sound))
    found = {
        "best": sound[order.flip(0)[:each]].tolist(),
        "worst": sound[order[:each]].tolist(),
        "random": sound[torch.from_numpy(lot[:each])].tolist(),
    }
    return {choice: found[choice] for choice in choices}


def _true(probabilities: Tensor, labels: Tensor) -> Tensor:
    """What the true class of each row got."""
    return probabilities.gather(1, labels[: len(probabilities), None]).flatten()


def _answers(saved: Saved, storage: Storage, ids: list[int], views: int) -> list[Answer]:
    names, found = saved.about.classes, []
    for sample, pixels in zip(ids, _pixels(storage, ids), strict=True):
        row, label = saved.rows(sample, sample + 1)[0], int(saved.labels[sample])
        shares, places = row.topk(min(ANSWERS, len(names)))
        guesses = tuple(
            Guess(names[place], share, place == label)
            for place, share in zip(places.tolist(), shares.tolist(), strict=True)
        )
        seen = pixels[BORDER:-BORDER, BORDER:-BORDER] if views == 1 else pixels
        found.append(Answer(small_jpeg(seen), sample, names[label], float(row[label]), guesses))
    return found


def _pixels(storage: Storage, ids: list[int]) -> list[Pixels]:
    """The pictures; grey where one was damaged since it was evaluated."""
    places = np.array(ids, np.int64)
    views, damages = storage.read(places, np.empty(storage.room(places), np.uint8))
    found = []
    for place, view in enumerate(views):
        try:
            if place in damages:
                raise Undecodable(str(damages[place]))
            found.append(pixels_of(view.data, storage.encoding))
        except Undecodable:
            found.append(np.full((256, 256, 3), 128, np.uint8))
    return found
