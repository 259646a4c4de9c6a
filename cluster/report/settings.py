"""Settings of runs: beside the preset that a run began with, and beside each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ORIGIN_KEYS, RUN_KEY, Config, find_config, load_settings
from pipeline.dataset.record import SHA256_KEY
from pipeline.tools.errors import DuetError

NO_SETTINGS = {SHA256_KEY, RUN_KEY, *ORIGIN_KEYS}
"""Keys of RUN/config.toml that are no settings."""
NOT_SET = "not a setting then"
"""Text for a setting that a run of another version does not have."""
EXPECTED = re.compile(r"#\s+expected\s+(.*)")
MORE = re.compile(r"#\s{6,}(\S.*)")
"""Line of a preset's comment that continues the entry before it."""


@dataclass(frozen=True)
class SettingRow:
    """A setting with its values, as text, in the order of what is compared."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run beside those that it would have had without flags."""

    base: str
    """Preset or file that it is compared with; "" for the defaults."""
    changed: tuple[SettingRow, ...]
    """Settings whose value (first) is not that of the base (second)."""
    rest: tuple[SettingRow, ...]
    """All others, with one value."""
    expected: str = ""
    """Result that the preset's comment names."""
    note: str = ""
    """Reason for a comparison with the defaults; "" if it is with a preset or file."""


def describe_settings(config: Mapping[str, Any]) -> RunSettings:
    """Compare the content of RUN/config.toml with the preset or file that it names."""
    defaults, name, note, expected = Config().to_settings(), str(config.get("config", "")), "", ""
    base = dict(defaults)
    if not name:
        note = "The run does not say which CONFIG it began with"
    else:
        try:
            path = find_config(Path(name))
            base |= load_settings(path)
            expected = read_expected(path)
        except DuetError:
            name, note = "", f"{name}, with which the run began, cannot be read here"
    changed, rest = [], []
    for key, value in config.items():
        # The length in epochs is shown only where it decides.
        if key in NO_SETTINGS or (key == "epochs" and config.get("steps")):
            continue
        text, usual = format_setting(value), format_setting(base.get(key, defaults.get(key)))
        if key in base and text != usual:
            changed.append(SettingRow(key.replace("_", " "), (text, usual)))
        else:
            rest.append(SettingRow(key.replace("_", " "), (text,)))
    return RunSettings(Path(name).stem, tuple(changed), tuple(rest), expected, note)


def read_expected(path: Path) -> str:
    """Return what the comment of a preset says of the expected result; "" if nothing."""
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not found and (hit := EXPECTED.match(line)):
            found.append(hit[1])
        elif found:
            if not (hit := MORE.match(line)):
                break
            found.append(hit[1])
    return " ".join(found)


def list_differences(configs: Sequence[Mapping[str, Any]]) -> list[SettingRow]:
    """Return the settings in which runs differ, with the value of each."""
    tables = [{key: one[key] for key in one if key not in NO_SETTINGS} for one in configs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [
        SettingRow(
            name.replace("_", " "),
            tuple(format_setting(table[name]) if name in table else NOT_SET for table in tables),
        )
        for name in names
    ]
    return [row for row in rows if len(set(row.values)) > 1]


def format_setting(value: object) -> str:
    """Return a setting as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):  # a layer
        fields = (f"{key} {format_setting(one)}" for key, one in value.items() if key != "name")
        return f"{value.get('name')} ({', '.join(fields)})"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_setting, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else f"{value}"
