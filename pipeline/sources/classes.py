"""List of classes from the labels that a source stores, numbers or words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.dataset.samples import MAX_CLASSES, number_classes
from pipeline.dataset.tar import escape
from pipeline.sources.listing import Listing, ListingWriter
from pipeline.tools.errors import UsageError
from pipeline.tools.text import hide_credentials


def make_distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names with their number behind those that occur twice.

    ImageNet's list has a crane that is a bird (134) and one that is a machine (517).
    """
    counts = Counter(names)
    taken = {name for name, count in counts.items() if count == 1}
    result = []
    for number, name in enumerate(names):
        if counts[name] > 1 or not name.strip():
            name = f"{name} {number}".strip()
            while name in taken:
                name += "'"
            taken.add(name)
        result.append(name)
    return tuple(result)


class LabelMapper:
    """Turns stored labels into classes, and refuses labels that do not fit together."""

    def __init__(
        self,
        source: str,
        names: Sequence[str] | None,
        classes: Sequence[str] | None,
        titles: Sequence[str] | None = None,
        numbered: bool = False,
    ) -> None:
        """Take the lists that stand beside the images.

        Args:
            source: path or address, for messages.
            names: class names that the source gives to its numbers; None or empty without any.
            classes: class list of the training split, if this is another split.
            titles: readable names of the numbers.
            numbered: True if the training source numbers `classes` itself.
        """
        self._source = hide_credentials(source)
        self._given = None if classes is None else tuple(classes)
        self._own = make_distinct(names) if names else None
        self._titles = titles
        self._places: Mapping[int, int] | None = None
        """Number -> place in the training split's list; None if nobody can tell."""
        if self._given is not None and self._own is None:
            self._places = number_classes(self._given)
            if numbered and any(number != place for number, place in (self._places or {}).items()):
                self._places = None
        self._seen: dict[str, tuple[str, str]] = {}
        """The first "number" and the first "word" among the labels, and its place."""
        self._first, self._last = MAX_CLASSES, -1
        """Smallest and largest number."""

    def why_unfit(self, label: int | str) -> str | None:
        """Return why a label is no number or no word as the first one was; None if it is."""
        kind = "number" if isinstance(label, int) else "word"
        other = "word" if kind == "number" else "number"
        if other not in self._seen or _is_number(label):
            return None
        first, _ = self._seen[other]
        return f"no label: {label!r} is a {kind}, but others are {other}s, as {first}"

    def find_class(self, label: int | str, where: str) -> str:
        """Return the class of a label, a number from 0 or a word.

        Raises:
            UsageError: there is no such class, or some labels are numbers and others words, or a
                number may mean one class by its name and another by its place.
        """
        if isinstance(label, int):
            self._seen.setdefault("number", (str(label), where))
        elif not _is_number(label):
            self._seen.setdefault("word", (repr(escape(label)), where))
        if len(self._seen) > 1:
            (number, there), (word, place) = self._seen["number"], self._seen["word"]
            raise UsageError(
                f"source {self._source} has labels that are numbers, such as {number} ({there}), "
                f"and words, such as {word} ({place}); make them of one kind"
            )
        if isinstance(label, int) or (_is_number(label) and self._given is None):
            self._first, self._last = min(self._first, int(label)), max(self._last, int(label))
        if isinstance(label, str):
            return label
        if self._own is not None:
            if label < len(self._own):
                return self._own[label]
            raise self._unknown(label, where, f"the source names {len(self._own)}, counted from 0")
        if self._given is not None:
            return self._find_given(label, where, self._given)
        if label >= MAX_CLASSES:
            raise self._too_large(label, where)
        return str(label)

    def _find_given(self, label: int, where: str, given: Sequence[str]) -> str:
        if self._places is None:
            raise UsageError(
                f"label {label} of {where} may be a place in the classes of the training source, "
                f"{_name_some(given)}, or one of these names; store the names themselves as "
                "labels (a column of text), or put a classes.txt beside the shards: a class a "
                "line, number 0 first"
            )
        if label in self._places:
            return given[self._places[label]]
        by_name = any(number != place for number, place in self._places.items())
        counted = f"named {_name_some(given)}, as its numbers are" if by_name else "counted from 0"
        raise self._unknown(label, where, f"the training source has {len(given)}, {counted}")

    def _too_large(self, label: int, where: str) -> UsageError:
        return UsageError(
            f"label {label} of {where} is beyond {MAX_CLASSES - 1:,}, the largest; "
            "number the classes from 0"
        )

    def _unknown(self, label: int, where: str, known: str) -> UsageError:
        return UsageError(f"label {label} of {where} is no class: {known}; mend the label")

    def finish(self, writer: ListingWriter, titles: Mapping[int, str] | None = None) -> Listing:
        """Return the listing, its classes in the order of their numbers, or else sorted.

        Args:
            writer: writer to which all images have been added.
            titles: readable names of numbers that stood beside images.

        Raises:
            UsageError: see `ListingWriter.finish`; no image has a label, or none has number 0.
        """
        if not writer.images:
            writer.faults.refuse()
        if not writer.images and writer.rejected:
            why = writer.summarize_rejects()
            hint = "; the test images of most sets have no labels"
            raise UsageError(
                f"source {self._source} has {writer.rejected:,} images, none of them usable; most "
                f"often: {why}{hint if 'no label (' in why else ''}"
            )
        if self._given is not None:
            return writer.finish(self._given)
        if self._own is not None:
            return replace(writer.finish(self._own, self._titles), numbered=True)
        if "number" not in self._seen:
            return writer.finish()
        if self._first > 0:
            raise UsageError(
                f"labels of source {self._source} run from {self._first} to {self._last}, and "
                f"Duet counts from 0; subtract {self._first} from each, or store names as labels"
            )
        if self._last >= MAX_CLASSES:
            raise self._too_large(self._last, "an image")
        found = [(titles or {}).get(number) for number in range(self._last + 1)]
        listing = writer.finish(
            [str(number) for number in range(self._last + 1)],
            [title for title in found if title] if found and all(found) else None,
        )
        return replace(listing, numbered=True)


def _is_number(label: int | str) -> bool:
    """Return whether a text is a number as `str` writes it: it is class "3" then, as 3 is."""
    return isinstance(label, str) and re.fullmatch("0|[1-9][0-9]{0,8}", label) is not None


def _name_some(names: Sequence[str]) -> str:
    shown = [repr(name) for name in (*names[:3], *names[3:][-1:])]
    return ", ".join([*shown[:3], *(["..."] if len(names) > 4 else []), *shown[3:]])
