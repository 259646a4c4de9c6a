"""Numbers of the report, as a person writes them."""

from cluster.report.tables import duration, human_bytes, percent, plain


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
