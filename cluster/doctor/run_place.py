"""The run's folder, and the store of its checkpoints: writable, and with room."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cluster.checkpoint.storage import bucket_of, folder_of
from cluster.config import Config
from cluster.doctor.data import CREDENTIALS
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from cluster.doctor.job import checkpoint_bytes
from cluster.doctor.speed import told
from pipeline.remote.dataset import is_remote
from pipeline.remote.download import Policy
from pipeline.stores.errors import without_secrets
from pipeline.tools.errors import DuetError
from pipeline.tools.files import writable_folder

PROBE = 2**24
"""Bytes that are written to tell a speed."""


def judge_run(run: Path, config: Config | None, classes: int | None) -> Iterator[Finding]:
    """Yield what there is to say of a run's folder; makes it if need be."""
    try:
        writable_folder(run, "run folder")
    except DuetError as error:
        yield fail("run", str(error), "another --run")
        return
    probe, noise = run / f".doctor.{secrets.token_hex(8)}", os.urandom(PROBE)
    start = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    except OSError as error:
        yield fail("run", f"{run}: {error.strerror}", "make room, or another --run")
        return
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(run).free
    kept = config.keep + config.keep_best + 1 if config else 4
    need = 0 if config and config.store else kept * checkpoint_bytes(config, classes)
    said = f"{run}: {PROBE / seconds / 1e6:,.0f} MB/s to the disk, {free / GB:.1f} GB free"
    if free < need:
        mend = "--keep 1 --keep-best 0, make room, or another --run or --store"
        yield warn("run", f"{said}; its checkpoints take up to {need / GB:.1f} GB", mend)
    else:
        yield ok("run", said)


def judge_store(store: str) -> Finding:
    """Write a small file to the store of a config, read it back and remove it."""
    safe = without_secrets(store)
    try:
        if not is_remote(store):
            writable_folder(folder_of(store), "store")
            return ok("store of run", f"{safe} can be written")
        target = replace(bucket_of(store, ""), policy=Policy(attempts=2, stall=5))
        name, mark = f".doctor.{secrets.token_hex(8)}", secrets.token_bytes(32)
        start = time.perf_counter()
        with target.create(name) as file:
            file.write(mark)
        try:
            right = target.read(name) == mark
        finally:
            target.remove([name])
    except (DuetError, OSError) as error:
        scheme = store.partition("://")[0]
        mend = CREDENTIALS.get(scheme, "another --store")
        return fail("store of run", f"{told(error)}", f"{mend}; it must allow writing")
    seconds = time.perf_counter() - start
    if not right:
        return fail("store of run", f"{safe} gives back other bytes", "another --store")
    return ok("store of run", f"{safe}: written, read and removed in {seconds * 1000:,.0f} ms")
