"""Reads struct arrays of MATLAB 5 files that nobody vouches for, as ILSVRC's `meta.mat` is."""

from __future__ import annotations

import io
import resource
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np

from pipeline.tools.processes import Crash, call_isolated

LIMIT = 64 << 20
"""Bytes that a kit, or a list of labels, may unpack to; the real one has a tenth of it."""
MAT_HEADER, MAT_COMPRESSED = 128, 15  # bytes before the first element; its type
MAT_SECONDS = 20
"""CPU seconds that reading `meta.mat` may take; the real one takes 0.2."""

Value = str | float | None
"""A text or a number; None for anything else."""


def read_structs(data: bytes, name: str) -> list[dict[str, Value]]:
    """Return the elements of a struct array in a MATLAB 5 file.

    SciPy's reader trusts what a file claims, and a damaged one may crash it: it runs in a process
    of its own, with `LIMIT` bytes of memory and `MAT_SECONDS` of CPU time.

    Args:
        data: content of the file.
        name: name of the variable.

    Returns:
        for each struct its fields that are texts or single numbers (others are None).

    Raises:
        ValueError: no such variable, or a damaged file; the message is one line.
    """
    import scipy.io  # noqa: F401 - once, here: the process that reads is a fork of this one

    try:
        found = call_isolated(_load_structs, data, name)
    except Crash as crash:
        raise ValueError(f"it is damaged: its reader crashed ({crash})") from crash
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _load_structs(data: bytes, name: str) -> list[dict[str, Value]] | str:
    """Limit this process, and return the structs of a file or the message of the error."""
    _limit_process(LIMIT, MAT_SECONDS)
    return _parse_structs(data, name)


def _parse_structs(data: bytes, name: str) -> list[dict[str, Value]] | str:
    from scipy.io import loadmat

    if _exceeds_limit(data):
        return f"it unpacks to more than {LIMIT >> 20} MiB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            variables = loadmat(
                io.BytesIO(data),
                variable_names=[name],
                squeeze_me=True,
                uint16_codec="utf-16-le" if data[126:128] == b"IM" else "utf-16-be",
            )
        structs = np.atleast_1d(variables.get(name, ())).ravel()
        fields = structs.dtype.names
        if not fields:
            return f"it holds no structs named {name}"
        return [dict(zip(fields, map(_plain_value, row), strict=True)) for row in structs.tolist()]
    except MemoryError:
        return f"it unpacks to more than {LIMIT >> 20} MiB"
    except Exception as error:  # SciPy's reader raises anything on damaged input
        return f"it is damaged, or of another version ({error!r})"


def _exceeds_limit(data: bytes) -> bool:
    """Unpack the compressed elements of a MATLAB 5 file as far as `LIMIT` bytes, and count.

    The limit of the process alone would not do: memory that its parent has freed is not counted.
    """
    order, at, room = "<" if data[126:128] == b"IM" else ">", MAT_HEADER, LIMIT
    while at + 8 <= len(data) and room >= 0:
        kind, size = struct.unpack_from(f"{order}II", data, at)
        unpacker, packed = zlib.decompressobj(), data[at + 8 : at + 8 + size]
        while kind == MAT_COMPRESSED and packed and room >= 0:
            try:
                room -= len(unpacker.decompress(packed, 1 << 20))
            except zlib.error:
                break  # damaged: the reader says so
            packed = unpacker.unconsumed_tail
        at += 8 + size
    return room < 0


def _limit_process(memory: int, seconds: int) -> None:
    """End this process after so many seconds of CPU time; let it take so many bytes more."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, most))


def _plain_value(value: object) -> Value:
    """Return a field that SciPy read as a text or a number; None for anything else."""
    if isinstance(value, str):
        return value
    return float(value) if isinstance(value, int | float) else None
