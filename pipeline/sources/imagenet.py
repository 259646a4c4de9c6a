"""ILSVRC's side files: the class of each validation or test image, and readable names of classes.

ILSVRC's validation and test images are numbered, not sorted. Their classes come from one of

    ILSVRC2012_devkit_t12.tar.gz    the development kit, or the folder it unpacks to
    ILSVRC2010_devkit-1.0.tar.gz    that of 2010, which unpacks to devkit-1.0
    ILSVRC2010_test_ground_truth.txt    of the test images of 2010, beside that year's kit
    LOC_val_solution.csv            Kaggle's: `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...`
    *synset_labels.txt              a WordNet id a line, the first for image 1
    any other text file             `ILSVRC2012_val_00000001.JPEG n01751748` lines

In the kit, `data/meta.mat` numbers and names the synsets (ILSVRC2012_ID, ILSVRC2010_ID), and
`data/ILSVRC2012_validation_ground_truth.txt` has the number of image 1, 2, 3, ... The archive is
read in memory, not unpacked.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.dataset.tar import escape, read_members
from pipeline.sources.matlab import LIMIT, read_structs
from pipeline.sources.names import IMAGE_ENDINGS, is_class
from pipeline.tools.errors import UsageError

DEVKITS = ("ILSVRC2012_devkit_t12", "ILSVRC2010_devkit-1.0", "devkit-1.0")
"""Names of the kits' archives and of the folders that they unpack to; the last two are of 2010."""
PATCHES = "patch_images.tar"
"""Archive of 2010 with other versions of images that are blank or show a banner."""
BOXES = "ILSVRC2012_bbox"
SOLUTION = "LOC_val_solution.csv"
SYNSET_LABELS = "synset_labels.txt"
TITLES = ("LOC_synset_mapping.txt", "synset_words.txt", "classes.txt", "classes", "words.txt")

GIVE_LABELS = (
    "give --val-labels FILE (--test-labels for --test): ILSVRC2012_devkit_t12.tar.gz, "
    "ILSVRC2010_test_ground_truth.txt, LOC_val_solution.csv, or a list of WordNet ids"
)

META = "meta.mat"
VALIDATION = "ILSVRC2012_val"
"""Stem of the images that a list of WordNet ids alone is of."""
ARCHIVES = (".tar.gz", ".tgz", ".tar")
_WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(ILSVRC(20\d\d)_(val|test))_(\d{8})", re.IGNORECASE)
_TRUTH = re.compile(r"ILSVRC(20\d\d)_(validation|test)_ground_truth\.txt")
_ID = re.compile(r"ILSVRC(20\d\d)_ID")
_TITLE = re.compile(r"(n\d{8})[\s,:]+(\S.*)")


class Devkit(NamedTuple):
    """Content of a development kit."""

    year: str
    """2012 or 2010."""
    wnids: dict[int, str]
    """ILSVRC2012_ID or ILSVRC2010_ID -> WordNet id, of the classes with images of their own."""
    titles: dict[str, str]
    """WordNet id -> words."""
    truth: list[str]
    """The WordNet id of validation image 1, 2, 3, ...; empty if the kit lacks the list."""

    @property
    def truth_name(self) -> str:
        """Name of the file that `truth` is read from."""
        return f"ILSVRC{self.year}_validation_ground_truth.txt"

    def find_classes(self, name: str, text: bytes) -> list[str]:
        """Return the WordNet ids of the numbers in a ground truth, a line each.

        Raises:
            ValueError: a line is no number of a class; the message names the file.
        """
        try:
            return [self.wnids[int(line)] for line in text.strip().splitlines()]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name} says {error}, which is no ILSVRC{self.year}_ID") from error


def is_devkit(path: Path) -> bool:
    """Return whether this is an archive or a folder that may hold a kit."""
    if path.is_dir():
        return any((path / place / META).is_file() for place in ("", "data"))
    return path.name.endswith(ARCHIVES) and path.is_file()


def read_devkit(path: Path) -> Devkit:
    """Read a kit: the archive, the folder it unpacks to, or that folder's `data`.

    Raises:
        UsageError: no kit, or a damaged one.
    """
    try:
        files = _read_kit_files(path)
    except (OSError, EOFError, zlib.error) as error:
        raise _kit_error(path, getattr(error, "strerror", None) or str(error)) from error
    if META not in files:
        raise _kit_error(path, f"it holds no data/{META}")
    kit = _read_synsets(path, files[META])
    try:
        truth = kit.find_classes(kit.truth_name, files.get(kit.truth_name, b""))
    except ValueError as error:
        raise _kit_error(path, str(error)) from error
    return kit._replace(truth=truth)


def read_bounded(path: Path, packed: bool = False) -> bytes:
    """Return the bytes of a file, or those that a gzip file unpacks to, if they are few.

    Raises:
        UsageError: there are more than `LIMIT`.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    with gzip.open(path) if packed else path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        what = "unpacks to more" if packed else "is larger"
        raise _kit_error(path, f"it {what} than {LIMIT >> 20} MiB")
    return data


def _read_kit_files(path: Path) -> dict[str, bytes]:
    """Return the files of a kit by name, of a folder only those that are used."""
    if path.is_dir():
        folder = path if (path / META).is_file() else path / "data"
        used = (file for file in folder.glob("*") if file.name == META or is_truth_name(file.name))
        return {file.name: read_bounded(file) for file in used if file.is_file()}
    with path.open("rb") as archive:
        packed = archive.read(2) == b"\x1f\x8b"
    data = read_bounded(path, packed)
    found: dict[str, bytes] = {}
    for member in read_members(io.BytesIO(data), str(path)):
        if member.regular:
            name = member.name.rpartition("/")[2]
            found.setdefault(name, data[member.offset :][: member.size])
    return found


def _read_synsets(path: Path, meta: bytes) -> Devkit:
    """Return numbers and words of the synsets at the bottom, without the ground truth."""
    wnids: dict[int, str] = {}
    titles: dict[str, str] = {}
    try:
        synsets = read_structs(meta, "synsets")
        keys = next(iter(synsets), {})
        year = next((match[1] for key in keys if (match := _ID.fullmatch(key))), "2012")
        for synset in synsets:
            if synset["num_children"] != 0:
                continue
            number, wnid = synset[f"ILSVRC{year}_ID"], synset["WNID"]
            if not isinstance(number, float) or not isinstance(wnid, str) or not is_class(wnid):
                raise ValueError(f"synset {len(wnids) + 1} is {wnid!r}, number {number}")
            wnids[int(number)] = wnid
            titles[wnid] = escape(str(synset["words"] or wnid))
    except (ValueError, KeyError, OverflowError) as error:
        raise _kit_error(path, f"{META}: {escape(str(error))}") from error
    if not wnids:
        raise _kit_error(path, f"{META} names no synsets")
    return Devkit(year, wnids, titles, [])


def _kit_error(path: Path, what: str) -> UsageError:
    return UsageError(
        f"development kit {escape(str(path))} cannot be used ({what}); "
        "give its archive as it was downloaded, or the folder that it unpacks to"
    )


@dataclass(frozen=True)
class GroundTruth:
    """Classes of the validation or test images."""

    file: Path
    """File that lists them."""
    labels: dict[str, str]
    """Name of an image without its ending -> class."""
    classes: tuple[str, ...]
    """All classes, sorted."""
    titles: dict[str, str] = field(default_factory=dict)
    """Class -> readable name, of those that have one."""
    stem: str = ""
    """Name of images without their numbers, if the file has a line for every one of them."""


def strip_ending(name: str) -> str:
    """Return the name of an image without its folder and ending, as lists have it."""
    name = name.rpartition("/")[2]
    for ending in IMAGE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


class ImageNumber(NamedTuple):
    """Parts of the name of an image of ILSVRC that is numbered."""

    stem: str
    """Name without the number: `ILSVRC2012_val`."""
    year: str
    part: str
    """val or test."""
    number: int
    """Number of the image, from 1."""


def parse_image_name(name: str) -> ImageNumber | None:
    """Parse a name such as `val/ILSVRC2012_val_00000001.JPEG`; None for any other."""
    match = _NUMBERED.fullmatch(strip_ending(name))
    return match and ImageNumber(match[1], match[2], match[3].lower(), int(match[4]))


def _label_numbered(stem: str, classes: Iterable[str]) -> dict[str, str]:
    """Return the class of each numbered image, by its stem and number, in their order."""
    return {f"{stem}_{number:08d}": name for number, name in enumerate(classes, 1)}


def is_kit_name(name: str) -> bool:
    """Return whether a folder or tar of this name is ILSVRC's kit, boxes or patches, no class."""
    return name.startswith((*DEVKITS, BOXES, PATCHES))


def is_truth_name(name: str) -> bool:
    """Return whether a file of this name has the numbers of the classes of ILSVRC's images."""
    return _TRUTH.fullmatch(name) is not None


def is_list_name(name: str) -> bool:
    """Return whether a file of this name is one of the lists, which are not rejects."""
    is_list = name in (SOLUTION, *TITLES) or name.endswith(SYNSET_LABELS)
    return is_list or is_kit_name(name) or is_truth_name(name)


def read_ground_truth(path: Path, image: str = "") -> GroundTruth:
    """Read the labels of validation or test images from a file of any of these kinds.

    Args:
        path: one of the files above, or a folder that holds one.
        image: name of one of the images: of a folder that holds several, the labels of its year
            and part are read.

    Raises:
        UsageError: there is none, or it cannot be parsed.
    """
    if not path.exists():
        raise UsageError(f"labels {escape(str(path))} do not exist; {GIVE_LABELS}")
    if is_truth_name(path.name):
        return _read_numbers(path)
    numbered = parse_image_name(image)
    of_test = path.is_dir() and numbered is not None and numbered.part == "test"
    if is_devkit(path) and not of_test:
        kit = read_devkit(path)
        if not kit.truth:
            raise UsageError(f"labels {escape(str(path))} lack {kit.truth_name}; {GIVE_LABELS}")
        return _number_truth(path, kit, "val", kit.truth)
    if path.is_dir():
        found = next(_find_labels(path, image), None)
        if found is None:
            raise UsageError(f"folder {escape(str(path))} holds no labels; {GIVE_LABELS}")
        return read_ground_truth(found)
    return _read_list(path)


def _read_numbers(path: Path) -> GroundTruth:
    """Read a file of numbers, which mean something only together with the `meta.mat` of a kit."""
    match = _TRUTH.fullmatch(path.name)
    assert match is not None, path
    inside = (place for place in (path.parent, path.parent.parent) if is_devkit(place))
    found = next(inside, None) or next(_find_kits(path.parent, match[1]), None)
    if found is None:
        raise UsageError(
            f"labels {escape(str(path))} are numbers of classes, and no development kit lies "
            f"beside them to name these; put that of {match[1]} there"
        )
    kit = read_devkit(found)
    try:
        text = "\n".join(_read_lines(path)).encode()
        if kit.year != match[1]:
            raise ValueError(f"{found.name} is the kit of {kit.year}, not of {match[1]}")
        truth = kit.find_classes(path.name, text)
    except ValueError as error:
        raise UsageError(
            f"labels {escape(str(path))} cannot be used ({escape(str(error))}); give the file as "
            "it was downloaded"
        ) from error
    if not truth:
        raise UsageError(f"labels {escape(str(path))} are empty; {GIVE_LABELS}")
    return _number_truth(path, kit, "val" if match[2] == "validation" else "test", truth)


def _number_truth(file: Path, kit: Devkit, part: str, truth: list[str]) -> GroundTruth:
    stem, classes = f"ILSVRC{kit.year}_{part}", tuple(sorted(kit.wnids.values()))
    return GroundTruth(file, _label_numbered(stem, truth), classes, kit.titles, stem)


def find_ground_truth(source: Path, image: str = "") -> GroundTruth | None:
    """Return the labels that lie in or beside a source with such an image, or None."""
    for folder in list_folders(source):
        for path in _find_labels(folder, image):
            return read_ground_truth(path)
    return None


def find_titles(source: Path, classes: Sequence[str]) -> dict[str, str]:
    """Return readable names of `classes` (WordNet ids) from lists in or beside a source."""
    wanted = {name for name in classes if _WNID.fullmatch(name)}
    for folder in list_folders(source) if wanted else ():
        paths = [*_find_kits(folder), *(folder / name for name in TITLES)]
        for path in filter(Path.exists, paths):
            try:
                titles = read_devkit(path).titles if is_devkit(path) else _read_titles(path)
            except UsageError:
                continue  # a nicety, and perhaps a file that has nothing to do with us
            if wanted & titles.keys():
                return titles
    return {}


def list_folders(source: Path) -> Iterator[Path]:
    """Yield the folders in which lists about a source may lie, the nearest first."""
    source = source.absolute()
    if source.is_dir():
        yield source
    yield source.parent
    if source.parent.name == "CLS-LOC":  # Kaggle: ROOT/ILSVRC/Data/CLS-LOC/val
        yield from source.parent.parents[:3]


def _find_labels(folder: Path, image: str) -> Iterator[Path]:
    """Yield the files with labels of images such as `image`, of any validation images for ""."""
    numbered = parse_image_name(image)
    if numbered is not None and numbered.part == "test":
        name = f"ILSVRC{numbered.year}_test_ground_truth.txt"
        yield from filter(Path.is_file, (folder / name, folder / "data" / name))
        return
    yield from _find_kits(folder, numbered.year if numbered else "")
    if (folder / SOLUTION).is_file():
        yield folder / SOLUTION
    yield from sorted(folder.glob(f"*{SYNSET_LABELS}"))


def _find_kits(folder: Path, year: str = "") -> Iterator[Path]:
    """Yield the kits in a folder, of one year if it is given."""
    names = DEVKITS if not year else DEVKITS[:1] if year == "2012" else DEVKITS[1:]
    paths = (folder / f"{name}{ending}" for name in names for ending in (*ARCHIVES, ""))
    return filter(is_devkit, paths)


def _read_list(path: Path) -> GroundTruth:
    """Read Kaggle's solution, a list of WordNet ids, or one of names and WordNet ids."""
    lines = _read_lines(path)
    while lines and not lines[-1]:
        del lines[-1]
    if lines and lines[0].lower().startswith("imageid,"):
        del lines[0]
    if not lines:
        raise UsageError(f"labels {escape(str(path))} are empty; {GIVE_LABELS}")
    in_order = len(_split_words(lines[0])) == 1
    labels: dict[str, str] = {}
    for place, line in enumerate(lines):
        words = _split_words(line)
        if not in_order and len(words) == 1 and line.endswith(","):
            continue  # named without a class: the image will be missed, and rejected
        if not words or (len(words) == 1) != in_order or not is_class(words[not in_order]):
            raise UsageError(
                f"labels {escape(str(path))} have a line {line[:80]!r}, which names no "
                f"class; {GIVE_LABELS}"
            )
        name, class_name = (
            (f"{VALIDATION}_{place + 1:08d}", words[0])
            if in_order
            else (strip_ending(words[0]), words[1])
        )
        if labels.setdefault(name, class_name) != class_name:
            raise UsageError(
                f"labels {escape(str(path))} have two classes for {escape(name)}, "
                f"{labels[name]!r} and {class_name!r}; remove one"
            )
    return GroundTruth(path, labels, tuple(sorted(set(labels.values()))))


def read_class_numbers(path: Path) -> dict[str, int]:
    """Return the number of each class, from 1, as a submission has it.

    Args:
        path: a development kit, whose numbers are those of ILSVRC's server; or a text file with a
            class a line, number 1 first: its name, or a WordNet id and words.

    Raises:
        UsageError: it cannot be read, or has a class twice or none.
    """
    if not path.exists():
        raise UsageError(f"class list {escape(str(path))} does not exist; name a kit or a list")
    if is_devkit(path):
        return {wnid: number for number, wnid in read_devkit(path).wnids.items()}
    if path.is_dir():
        raise UsageError(f"folder {escape(str(path))} is no development kit; name a kit or a list")
    numbers: dict[str, int] = {}
    for number, line in enumerate("\n".join(_read_lines(path)).rstrip().splitlines(), 1):
        name = match[1] if (match := _TITLE.fullmatch(line)) else line
        if not name or numbers.setdefault(name, number) != number:
            why = f"has {escape(name)!r} twice" if name else f"has an empty line {number:,}"
            raise UsageError(f"class list {escape(str(path))} {why}; give a class a line")
    if not numbers:
        raise UsageError(f"class list {escape(str(path))} is empty; give a class a line")
    return numbers


def _split_words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def _read_titles(path: Path) -> dict[str, str]:
    matches = (_TITLE.fullmatch(line) for line in _read_lines(path))
    return {match[1]: escape(match[2]) for match in matches if match}


def _read_lines(path: Path) -> list[str]:
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"list {escape(str(path))} cannot be read ({error.strerror}); mend it"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"list {escape(str(path))} is no text; {GIVE_LABELS}") from error
    return [line.strip() for line in text.splitlines()]
