"""Columns of tables: numbers, and text as it is written."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.tools.errors import UsageError
from pipeline.tools.tables import read_table


def test_columns_of_numbers_are_numbers_and_others_stay_text_as_written(tmp_path):
    path = tmp_path / "table.csv"
    rows = [
        "key,name,count,share,code,site,patient,year,uid",
        "000000_00001,7,3,0.5,1_0,1.1,007,2001,10000000000000000000000",
        "000000_00002,8,-4,1e3,2_0,1.10,008,,10000000000000000000001",
    ]
    path.write_text("\n".join(rows) + "\n")
    table = read_table(path, texts=("share",))
    year = table.pop("year")
    assert year[0] == 2001
    assert np.isnan(year[1])
    assert {name: column.tolist() for name, column in table.items()} == {
        "key": ["000000_00001", "000000_00002"],
        "name": ["7", "8"],
        "count": [3, -4],
        "share": ["0.5", "1e3"],
        "code": ["1_0", "2_0"],
        "site": ["1.1", "1.10"],
        "patient": ["007", "008"],
        "uid": ["10000000000000000000000", "10000000000000000000001"],
    }
    assert read_table(path)["share"].tolist() == [0.5, 1000.0]
    lines = tmp_path / "table.jsonl"
    lines.write_text('{"year": 2001, "boxes": [1]}\n{"year": null, "boxes": [1, 2]}\n')
    with pytest.raises(UsageError, match=r"table.jsonl cannot be read"):
        read_table(lines)
    lines.write_text('{"year": 2001, "ok": true}\n{"year": null, "ok": false}\n')
    table = read_table(lines)
    assert np.isnan(table["year"][1])
    assert table["ok"].tolist() == [1, 0]
