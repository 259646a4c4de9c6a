"""Study file: the settings all runs share, what varies, what is measured, and the claim.

title, claim, paper, source     texts; `paper` is the number that the paper has
base        config file, beside the study file
seeds       seeds of the runs; weights, order and augmentation all follow from them
measure     see `Measure`; `goal`, `window`: for `pictures`
plot        see `Plot`
sizes       networks in an ensemble, for `nets`
[settings]  settings of cluster.config for all runs, over the base
[grid]      one setting and its values; each variant is made with the best one, see `StudyMaker`
[data.NAME] a part of DATA, see `DataSubset`; the first one is what all runs train on
[variants.NAME]  settings that differ; and `data`, `after`, `hidden`, see `Variant`
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.config import PRESETS, TYPES, Config, find_config, is_of_type, load_settings
from pipeline.tools.errors import UsageError

Measure = Literal["pictures", "error", "gap", "nets"]
"""pictures: images seen until the training error reaches `goal`; error: error on the validation
images after the last step; gap: that less the error on the training images, both of the whole
network and the centre view; nets: error of averages of as many networks as `sizes` says."""
Plot = Literal["train", "val", "both", "nets"]
"""Training curves, validation curves, or both side by side; or errors by number of networks."""
RESERVED = ("data", "after", "hidden", "values")
DEPTH = 8
"""Longest chain of files that refer to another by `like`."""
WHOLE = ""
"""Name of DATA as a whole."""


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
    """Whether it is left out of the comparison, because it exists for others to start from."""
    values: tuple[Any, ...] = ()
    """Values of the grid's setting; those of [grid] by default."""


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
    goal: float = 0.25
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

    def config(self, variant: Variant, seed: int, value: Any = None, init: str = "") -> Config:
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
    """Read a study file, or the one of that name in cluster/configs/studies.

    Raises:
        UsageError: names the file, the key, and what it should be.
    """
    path = find_config(path, PRESETS / "studies")
    study = _StudyReader(path, _read_table(path)).read()
    for variant in study.variants:  # an impossible one is refused before the others take hours
        for value in variant.values or (None,):
            study.config(variant, study.seeds[0], value, "run" if variant.after else "")
    return study


def _read_table(path: Path, depth: int = 0) -> dict[str, Any]:
    """Read a file over the one that it is `like`; `base` becomes a path from here."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(
            f"study {path} cannot be read ({reason}); see cluster/configs/studies"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"study {path} is not TOML: {error}") from error
    if isinstance(table.get("base"), str):
        table["base"] = str(path.parent / table["base"])
    other = table.pop("like", None)
    if other is None:
        return table
    if not isinstance(other, str) or depth > DEPTH:
        raise UsageError(
            f"study {path}: like is {other!r}; it takes the name of another study file"
        )
    before = _read_table(path.parent / other, depth + 1)
    settings = [one.get("settings", {}) for one in (before, table)]
    if all(isinstance(one, dict) for one in settings):
        table["settings"] = settings[0] | settings[1]
    return before | table


class _StudyReader:
    """Checks the table of a file, key by key."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self._path, self._table = path, table

    def read(self) -> Study:
        table, known = self._table, {one.name for one in fields(Study)}
        known = (known | {"data"}) - {"name", "subsets"}
        if unknown := table.keys() - known:
            self._refuse(f"no key {min(unknown)!r}; there are {', '.join(sorted(known))}")
        for name, kinds in (("measure", Measure), ("plot", Plot)):
            if table.get(name) not in get_args(kinds):
                words = ", ".join(get_args(kinds))
                self._refuse(f"{name} is {table.get(name)!r}; it takes {words}")
        subsets = {name: self._subset(name, one) for name, one in self._tables("data").items()}
        study = Study(
            name=self._path.stem,
            **{name: self._text(name) for name in ("title", "claim", "paper", "source")},
            base=Path(self._text("base")),
            seeds=self._numbers("seeds"),
            measure=table["measure"],
            plot=table["plot"],
            goal=float(self._number("goal", 0.25)),
            window=int(self._number("window", 0)),
            sizes=self._numbers("sizes") if table["measure"] == "nets" else (),
            settings=self._settings("settings", self._tables("settings", flat=True)),
            grid=self._grid(),
            subsets=subsets,
            variants=self._variants(subsets, self._grid()),
        )
        self._check(study)
        return study

    def _check(self, study: Study) -> None:
        if not study.shown:
            self._refuse("no [variants.NAME] to compare")
        if not 0 < study.goal < 1:
            self._refuse(f"goal is {study.goal:g}; it takes an error above 0 and below 1")
        if study.measure == "nets":
            if not 1 <= min(study.sizes) <= max(study.sizes) <= len(study.seeds):
                self._refuse(f"sizes is {list(study.sizes)}; there are {len(study.seeds)} seeds")
            if len(study.shown) > 1:
                self._refuse("nets averages the seeds of one variant; there are more")

    def _variants(
        self, subsets: Mapping[str, DataSubset], grid: tuple[str, tuple[Any, ...]]
    ) -> tuple[Variant, ...]:
        found: list[Variant] = []
        for name, table in self._tables("variants").items():
            data = table.get("data", next(iter(subsets), WHOLE))
            if data not in (*subsets, WHOLE):
                self._refuse(f"variant {name}: no [data.{data}]")
            after = table.get("after", "")
            if after and after not in [one.name for one in found]:
                self._refuse(f"variant {name}: after {after!r} is no variant above it")
            settings = {key: one for key, one in table.items() if key not in RESERVED}
            found.append(
                Variant(
                    name=name,
                    settings=self._settings(f"variants.{name}", settings),
                    data=data,
                    after=after,
                    hidden=bool(table.get("hidden", False)),
                    values=self._values(grid[0], table.get("values", list(grid[1]))),
                )
            )
        return tuple(found)

    def _settings(self, where: str, table: Mapping[str, Any]) -> dict[str, Any]:
        for key, value in table.items():
            if key not in TYPES:
                self._refuse(f"[{where}] has {key!r}, which is no setting of cluster.train")
            if not is_of_type(value, TYPES[key]):
                self._refuse(f"[{where}] {key} is {value!r}, which that setting does not take")
        return {key: tuple(one) if isinstance(one, list) else one for key, one in table.items()}

    def _grid(self) -> tuple[str, tuple[Any, ...]]:
        table = self._tables("grid", flat=True)
        if not table:
            return "lr", ()
        if len(table) > 1:
            self._refuse(f"[grid] has {', '.join(table)}; give one setting")
        ((key, values),) = table.items()
        if not isinstance(values, list) or len(values) < 2:
            self._refuse(f"[grid] {key} is {values!r}; it takes a list of two values or more")
        return key, self._values(key, values)

    def _values(self, key: str, values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list) or (values and "grid" not in self._table):
            self._refuse(
                f"values is {values!r}; it takes a list, for the setting that [grid] names"
            )
        for value in values:
            self._settings("grid", {key: value})
        return tuple(values)

    def _subset(self, name: str, table: dict[str, Any]) -> DataSubset:
        known = {one.name for one in fields(DataSubset)}
        if unknown := table.keys() - known:
            self._refuse(
                f"[data.{name}] has {min(unknown)!r}; there are {', '.join(sorted(known))}"
            )
        classes = table.get("classes", [0.0, 1.0])
        numbers = isinstance(classes, list) and all(isinstance(x, int | float) for x in classes)
        if not numbers or len(classes) != 2 or not 0 <= classes[0] < classes[1] <= 1:
            self._refuse(f"[data.{name}] classes is {classes!r}; it takes two shares, as [0, 0.5]")
        for key in ("per_class", "val_per_class"):
            if type(count := table.get(key, 0)) is not int or count < 0:
                self._refuse(
                    f"[data.{name}] {key} is {count!r}; it takes a whole number, 0 for all"
                )
        if table.get("encoding", "jpeg") not in ("jpeg", "raw"):
            self._refuse(f"[data.{name}] encoding is {table['encoding']!r}; it takes jpeg or raw")
        return DataSubset(**table | {"classes": (float(classes[0]), float(classes[1]))})

    def _tables(self, key: str, flat: bool = False) -> dict[str, Any]:
        found = self._table.get(key, {})
        if not isinstance(found, dict) or not (
            flat or all(isinstance(one, dict) for one in found.values())
        ):
            self._refuse(f"{key} is no table; see cluster/configs/studies")
        return dict(found)

    def _text(self, key: str) -> str:
        if not isinstance(found := self._table.get(key), str) or not found:
            self._refuse(f"{key} is {found!r}; it takes text")
        return str(found)

    def _number(self, key: str, default: float) -> float:
        found = self._table.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            self._refuse(f"{key} is {found!r}; it takes a number")
        return float(found)

    def _numbers(self, key: str) -> tuple[int, ...]:
        found = self._table.get(key)
        if not isinstance(found, list) or not found or not all(type(one) is int for one in found):
            self._refuse(f"{key} is {found!r}; it takes a list of whole numbers")
        assert isinstance(found, list)
        if len(set(found)) < len(found) or min(found) < 0:
            self._refuse(f"{key} is {found!r}; each must be there once, and not below 0")
        return tuple(found)

    def _refuse(self, text: str) -> None:
        raise UsageError(f"study {self._path}: {text}")
