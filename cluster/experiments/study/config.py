"""Study file: the settings all runs share, what varies, what is measured, and the claim.

title, claim, paper, source     texts; `paper` is the number that the paper has
base        config file, beside the study file
seeds       seeds of the runs; weights, order and augmentation all follow from them
measure     see `Measure`; `window` and `goal`, an error or a falling list of them: for `pictures`
plot        see `Plot`
sizes       networks in an ensemble, for `nets`
[settings]  settings of cluster.config for all runs, over the base
[grid]      one setting and its values; each variant is made with the best one, see `StudyMaker`
[data.NAME] a part of DATA, see `DataSubset`; the first one is what all runs train on
[variants.NAME]  settings that differ; and `data`, `after`, `hidden`, see `Variant`
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.config import (
    PRESETS,
    TYPES,
    Config,
    find_config,
    is_of_type,
    load_settings,
    suggest_setting,
)
from pipeline.tools.errors import UsageError

Measure = Literal["pictures", "error", "gap", "nets"]
"""pictures: images seen until the training error reaches a goal; error: error on the validation
images after the last step; gap: that less the error on the training images, both of the whole
network and the center view; nets: error of averages of as many networks as `sizes` says."""
Plot = Literal["train", "val", "both", "nets"]
"""Training curves, validation curves, or both side by side; or errors by number of networks."""
WHOLE = ""
"""Name of DATA as a whole."""
KINDS: dict[str, Any] = {
    **dict.fromkeys(("title", "claim", "paper", "source", "base"), str),
    "measure": Measure,
    "plot": Plot,
    "window": float,
}
"""Types of the keys that hold one value."""


@dataclass(frozen=True, kw_only=True)
class DataSubset:
    """A part of DATA that becomes a data set of its own."""

    classes: tuple[float, float] = (0.0, 1.0)
    """Start and end in the list of classes, as fractions of it: [0, 0.5] is the first half."""
    per_class: int = 0
    """Number of training images a class, the first in stored (shuffled) order; 0: all."""
    val_per_class: int = 0
    """Number of validation images a class, chosen likewise; 0: all."""
    encoding: Literal["jpeg", "raw"] = "jpeg"
    """Encoding of the images, see pipeline.build_shards; raw pixels need no decoding."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings that are compared with those of the other variants."""

    name: str
    settings: dict[str, Any]
    """Settings that differ from the study's."""
    data: str
    """Name of a data subset, or `WHOLE`."""
    after: str = ""
    """Variant whose run of the same seed this one starts from (its `init` setting)."""
    hidden: bool = False
    """True leaves it out of the comparison: it exists for others to start from."""
    values: tuple[Any, ...] = (None,)
    """Values of the grid's setting, those of [grid] by default; (None,) without a grid."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of a study file, checked."""

    name: str
    """Name of the file, without .toml."""
    title: str
    claim: str
    paper: str
    source: str
    base: Path
    seeds: tuple[int, ...]
    measure: Measure
    plot: Plot
    goals: tuple[float, ...] = (0.25,)
    """Training errors, falling; a run ends at the last one."""
    window: int = 0
    """Number of images that the training error is a mean over; 0: one pass over them."""
    sizes: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    grid: tuple[str, tuple[Any, ...]] = ("lr", ())
    """A setting and its values; no values: no grid."""
    subsets: dict[str, DataSubset] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    @property
    def shown(self) -> tuple[Variant, ...]:
        """The variants that are compared."""
        return tuple(one for one in self.variants if not one.hidden)

    def make_config(self, variant: Variant, seed: int, value: Any = None, init: str = "") -> Config:
        """Return the settings of a run.

        Args:
            variant: variant of the run.
            seed: seed of the run.
            value: value of the grid's setting; None where there is no grid.
            init: run to start from; "": from random weights.

        Raises:
            UsageError: they cannot work together.
        """
        table = load_settings(self.base) | self.settings | variant.settings | {"seed": seed}
        if value is not None:
            table[self.grid[0]] = value
        if init:
            table["init"] = init
        try:
            return Config.from_settings(table)
        except ValueError as error:
            raise UsageError(f"study {self.name}, variant {variant.name}: {error}") from error


def read_study(path: Path) -> Study:
    """Read a study file, or the one of that name in cluster/config/presets/studies.

    Raises:
        UsageError: names the file, the key, and what it should be.
    """
    path = find_config(path, PRESETS / "studies")
    table = _read_table(path)
    try:
        study = _parse_study(path.stem, table)
    except ValueError as error:
        raise UsageError(f"study {path}: {error}") from error
    for variant in study.variants:  # an impossible one is refused before the others take hours
        for value in variant.values:
            study.make_config(variant, study.seeds[0], value, "run" if variant.after else "")
    return study


def _read_table(path: Path, depth: int = 0) -> dict[str, Any]:
    """Read a file over the one that it is `like`; `base` becomes a path from here."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(
            f"study {path} cannot be read ({reason}); see cluster/config/presets/studies"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"study {path} is not TOML: {error}") from error
    if isinstance(table.get("base"), str):
        table["base"] = str(path.parent / table["base"])
    other = table.pop("like", None)
    if other is None:
        return table
    if not isinstance(other, str) or depth > 8:
        raise UsageError(
            f"study {path}: like is {other!r}; it takes the name of another study file"
        )
    before = _read_table(path.parent / other, depth + 1)
    settings = [one.get("settings", {}) for one in (before, table)]
    if all(isinstance(one, dict) for one in settings):
        table["settings"] = settings[0] | settings[1]
    return before | table


def _parse_study(name: str, table: dict[str, Any]) -> Study:
    """Check the table of a file key by key; a ValueError names the first that cannot be used."""
    known = ({one.name for one in fields(Study)} | {"data", "goal"}) - {"name", "subsets", "goals"}
    if unknown := table.keys() - known:
        raise ValueError(f"no key {min(unknown)!r}; there are {', '.join(sorted(known))}")
    table = {"goal": 0.25, "window": 0} | table
    for key, kind in KINDS.items():
        if not is_of_type(value := table.get(key), kind) or value == "":
            words = ", ".join(get_args(kind)) or ("text" if kind is str else "a number")
            raise ValueError(f"{key} is {value!r}; it takes {words}")
    for key in ("settings", "grid", "data", "variants"):
        found = table.setdefault(key, {})
        is_flat = key in ("settings", "grid")
        if not isinstance(found, dict) or not (
            is_flat or all(isinstance(one, dict) for one in found.values())
        ):
            raise ValueError(f"{key} is no table; see cluster/config/presets/studies")
    subsets = {name: _parse_subset(name, one) for name, one in table.pop("data").items()}
    grid = _parse_grid(table["grid"])
    goals = _parse_goals(table.pop("goal"))
    study = Study(
        **table
        | {
            "name": name,
            "base": Path(table["base"]),
            "goals": goals,
            "seeds": _parse_numbers(table, "seeds"),
            "sizes": _parse_numbers(table, "sizes") if table["measure"] == "nets" else (),
            "window": _parse_window(table["window"]),
            "settings": _parse_settings("settings", table["settings"]),
            "grid": grid,
            "subsets": subsets,
            "variants": _parse_variants(table["variants"], subsets, grid),
        }
    )
    _check_study(study)
    return study


def _check_study(study: Study) -> None:
    if not study.shown:
        raise ValueError("no [variants.NAME] to compare")
    if study.measure == "nets":
        if not 1 <= min(study.sizes) <= max(study.sizes) <= len(study.seeds):
            raise ValueError(f"sizes is {list(study.sizes)}; there are {len(study.seeds)} seeds")
        if len(study.shown) > 1:
            raise ValueError("nets averages the seeds of one variant; there are more")


def _parse_variants(
    tables: Mapping[str, Any], subsets: Collection[str], grid: tuple[str, tuple[Any, ...]]
) -> tuple[Variant, ...]:
    found: dict[str, Variant] = {}
    for name, table in tables.items():
        data = table.get("data", next(iter(subsets), WHOLE))
        if data not in (*subsets, WHOLE):
            raise ValueError(f"variant {name}: no [data.{data}]")
        after = table.get("after", "")
        if after and after not in list(found):
            raise ValueError(f"variant {name}: after {after!r} is no variant above it")
        values = table.get("values", list(grid[1]))
        if not isinstance(values, list) or (values and not grid[1]):
            raise ValueError(
                f"values is {values!r}; it takes a list, for the setting that [grid] names"
            )
        reserved = ("data", "after", "hidden", "values")
        own = {key: one for key, one in table.items() if key not in reserved}
        found[name] = Variant(
            name=name,
            settings=_parse_settings(f"variants.{name}", own),
            data=data,
            after=after,
            hidden=bool(table.get("hidden", False)),
            values=_parse_values(grid[0], values) or (None,),
        )
    return tuple(found.values())


def _parse_settings(where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in table.items():
        if key not in TYPES:
            raise ValueError(
                f"[{where}] has {key!r}, which is no setting of cluster.train; "
                + suggest_setting(key)
            )
        if not is_of_type(value, TYPES[key]):
            raise ValueError(f"[{where}] {key} is {value!r}, which that setting does not take")
    return {key: tuple(one) if isinstance(one, list) else one for key, one in table.items()}


def _parse_values(key: str, values: Sequence[Any]) -> tuple[Any, ...]:
    found = tuple(_parse_settings("grid", {key: value})[key] for value in values)
    if any(value in found[:index] for index, value in enumerate(found)):
        raise ValueError(f"[grid] {key} is {list(values)!r:.200}; give each value once")
    return found


def _parse_grid(table: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    if not table:
        return "lr", ()
    if len(table) > 1:
        raise ValueError(f"[grid] has {', '.join(table)}; give one setting")
    ((key, values),) = table.items()
    if key == "seed":
        raise ValueError("[grid] has seed; give seeds, which no grid chooses from")
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"[grid] {key} is {values!r}; it takes a list of two values or more")
    return key, _parse_values(key, values)


def _parse_subset(name: str, table: dict[str, Any]) -> DataSubset:
    known = {one.name for one in fields(DataSubset)}
    if unknown := table.keys() - known:
        raise ValueError(
            f"[data.{name}] has {min(unknown)!r}; there are {', '.join(sorted(known))}"
        )
    classes = table.get("classes", [0.0, 1.0])
    numbers = isinstance(classes, list) and all(isinstance(x, int | float) for x in classes)
    if not numbers or len(classes) != 2 or not 0 <= classes[0] < classes[1] <= 1:
        raise ValueError(f"[data.{name}] classes is {classes!r}; it takes two shares, as [0, 0.5]")
    for key in ("per_class", "val_per_class"):
        if type(count := table.get(key, 0)) is not int or count < 0:
            raise ValueError(
                f"[data.{name}] {key} is {count!r}; it takes a whole number, 0 for all"
            )
    if table.get("encoding", "jpeg") not in ("jpeg", "raw"):
        raise ValueError(f"[data.{name}] encoding is {table['encoding']!r}; it takes jpeg or raw")
    return DataSubset(**table | {"classes": (float(classes[0]), float(classes[1]))})


def _parse_goals(value: object) -> tuple[float, ...]:
    goals: list[Any] = value if isinstance(value, list) else [value]
    if not goals or not all(is_of_type(one, float) and 0 < one < 1 for one in goals):
        raise ValueError(f"goal is {value!r}; it takes errors above 0 and below 1")
    if any(one <= after for one, after in pairwise(goals)):
        raise ValueError(f"goal is {value!r}; each must be below the one before it")
    return tuple(map(float, goals))


def _parse_window(value: float) -> int:
    if not 0 <= value < math.inf or value != int(value):
        raise ValueError(f"window is {value!r:.40}; it takes a number of images, 0 for one pass")
    return int(value)


def _parse_numbers(table: Mapping[str, Any], key: str) -> tuple[int, ...]:
    found = table.get(key)
    if not isinstance(found, list) or not found or not all(type(one) is int for one in found):
        raise ValueError(f"{key} is {found!r}; it takes a list of whole numbers")
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"{key} is {found!r}; each must be there once, and not below 0")
    return tuple(found)
