"""List of classes from the labels that a source stores, numbers or words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.dataset.samples import MAX_CLASSES
from pipeline.dataset.tar import escape
from pipeline.remote.filesystem import hide_credentials
from pipeline.sources.listing import Listing, ListingWriter
from pipeline.tools.errors import UsageError


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
    ) -> None:
        """Take the lists that stand beside the images.

        Args:
            source: path or address, for messages.
            names: class names that the source gives to its numbers; None or empty without any.
            classes: class list of the training split, if this is another split.
            titles: readable names of the numbers.
        """
        self._source = hide_credentials(source)
        self._given = None if classes is None else tuple(classes)
        self._own = bool(names)
        self._names = make_distinct(names) if names else self._given
        self._titles = titles
        self._number: str | None = None
        self._word: str | None = None
        """The first label of its kind, and its place."""
        self._last = -1

    def fits(self, label: int | str) -> bool:
        """Return whether a label is a number or a word as the first one was."""
        return (self._word if isinstance(label, int) else self._number) is None

    def find_class(self, label: int | str, where: str) -> str:
        """Return the class of a label, a number from 0 or a word.

        Raises:
            UsageError: there is no such class, or some labels are numbers and others words.
        """
        if isinstance(label, int):
            self._number = self._number or f"{label} ({where})"
        else:
            self._word = self._word or f"{escape(label)!r} ({where})"
        if self._number is not None and self._word is not None:
            raise UsageError(
                f"source {self._source} has labels that are numbers, such as {self._number}, and "
                f"words, such as {self._word}; make them of one kind"
            )
        if isinstance(label, str):
            return label
        if self._names is None:
            if label >= MAX_CLASSES:
                raise UsageError(
                    f"label {label} of {where} is beyond {MAX_CLASSES - 1:,}, the largest; "
                    "number the classes from 0"
                )
            self._last = max(self._last, label)
            return str(label)
        if label >= len(self._names):
            known = "the source names" if self._own else "the training source has"
            raise UsageError(
                f"label {label} of {where} is no class: {known} {len(self._names)}, "
                "counted from 0; mend the label"
            )
        return self._names[label]

    def finish(self, writer: ListingWriter, titles: Mapping[int, str] | None = None) -> Listing:
        """Return the listing, its classes in the order of their numbers, or else sorted.

        Args:
            writer: writer to which all images have been added.
            titles: readable names of numbers that stood beside images.

        Raises:
            UsageError: see `ListingWriter.finish`; no image has a label.
        """
        if not writer.images and writer.rejected:
            raise UsageError(
                f"source {self._source} has {writer.rejected:,} images, none of them usable "
                "(such as: no label); the test images of most sets have no labels"
            )
        if self._given is not None:
            return writer.finish(self._given)
        if self._names is not None:
            return writer.finish(self._names, self._titles)
        if self._word is not None:
            return writer.finish()
        found = [(titles or {}).get(number) for number in range(self._last + 1)]
        return writer.finish(
            [str(number) for number in range(self._last + 1)],
            [title for title in found if title] if found and all(found) else None,
        )
