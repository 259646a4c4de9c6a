"""Settings of a training run: their fields and checks, and the TOML files they are read from.

aliases   names that other trainers give to settings
settings  the fields, their checks, and the reader of config files
"""

from cluster.config.aliases import ALIASES, MEANT
from cluster.config.settings import (
    CHANGEABLE,
    DESIGN_TYPES,
    LENGTH,
    ORIGIN_KEYS,
    PRESETS,
    RUN_KEY,
    TYPES,
    Config,
    Dtype,
    find_config,
    fit_images,
    is_of_type,
    load_settings,
    read_run_config,
    suggest_setting,
    translate_values,
)

__all__ = [
    "ALIASES",
    "CHANGEABLE",
    "DESIGN_TYPES",
    "LENGTH",
    "MEANT",
    "ORIGIN_KEYS",
    "PRESETS",
    "RUN_KEY",
    "TYPES",
    "Config",
    "Dtype",
    "find_config",
    "fit_images",
    "is_of_type",
    "load_settings",
    "read_run_config",
    "suggest_setting",
    "translate_values",
]
