from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from pipeline.sources import matlab
from pipeline.sources.matlab import LIMIT, read_structs
from pipeline.tools.processes import Crash, call_isolated


def saved(rows: list[tuple], compressed: bool) -> bytes:
    """A file with the rows as structs, after two other variables, as SciPy writes it."""
    fields = [(name, object) for name in ("id", "text", "list")]
    structs = np.zeros((len(rows), 1), fields)
    for place, row in enumerate(rows):
        structs[place, 0] = row
    file = io.BytesIO()
    variables = {"first": np.arange(9), "cells": np.array([["x", 2]], object), "found": structs}
    savemat(file, variables, do_compression=compressed)
    return file.getvalue()


numbers = st.one_of(
    st.floats(allow_nan=False),
    *(
        st.integers(np.iinfo(kind).min, np.iinfo(kind).max).map(kind)
        for kind in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
    ),
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
rows = st.lists(st.tuples(numbers, texts, st.just(np.arange(3))), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(rows, st.booleans())
def test_reads_what_scipy_writes(found, compressed):
    # In this process: SciPy's own files do not crash its reader, and a process each takes longer.
    assert matlab._parse_structs(saved(found, compressed), "found") == [
        {"id": float(number), "text": text, "list": None} for number, text, _ in found
    ]


def packed(order: str, kind: int, body: bytes) -> bytes:
    if 0 < len(body) <= 4:
        return struct.pack(order + "I", len(body) << 16 | kind) + body.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(body)) + body + bytes(-len(body) % 8)


def matrix(order: str, kind: int, dims: tuple[int, int], name: bytes, *parts: bytes) -> bytes:
    return packed(
        order,
        14,
        packed(order, 6, struct.pack(order + "II", kind, 0))
        + packed(order, 5, struct.pack(order + "ii", *dims))
        + packed(order, 1, name)
        + b"".join(parts),
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_reads_what_matlab_writes(order):
    """MATLAB stores texts as 16-bit units, and numbers in the smallest type that holds them."""
    encoding = {"<": "utf-16-le", ">": "utf-16-be"}[order]
    wnid, words = (text.encode(encoding) for text in ("n01440764", "tench, Tinca tincà"))
    name = b"found"
    values = [
        matrix(order, 6, (1, 1), b"", packed(order, 4, struct.pack(order + "H", 1000))),
        matrix(order, 4, (1, len(wnid) // 2), b"", packed(order, 4, wnid)),
        matrix(order, 4, (1, len(words) // 2), b"", packed(order, 4, words)),
        matrix(order, 6, (0, 0), b"", packed(order, 2, b"")),
    ]
    fields = b"".join(field.ljust(15, b"\0") for field in (b"id", b"WNID", b"words", b"children"))
    body = matrix(
        order,
        2,
        (1, 1),
        name,
        packed(order, 5, struct.pack(order + "i", 15)),
        packed(order, 1, fields),
        *values,
    )
    mark = {"<": b"\x00\x01IM", ">": b"\x01\x00MI"}[order]
    data = b"MATLAB 5.0 MAT-file".ljust(124) + mark + body
    oracle = loadmat(io.BytesIO(data), squeeze_me=True)["found"]
    assert (int(oracle["id"]), str(oracle["WNID"])) == (1000, "n01440764")
    assert read_structs(data, "found") == [
        {"id": 1000.0, "WNID": "n01440764", "words": "tench, Tinca tincà", "children": None}
    ]


def test_a_variable_that_is_missing_or_too_large_raises():
    data = saved([(1, "a", 0)], True)
    with pytest.raises(ValueError, match="holds no structs named other"):
        read_structs(data, "other")
    with pytest.raises(ValueError, match="holds no structs named cells"):
        read_structs(data, "cells")
    with pytest.raises(ValueError, match="damaged, or of another version"):
        read_structs(b"", "found")
    large = saved([(1, "a", np.zeros(LIMIT + 1, np.uint8))], True)
    assert len(large) < 1 << 20
    with pytest.raises(ValueError, match="unpacks to more than 64 MiB"):
        read_structs(large, "found")


def test_a_reader_that_crashes_or_hangs_costs_only_its_process(monkeypatch):
    data = saved([(1, "a", 0)], True)
    monkeypatch.setattr("scipy.io.loadmat", lambda *_, **__: os.abort())
    with pytest.raises(ValueError, match=r"its reader crashed \(SIGABRT\)"):
        read_structs(data, "found")
    monkeypatch.setattr(matlab, "MAT_SECONDS", 1)
    monkeypatch.setattr("scipy.io.loadmat", lambda *_, **__: sum(iter(int, 1)))
    with pytest.raises(ValueError, match=r"its reader crashed \(SIGXCPU\)"):
        read_structs(data, "found")


def read_alone(data: bytes) -> list | str:
    try:
        return read_structs(data, "found")
    except ValueError as error:
        return str(error)


changes = st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=5)
damages = st.tuples(changes, st.integers(130, 1500))


@settings(max_examples=20, deadline=None)
@example([([(1500, 57)], 904)])
@example([([(0, 0), (136, 0), (503, 254), (0, 26), (1381, 47)], 927)])  # structs without fields
@given(st.lists(damages, min_size=25, max_size=25))
def test_damage_ends_in_an_error_or_in_structs(damages):
    """500 files: 25 share a process, which costs more than reading; if it crashes, each has one."""
    whole = saved([(1, "a text", 0), (2, "b", 0)], False)
    files = []
    for changes, stop in damages:
        data = bytearray(whole)
        for at, value in changes:
            data[at % len(data)] = value
        files.append(bytes(data[:stop]))
    try:
        results = call_isolated(lambda: [matlab._load_structs(data, "found") for data in files])
    except Crash:
        results = [read_alone(data) for data in files]
    # The format has no checksum: a damaged count may be larger, but each struct takes some bytes.
    for (_, stop), found in zip(damages, results, strict=True):
        assert isinstance(found, str) or len(found) <= stop // 8
