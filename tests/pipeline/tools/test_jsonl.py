"""JSON lines: whole rows are read in order, any other line is told."""

from __future__ import annotations

import json

import pytest

from pipeline.tools.jsonl import parse_json, parse_rows, read_all_rows

OTHER = [b"\n", b"{\n", b"[1]\n", b"3\n", b"null\n", b'"\xff"\n', b"\0\0\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("line", OTHER, ids=lambda line: repr(line[:5]))
def test_a_line_that_is_no_object_is_told_and_the_others_are_read(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{}\n' + line + b'{"a": 2}')
    with path.open("rb") as file:
        assert list(parse_rows(file)) == [{"a": 1}, {}, None, {"a": 2}]
    rows = read_all_rows(path)
    assert [next(rows), next(rows)] == [{"a": 1}, {}]
    with pytest.raises(ValueError, match="line 3 is not a JSON object"):
        next(rows)


def test_all_rows_of_a_sound_file(tmp_path):
    rows = [{"name": "a\u2028\x85b\r", "place": place} for place in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert list(read_all_rows(path)) == rows
    with pytest.raises(OSError, match="rows"):
        next(read_all_rows(path.parent / "rows"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", b"\xff", "9" * 5000])
def test_json_that_is_none_is_one_kind_of_error_however_deep(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    assert list(parse_rows([text if isinstance(text, bytes) else text.encode()])) == [None]
