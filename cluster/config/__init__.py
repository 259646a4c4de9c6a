"""Settings of a training run: their fields and checks, and the TOML files they are read from.

aliases     names that other trainers give to settings
files       presets and other config files, and their readers
milestones  published results, which a run is compared with
presets     configs and studies that come with Duet (TOML)
settings    the fields and their checks
"""

from cluster.config.aliases import ALIASES, MEANT
from cluster.config.files import (
    ORIGIN_KEYS,
    PRESETS,
    RUN_KEY,
    TYPES,
    find_config,
    fit_images,
    is_of_type,
    load_network,
    load_settings,
    read_run_config,
    suggest_setting,
)
from cluster.config.settings import (
    CHANGEABLE,
    DESIGN_TYPES,
    LENGTH,
    Config,
    Dtype,
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
    "load_network",
    "load_settings",
    "read_run_config",
    "suggest_setting",
    "translate_values",
]
