"""Numbers of the report, as a person writes them."""

import json
from pathlib import Path

from cluster.report.records import read_records
from cluster.report.settings import format_setting
from cluster.report.tables import make_run_tiles


def test_damage_is_a_tile_and_no_damage_is_none(tmp_path: Path) -> None:
    for run, counts in (("old", (None, None)), ("sound", (0, 0)), ("damaged", (2, 5))):
        (tmp_path / run).mkdir()
        rows = [
            {"position": 8 * step, "step": step, "replaced": count, "seconds": 1.0}
            for step, count in enumerate(counts, 1)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / run / "metrics.jsonl").write_text("".join(lines))
        shown = {tile.label: tile.value for tile in make_run_tiles(read_records(tmp_path / run))}
        assert shown.get("images replaced") == ("7" if run == "damaged" else None)


def test_settings_as_a_person_writes_them() -> None:
    assert [format_setting(value) for value in (True, 0.0005, [], ["A", "B"], None)] == [
        "yes",
        "0.0005",
        "none",
        "A, B",
        "none",
    ]
