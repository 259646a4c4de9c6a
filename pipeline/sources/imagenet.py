"""Lists beside a source: the class of each validation picture, and readable names of classes.

ILSVRC's validation pictures are numbered, not sorted. Their classes come from one of

    ILSVRC2012_devkit_t12.tar.gz    the development kit, or the folder it unpacks to
    LOC_val_solution.csv            Kaggle's: `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...`
    *synset_labels.txt              a WordNet id a line, the first for picture 1
    any other text file             `ILSVRC2012_val_00000001.JPEG n01751748` lines
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.sources.devkit import TRUTH, bounded, is_devkit, read_devkit
from pipeline.sources.listing import PICTURE_ENDINGS, shown
from pipeline.sources.names import is_class
from pipeline.tools.errors import UsageError

DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
SYNSET_LABELS = "synset_labels.txt"
TITLES = ("LOC_synset_mapping.txt", "synset_words.txt", "classes.txt", "classes", "words.txt")

GIVE_LABELS = (
    "give --val-labels FILE: ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, "
    "or a list of WordNet ids"
)

_WNID = re.compile(r"n\d{8}")
_TITLE = re.compile(r"(n\d{8})[\s,:]+(\S.*)")


@dataclass(frozen=True)
class GroundTruth:
    """Which picture is of which class."""

    file: Path
    """Where that is written."""
    labels: dict[str, str]
    """Name of a picture without its ending -> class."""
    classes: tuple[str, ...]
    """All classes, sorted."""
    titles: dict[str, str] = field(default_factory=dict)
    """Class -> readable name, of those that have one."""


def stem(name: str) -> str:
    """Return the name of a picture without its folder and ending, as lists have it."""
    name = name.rpartition("/")[2]
    for ending in PICTURE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def numbered(place: int) -> str:
    """Return the stem of ILSVRC's validation picture `place`, counted from 0."""
    return f"ILSVRC2012_val_{place + 1:08d}"


def is_kit(name: str) -> bool:
    """Whether a folder or a tar of this name is ILSVRC's kit, and no class."""
    return name.startswith(DEVKIT)


def is_list(name: str) -> bool:
    """Whether a file of this name is one of the lists, which are nothing to reject."""
    return is_kit(name) or name in (SOLUTION, *TITLES) or name.endswith(SYNSET_LABELS)


def read_ground_truth(path: Path) -> GroundTruth:
    """Read the labels of the validation pictures, whatever they are written in.

    Args:
        path: one of the files above, or a folder that holds one.

    Raises:
        UsageError: there is none, or it cannot be understood.
    """
    if not path.exists():
        raise UsageError(f"labels {shown(str(path))} do not exist; {GIVE_LABELS}")
    if path.name == TRUTH:  # numbers mean something only together with meta.mat
        path = path.parent
    if is_devkit(path):
        kit = read_devkit(path)
        if not kit.truth:
            raise UsageError(f"labels {shown(str(path))} lack {TRUTH}; {GIVE_LABELS}")
        labels = {numbered(place): wnid for place, wnid in enumerate(kit.truth)}
        return GroundTruth(path, labels, tuple(sorted(kit.wnids.values())), kit.titles)
    if path.is_dir():
        found = next(_candidates(path), None)
        if found is None:
            raise UsageError(f"folder {shown(str(path))} holds no labels; {GIVE_LABELS}")
        return read_ground_truth(found)
    return _read_list(path)


def find_ground_truth(source: Path) -> GroundTruth | None:
    """Return the labels that lie in or beside a source, or None."""
    for folder in beside(source):
        for path in _candidates(folder):
            return read_ground_truth(path)
    return None


def find_titles(source: Path, classes: Sequence[str]) -> dict[str, str]:
    """Return readable names of `classes` (WordNet ids) from lists in or beside a source."""
    wanted = {name for name in classes if _WNID.fullmatch(name)}
    for folder in beside(source) if wanted else ():
        paths = [*_kits(folder), *(folder / name for name in TITLES)]
        for path in filter(Path.exists, paths):
            try:
                titles = read_devkit(path).titles if is_devkit(path) else _titles(path)
            except UsageError:
                continue  # a nicety, and perhaps a file that has nothing to do with us
            if wanted & titles.keys():
                return titles
    return {}


def beside(source: Path) -> Iterator[Path]:
    """Yield the folders in which lists about a source may lie, the nearest first."""
    source = source.absolute()
    if source.is_dir():
        yield source
    yield source.parent
    if source.parent.name == "CLS-LOC":  # Kaggle: ROOT/ILSVRC/Data/CLS-LOC/val
        yield from source.parent.parents[:3]


def _candidates(folder: Path) -> Iterator[Path]:
    yield from _kits(folder)
    if (folder / SOLUTION).is_file():
        yield folder / SOLUTION
    yield from sorted(folder.glob(f"*{SYNSET_LABELS}"))


def _kits(folder: Path) -> Iterator[Path]:
    for ending in (".tar.gz", ".tgz", ".tar", ""):
        if is_devkit(path := folder / f"{DEVKIT}{ending}"):
            yield path


def _read_list(path: Path) -> GroundTruth:
    """Read Kaggle's solution, a list of WordNet ids, or one of names and WordNet ids."""
    lines = _lines(path)
    while lines and not lines[-1]:
        del lines[-1]
    if lines and lines[0].lower().startswith("imageid,"):
        del lines[0]
    if not lines:
        raise UsageError(f"labels {shown(str(path))} are empty; {GIVE_LABELS}")
    in_order = len(_words(lines[0])) == 1
    labels: dict[str, str] = {}
    for place, line in enumerate(lines):
        words = _words(line)
        if not in_order and len(words) == 1 and line.endswith(","):
            continue  # named without a class: the picture will be missed, and rejected
        if not words or (len(words) == 1) != in_order or not is_class(words[not in_order]):
            raise UsageError(
                f"labels {shown(str(path))} have a line {line[:80]!r}, which names no "
                f"class; {GIVE_LABELS}"
            )
        name, class_name = (numbered(place), words[0]) if in_order else (stem(words[0]), words[1])
        if labels.setdefault(name, class_name) != class_name:
            raise UsageError(
                f"labels {shown(str(path))} have two classes for {shown(name)}, "
                f"{labels[name]!r} and {class_name!r}; remove one"
            )
    return GroundTruth(path, labels, tuple(sorted(set(labels.values()))))


def _words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def _titles(path: Path) -> dict[str, str]:
    matches = (_TITLE.fullmatch(line) for line in _lines(path))
    return {match[1]: shown(match[2]) for match in matches if match}


def _lines(path: Path) -> list[str]:
    try:
        text = bounded(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"list {shown(str(path))} cannot be read ({error.strerror}); mend it"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"list {shown(str(path))} is no text; {GIVE_LABELS}") from error
    return [line.strip() for line in text.splitlines()]
