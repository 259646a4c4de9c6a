"""What may differ when a run is continued, and what may not."""

from __future__ import annotations

from dataclasses import asdict

from cluster.config import LENGTH, Config

FREE = (
    "replicas",
    "device",
    "columns_per_worker",
    "microbatch",
    "threads",
    "prefetch",
    "checkpoint_every",
    "keep",
    "keep_best",
    "store",
    "validate_every",
    "statistics_every",
    "max_failures",
    "node_wait",
    "collective_timeout",
    "strict",
    "ledger",
    "tensorboard",
    "cache",
    "cache_size",
)
"""Settings that may change when a run is continued. None changes the pictures, their order or the
dropout masks; `replicas`, `columns_per_worker` and `microbatch` change the rounding of sums."""


def differences(old: Config, new: Config, samples: int) -> list[str]:
    """What keeps `new` from continuing a run of `old`, as `name: old -> new`; empty if nothing.

    Settings in `FREE` may differ, but for `validate_every` where `plateau` counts validations, and
    those that say how many pictures batch normalisation sees at once. The length may differ if no
    learning rate depends on it.
    """
    before, after = asdict(old), asdict(new)
    free = set(FREE) - ({"validate_every"} if old.schedule == "plateau" else set())
    found = [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and name not in free and name not in LENGTH
    ]
    if old.norm == new.norm == "batch" and old.micro(1) != new.micro(1):
        found.append(
            f"pictures that are normalised together: {old.micro(1)} -> {new.micro(1)} "
            "(--microbatch, --replicas)"
        )
    lengths = old.total_steps(samples), new.total_steps(samples)
    if lengths[0] != lengths[1] and not (old.constant_rates and new.constant_rates):
        found.append(f"length in steps: {lengths[0]} -> {lengths[1]} (learning rates drop by it)")
    return found
