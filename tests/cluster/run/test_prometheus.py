"""Metrics of a run at Ray's endpoint, and the dashboard that draws it."""

from __future__ import annotations

import json
import re

from cluster.run.exporters import GAUGES, TAGS
from tests.helpers.training_processes import REPOSITORY

DASHBOARD = json.loads((REPOSITORY / "examples" / "deploy" / "duet.json").read_text())
NAMES = {f"ray_{name}" for name, _ in GAUGES.values()}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it():
    asked = {name for expr in expressions() for name in re.findall(r"ray_duet_\w+", expr)}
    assert asked == NAMES
    for expr in expressions():
        chosen = re.findall(r"ray_duet_\w+\{([^}]*)\}", expr)
        assert len(chosen) == expr.count("ray_duet_"), expr
        for labels in chosen:  # every metric by the variables of the dashboard
            pairs = [re.fullmatch(r'(\w+)=~"\$(\w+)"', label) for label in labels.split(", ")]
            assert all(pair and pair[1] == pair[2] and pair[1] in TAGS for pair in pairs), labels
            assert 'run=~"$run"' in labels
        for labels in re.findall(r"by \(([^)]*)\)", expr):
            assert set(labels.split(", ")) <= set(TAGS)
    variables = {entry["name"]: entry for entry in DASHBOARD["templating"]["list"]}
    assert set(TAGS) <= set(variables)
    for tag in TAGS:
        assert re.fullmatch(rf"label_values\(ray_duet_step.*, {tag}\)", variables[tag]["query"])


def test_what_a_legend_names_is_left_by_the_sum():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            kept = re.findall(r"by \(([^)]*)\)", target["expr"])[0].split(", ")
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(kept)


def test_its_panels_lie_beside_each_other_within_the_grid():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
