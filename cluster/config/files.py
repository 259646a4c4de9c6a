"""Config files: presets, the TOML files that settings are read from, and RUN/config.toml."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cluster.config.aliases import MEANT
from cluster.config.settings import DESIGN_TYPES, Config, translate_values
from model.architecture import fit_design
from model.layer_table import Layer, parse_layers
from model.schedule import suggest_name
from pipeline.dataset.record import ADDRESS_KEY, SEGMENTS_KEY, SHA256_KEY, require_run
from pipeline.tools.errors import UsageError

PRESETS = Path(__file__).resolve().parent / "presets"
"""Folder of the presets; studies/ in it has those of `cluster.experiments.study`."""
RUN_KEY = "run_id"
"""Key of RUN/config.toml, as `SHA256_KEY`: the name that tells the run from all others."""
ORIGIN_KEYS = (ADDRESS_KEY, "config", "command", "commit")
"""Keys of RUN/config.toml about the last start of the run, which older files lack: address of the
data set without credentials, CONFIG as it was named, command line, commit of Duet's source."""
KINDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    int | str: "a whole number or text",
    tuple[str, ...]: "a list of texts",
    tuple[Layer, ...]: "a list of tables",
}
"""Descriptions of the types; the other settings are choices."""
TYPES = DESIGN_TYPES | {k: kind for k, kind in get_type_hints(Config).items() if k != "design"}
"""Type of each setting of the flat table."""


def find_config(path: Path, folder: Path = PRESETS) -> Path:
    """Find the file of a config: a path, or the name of a preset in `folder`.

    A path of an earlier version or of the repository, `configs/dexp.toml`, names the preset, too.

    Raises:
        UsageError: there is neither; names the nearest presets.
    """
    if path.is_file():
        return path
    parts = list(path.with_suffix("").parts if path.suffix == ".toml" else path.parts)
    for place in ("cluster", "config", "configs", PRESETS.name, folder.name):
        if parts[:1] == [place]:
            del parts[0]
    if parts and (preset := folder.joinpath(*parts).with_suffix(".toml")).is_file():
        return preset
    names = sorted(str(one.relative_to(folder).with_suffix("")) for one in folder.rglob("*.toml"))
    names = [name for name in names if not (folder == PRESETS and "/" in name)]
    near = difflib.get_close_matches("/".join(parts), names, n=3)
    raise UsageError(
        f"{path} cannot be read (No such file or directory), nor is it a preset; "
        + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}")
    )


def load_settings(config: Path) -> dict[str, Any]:
    """Read a config file or preset; checks the names and types of its keys, not yet their values.

    Raises:
        UsageError: names the file, the key and what it should be.
    """
    path = find_config(config)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"config file {path} cannot be read ({reason}); mend it") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config file {path} is not TOML: {error}") from error
    for key in (SHA256_KEY, SEGMENTS_KEY, RUN_KEY, *ORIGIN_KEYS):
        table.pop(key, None)
    table = translate_values(table)
    for key, value in table.items():
        if key not in TYPES:
            if {"title", "measure"} <= set(table):
                raise UsageError(f"config file {path} is a study; duet study runs it")
            raise UsageError(f"config file {path}: no setting {key!r}; {suggest_setting(key)}")
        if not is_of_type(value, TYPES[key]):
            takes = KINDS.get(TYPES[key]) or " or ".join(map(repr, get_args(TYPES[key])))
            raise UsageError(f"config file {path}: {key} is {value!r:.200}; it takes {takes}")
    if table.get("layers"):
        try:
            parse_layers(table["layers"])
        except ValueError as error:
            raise UsageError(f"config file {path}: {error}") from error
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def load_network(path: Path) -> dict[str, Any]:
    """Read a file of the network alone: its table `layers`, and any other setting of the network.

    Raises:
        UsageError: as `load_settings`, or it has no table, or a setting of something else.
    """
    table = load_settings(path)
    if not table.get("layers"):
        raise UsageError(f"{path} has no table of layers; give it one, layers = [{{name = …}}, …]")
    if others := [key for key in table if key not in DESIGN_TYPES]:
        raise UsageError(
            f"{path}: {others[0]} is no setting of the network; give it in CONFIG, or as a flag"
        )
    return table


def suggest_setting(name: str) -> str:
    """Return a hint for an unknown setting: by `ALIASES`, else the nearest name, else all names."""
    plain = name.lower().replace("-", "_")
    meant = plain if plain in TYPES else MEANT.get(plain)
    return f"did you mean {meant!r}?" if meant else suggest_name(name, list(TYPES))


def is_of_type(value: object, kind: Any) -> bool:
    """Return whether a value of a TOML file has the type of a setting (one of `TYPES`)."""
    if kind in (tuple[str, ...], tuple[Layer, ...]):
        one = str if kind == tuple[str, ...] else dict
        return isinstance(value, list) and all(isinstance(part, one) for part in value)
    if kind not in KINDS:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    return type(value) in (get_args(kind) or (kind,))


def fit_images(config: Config, side: int | None, data: str) -> Config:
    """Return the config with a network for the images of data set `data`; see `fit_design`."""
    try:
        return replace(config, design=fit_design(config.design, side))
    except ValueError as error:
        raise UsageError(f"data set {data} holds {error}") from error


def read_run_config(path: Path) -> tuple[Config, str]:
    """Read RUN/config.toml: the settings of the run, and the identity of its data set.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    require_run(path.parent)
    table = load_settings(path)
    data = tomllib.loads(path.read_text(encoding="utf-8")).get(SHA256_KEY, "")
    try:
        return Config.from_settings(table), str(data)
    except ValueError as error:
        raise UsageError(f"config file {path}: {error}") from error
