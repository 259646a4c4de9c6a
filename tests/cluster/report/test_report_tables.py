"""Numbers of the report, as a person writes them."""

import json
from pathlib import Path

from cluster.report.records import read_records
from cluster.report.tables import duration, human_bytes, percent, plain, run_tiles


def test_damage_is_a_tile_and_no_damage_is_none(tmp_path: Path) -> None:
    for run, counts in (("old", (None, None)), ("sound", (0, 0)), ("damaged", (2, 5))):
        (tmp_path / run).mkdir()
        rows = [
            {"position": 8 * step, "step": step, "replaced": count, "seconds": 1.0}
            for step, count in enumerate(counts, 1)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / run / "metrics.jsonl").write_text("".join(lines))
        shown = {tile.label: tile.value for tile in run_tiles(read_records(tmp_path / run))}
        assert shown.get("damaged images left out") == ("7" if run == "damaged" else None)


def test_numbers_as_a_person_writes_them() -> None:
    assert [percent(share) for share in (0.407, 0.0, 1.0, None, float("nan"))] == [
        "40.7",
        "0.0",
        "100.0",
        "–",
        "–",
    ]
    assert [human_bytes(size) for size in (999, 17_472, 243_860_896, 2.5e9)] == [
        "999 bytes",
        "17.5 kB",
        "244 MB",
        "2.5 GB",
    ]
    assert [duration(seconds) for seconds in (59.4, 150, 9000, 500_000)] == [
        ("59", "s"),
        ("2.5", "min"),
        ("2.5", "h"),
        ("5.79", "days"),
    ]
    assert [plain(value) for value in (True, 0.0005, [], ["A", "B"], None)] == [
        "yes",
        "0.0005",
        "none",
        "A, B",
        "none",
    ]
