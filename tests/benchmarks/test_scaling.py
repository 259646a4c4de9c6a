"""The computed times of docs/scaling.md: their arithmetic, and that the page has what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import RECIPES, Figures, estimate, format_table
from cluster.config import PRESETS, load_settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_page_has_the_table_that_the_script_prints() -> None:
    assert format_table(Figures()) in PAGE.read_text(encoding="utf-8")


def test_eight_gpus_by_hand() -> None:
    """1,024 images a step, 128 a GPU; a ring sends 7/8 of the 243.9 MB twice."""
    row = estimate(8, Figures(rate=10_000.0, within=100e9, epochs=1.0))
    assert row.steps == round(1_281_167 / 1024)
    assert row.compute == pytest.approx(0.0128)
    assert row.reduce == pytest.approx(2 * 7 / 8 * 60_965_224 * 4 / 100e9)
    assert row.best == pytest.approx(row.steps * 0.0128)
    assert row.worst == pytest.approx(row.steps * (0.0128 + row.reduce))
    assert (row.limit, estimate(1, Figures()).reduce) == ("GPU", 0.0)


def test_where_decoding_is_slower_it_is_the_limit() -> None:
    slow = replace(Figures(), decoding=1000.0)
    assert (estimate(64, slow).limit, estimate(64, slow).compute) == ("decoding", 0.128)
    assert "(decoding)" in format_table(slow)


def test_batches_are_those_of_the_presets() -> None:
    for recipe, batch in RECIPES.values():
        name = recipe.partition(",")[0]
        preset = load_settings(PRESETS / f"{name}.toml")["batch_size"]
        assert preset == batch or "--rate-scaling" in recipe
