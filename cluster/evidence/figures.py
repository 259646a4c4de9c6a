"""Items that are pictures: what the first layer learned, and answers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.evidence.claims import ANSWERS, KERNELS
from cluster.evidence.gather import Gathered, Run
from cluster.evidence.item import Item, Missing, Row, scale_of, word
from cluster.kernels import read_kernels
from cluster.report.answers import Answers, answers
from cluster.report.first_layer import FirstLayer, first_layer
from cluster.report.pictures import Unavailable
from cluster.report.scores import Split
from cluster.report.tables import probability
from cluster.run_folder import KERNELS as KERNEL_ROWS

OTHER_SEEDS = 3
"""Runs beside the first whose kernels are shown, too."""
MOST_PICTURES = 4
MOST_BYTES = 6_000_000
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Layer:
    """The first layer of a run."""

    name: str
    seed: int
    layer: FirstLayer


@dataclass(frozen=True)
class Picture:
    """A picture file inside the page."""

    uri: str
    name: str


def figures(gathered: Gathered, data: str | None, missing: list[Missing]) -> Iterator[Item]:
    """Yield the items there is something to show of; what lacks is added to `missing`."""
    yield from filter(None, (_kernels(gathered, missing), _answers(gathered, data, missing)))


def _kernels(gathered: Gathered, missing: list[Missing]) -> Item | None:
    item, layers = Item(KERNELS, kind="kernels"), []
    told = asked = 0
    for group in gathered.groups:
        for run in group.runs:
            try:
                layer = first_layer(run.found, read_kernels(run.path / KERNEL_ROWS))
            except Unavailable as error:
                missing.append(Missing(title=f"Kernels of {run.name}", command="", why=f"{error}"))
                continue
            layers.append(Layer(run.name, run.config.seed, layer))
            if not layer.strips:
                item.notes.append(f"{run.name} kept no kernels over time (kernels.jsonl).")
            for what, split in (
                ("kernels", layer.colour),
                ("what was learned", layer.change_colour),
                ("orientation of the kernels", layer.orientation),
            ):
                if split is not None:
                    item.rows.append(_apart(what, split, run, group.letter, scale_of(group)))
            if layer.colour is not None:
                asked, told = asked + 1, told + layer.colour.told
    if not layers:
        return None
    if asked:
        item.notes.insert(
            0,
            f"{told} of {asked} runs have columns that are further apart in the colourfulness of "
            f"their kernels than 95 % of random splits; by chance it would be one in 20. The paper "
            "judged by eye, after 90 passes over ImageNet.",
        )
    item.body = {"first": layers[0], "others": layers[1 : 1 + OTHER_SEEDS]}
    return item


def _apart(what: str, split: Split, run: Run, letter: str, scale: str) -> Row:
    hue = "" if what.startswith("orientation") else "colour of "
    certain = "as the paper says" if hue else "the columns differ"
    return Row(
        what=f"columns apart: {hue}{what}",
        group=letter,
        paper="told apart by eye" if hue else "no number",
        ours=f"{100 * split.apart:.0f} %",
        seeds=f"seed {run.config.seed}; random splits {100 * split.chance:.0f} %, 95 % of them "
        f"below {100 * split.chance_95:.0f} %",
        verdict=f"{certain if split.told else 'not beyond a random split'} "
        f"(p {probability(split.p)})",
        scale=scale,
    )


def _answers(gathered: Gathered, data: str | None, missing: list[Missing]) -> Item | None:
    reason = ""
    for group in gathered.groups:
        for run in group.runs:
            config = {"cache": run.config.cache, "cache_size": run.config.cache_size}
            try:
                found = answers(run.path, data, config)
            except Unavailable as error:
                reason = reason or str(error)
                continue
            return _answered(run, found, group.letter, scale_of(group))
    if gathered.runs:
        run = gathered.runs[0]
        command = (
            f"python -m cluster.evaluate {word(run.path)} --data {word(data or 'DATA')} --views 10 "
            f"--save-probabilities, then this page with --data {data or 'DATA'}"
        )
        missing.append(Missing(title=ANSWERS.title, command=command, why=reason.rstrip(".")))
    return None


def _answered(run: Run, found: Answers, letter: str, scale: str) -> Item:
    item = Item(ANSWERS, kind="answers", body=found)
    for title, pictures in found.groups:
        if title != "Drawn by lot":
            continue
        verdicts = [one.verdict for one in pictures]
        right, near = verdicts.count("right"), verdicts.count("in the top 5")
        item.rows.append(
            Row(
                what=f"of {len(verdicts)} pictures drawn by lot",
                group=letter,
                paper="eight pictures of its own choice",
                ours=f"{right} right, {near} wrong with the truth in the top 5, "
                f"{len(verdicts) - right - near} wrong",
                seeds=f"seed {run.config.seed}",
                verdict="to be looked at",
                scale=scale,
            )
        )
    return item


def pictures_in(folder: Path, names: Sequence[str] = ()) -> list[Picture]:
    """Pictures of a folder that fit into a page, by name; only `names` if some are given."""
    found = []
    for path in sorted(folder / name for name in names) if names else sorted(folder.glob("*")):
        kind = KINDS.get(path.suffix.lower())
        if kind and path.is_file() and path.stat().st_size <= MOST_BYTES:
            content = base64.b64encode(path.read_bytes()).decode()
            found.append(Picture(f"data:{kind};base64,{content}", path.stem.replace("_", " ")))
    return found[:MOST_PICTURES]
