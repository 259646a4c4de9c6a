"""Reads an array of structs out of a MATLAB 5 file: just enough for ILSVRC's `meta.mat`.

SciPy's reader takes a damaged file for its word and crashes the process. This one reads texts and
numbers, is bounded, and raises `ValueError` for whatever is not as it should be.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import islice

_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHAR = 2, 4
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
"""Type of an element -> code of `struct`."""
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}

Value = str | float | None
Element = tuple[int, bytes]


def read_structs(data: bytes, name: str, limit: int) -> list[dict[str, Value]]:
    """Return the elements of a struct array.

    Args:
        data: of the file.
        name: of the variable.
        limit: bytes that a variable may unpack to.

    Returns:
        for each struct its fields that are texts or single numbers (others are None).

    Raises:
        ValueError: no such variable, or a damaged file; the message is one line.
    """
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                unpacked = zlib.decompressobj().decompress(body, limit + 1)
                if len(unpacked) > limit:
                    raise ValueError(f"it unpacks to more than {limit >> 20} MiB")
                kind, body = next(_elements(unpacked, order))
            if kind == _MATRIX and (found := _structs(body, name, order)) is not None:
                return found
    except (KeyError, IndexError, StopIteration, struct.error, zlib.error) as error:
        raise ValueError(f"it is damaged, or of another version ({error!r})") from error
    raise ValueError(f"it holds no structs named {name}")


def _structs(body: bytes, name: str, order: str) -> list[dict[str, Value]] | None:
    """Return the structs of a matrix, None if it is another variable."""
    parts = _elements(body, order)
    (_, flags), _, (_, found) = islice(parts, 3)
    if found != name.encode() or _class(flags, order) != _STRUCT:
        return None
    (length,) = struct.unpack(order + "i", next(parts)[1])
    text = next(parts)[1]
    if not 0 < length <= 64 or not 0 < len(text) <= 1 << 12:
        raise ValueError("its structs have no fields")
    starts = range(0, len(text), length)
    fields = [text[at : at + length].partition(b"\0")[0].decode("latin-1") for at in starts]
    result = []
    while first := next(parts, None):
        values = [first, *islice(parts, len(fields) - 1)]
        result.append(
            {field: _value(*one, order) for field, one in zip(fields, values, strict=True)}
        )
    return result


def _value(kind: int, body: bytes, order: str) -> Value:
    """Return the text or the number that a field is."""
    if kind != _MATRIX or not body:
        return None
    parts = list(islice(_elements(body, order), 4))
    if len(parts) < 4:
        return None
    stored, content = parts[3]
    if _class(parts[0][1], order) == _CHAR:
        encoding = _TEXTS[stored]
        if encoding == "utf-16":
            encoding += "-le" if order == "<" else "-be"
        return content.decode(encoding, "replace")
    if (code := _NUMBERS.get(stored)) and len(content) == struct.calcsize(code):
        return float(struct.unpack(order + code, content)[0])
    return None


def _class(flags: bytes, order: str) -> int:
    """Return what a matrix is, of its flags."""
    return int(struct.unpack_from(order + "I", flags)[0]) & 0xFF


def _elements(data: bytes, order: str) -> Iterator[Element]:
    """Yield type and content of the elements that follow each other in `data`."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:  # up to four bytes lie in the tag itself
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data) or (start == at + 4 and size > 4):
            raise ValueError("it is damaged: an element goes on after its end")
        yield kind, data[start : start + size]
        padding = 0 if kind == _COMPRESSED else -size % 8
        at = at + 8 if start == at + 4 else start + size + padding
