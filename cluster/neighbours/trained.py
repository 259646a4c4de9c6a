"""A run, its checkpoint and a data set of the same classes."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoint.format import Found, read_table
from cluster.checkpoint.storage import places_of
from cluster.checkpoint_choice import choose
from cluster.config import Config
from cluster.config_file import read_back
from cluster.run.events import Event, Warned
from cluster.run.folder import CONFIG, QUARANTINE
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import metadata
from pipeline.tools.errors import UsageError

FOLDER = "neighbours"
"""Of RUN, for all that is written here."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What features are made from."""

    run: Path
    config: Config
    found: Found
    checkpoint_sha256: str
    """As `fingerprint` has it."""
    data: str
    manifest: Manifest
    metadata: Path
    """Local folder of the manifest."""
    data_sha256: str
    """`pipeline.dataset.manifest.identity`."""
    quarantine: Path
    """Where damaged pictures are listed."""


def opened(run: Path, data: str, step: int | None = None) -> Trained:
    """Find the checkpoint of a run and make sure that the data are of its classes.

    Args:
        run: folder of the run.
        data: data set, a folder or an address.
        step: of the checkpoint; None: the newest sound one.

    Raises:
        UsageError: no run, no (such) checkpoint, no data set, or one of other classes.
        DataError: all checkpoints or the manifest are damaged.
        StoreError: a store does not answer.
    """
    config, trained_on = settings(run)
    found = choose(run, config.store, _tell, step)
    folder = metadata(data, **config.cached)
    manifest = Manifest.load(folder)
    if manifest.classes != found.classes:
        raise UsageError(
            f"data set {data} has {len(manifest.classes)} classes, not the {len(found.classes)} "
            f"of the run in {run} or not in that order; name a data set of the run's classes"
        )
    data_sha256 = identity(folder)
    quarantine = run / QUARANTINE
    if data_sha256 != trained_on:
        _warn(f"{data} is not the data set of the training; its own mean is subtracted")
        # The run's list names pictures by their places in another set.
        quarantine = run / FOLDER / f"quarantine-{data_sha256[:12]}.jsonl"
    return Trained(
        run=run,
        config=config,
        found=found,
        checkpoint_sha256=fingerprint(run, config, found.name),
        data=data,
        manifest=manifest,
        metadata=folder,
        data_sha256=data_sha256,
        quarantine=quarantine,
    )


def settings(run: Path) -> tuple[Config, str]:
    """Read the settings of a run, and the identity of its data set.

    Raises:
        UsageError: it is no run folder.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(
            f"{run} is no run folder (it has no {CONFIG}); name one that cluster.train made"
        )
    return read_back(run / CONFIG)


def fingerprint(run: Path, config: Config, name: str) -> str:
    """One SHA-256 for all files of a checkpoint: of their names and hashes.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged, or not there.
    """
    files: dict[str, Any] = read_table(places_of(run, config.store), name)["files"]
    lines = [f"{file} {files[file]['sha256']}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


def _tell(event: Event) -> None:
    if isinstance(event, Warned):
        _warn(event.text)
