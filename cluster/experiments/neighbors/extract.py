"""fc7 of every image of a split, each passed through the network once, by several processes.

The split is cut into stretches of whole blocks. A worker streams a stretch in stored order and
writes each block into its place as soon as it is whole. Which worker has which stretch, how many
there are and where an earlier call was killed changes no batch, and so no feature.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.checkpoint.format import load_checkpoint
from cluster.evaluate import create_network
from cluster.experiments.neighbors.features import (
    BLOCK,
    About,
    Features,
    Growing,
    Ids,
    Rows,
    Trained,
    begin,
    discard,
    part,
    settings,
    stem,
)
from cluster.training.precision import autocast, compute_dtype, keep_memory
from model.alexnet import AlexNet
from pipeline.batches import Batch, Stream
from pipeline.remote.dataset import open_dataset
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.processes import LocalPool
from pipeline.tools.progress import Progress

BATCH = 64
STRETCH = 16
"""Most blocks in a stretch."""
LOOK = 0.5
"""Seconds between looks at how far the workers are."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stretch of a split for one worker."""

    trained: Trained
    about: About
    base: Path
    blocks: range
    device: str
    """"cpu", or a GPU as "cuda:0"."""
    threads: int


def features(
    folder: Path,
    trained: Trained,
    split: str,
    *,
    dtype: str = "float16",
    devices: Sequence[str] = ("cpu",),
    anew: bool = False,
) -> Features:
    """Return the features of a split; those that are not there yet are made.

    Args:
        folder: for the files.
        trained: run, checkpoint and data.
        split: of the data.
        dtype: of the file that is made, float16 or float32.
        devices: of the workers, one each.
        anew: make them even if they are there.

    Raises:
        UsageError: no such split, another call is at it, or a feature has no place in `dtype`.
        DataError: those that are there are of another run, step or data set, or damaged.
        SetupError: the disk has no room.
    """
    about = _about(trained, split, dtype)
    base = stem(folder, split)
    with _alone(part(base, "lock")):
        if anew:
            discard(base)
        if not part(base, "json").exists():
            _make(base, trained, about, devices)
    found = Features(base)
    if differs := found.about.differs(about):
        raise DataError(
            f"features {found.path} are of another {differs}; use them with what they are of, or "
            "make them again with --anew"
        )
    found.verify()
    return found


def _about(trained: Trained, split: str, dtype: str) -> About:
    last = create_network(trained.config, len(trained.manifest.classes))
    return About(
        split=split,
        samples=trained.manifest.split(split, trained.metadata).samples,
        units=head_of(last).in_features,
        dtype=dtype,
        classes=trained.manifest.classes,
        data_sha256=trained.data_sha256,
        step=trained.found.mark.step,
        checkpoint=trained.found.name,
        checkpoint_sha256=trained.checkpoint_sha256,
    )


def head_of(net: AlexNet) -> nn.Linear:
    """The layer that reads the features: the last one."""
    head = net.get_submodule(net.stages[-1].layer.name)
    assert isinstance(head, nn.Linear)
    return head


def _make(base: Path, trained: Trained, about: About, devices: Sequence[str]) -> None:
    begin(base, about)
    growing = Growing(base, about)
    try:
        missing = growing.missing()
        growing.forget(missing)
        # What keeps a fetched checkpoint alive stays here; workers only read it.
        sent = replace(trained, found=replace(trained.found, holder=None))
        threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        jobs = [
            Job(
                trained=sent,
                about=about,
                base=base,
                blocks=blocks,
                device=devices[number % len(devices)],
                threads=threads,
            )
            for number, blocks in enumerate(stretches(missing, len(devices)))
        ]
        with _told(growing), LocalPool(min(len(devices), max(1, len(jobs)))) as pool:
            for _ in pool.run(extract, jobs):
                pass
        growing.finish(_labels(trained, about))
    finally:
        growing.close()


def stretches(missing: Sequence[int], workers: int) -> Iterator[range]:
    """Cut the missing blocks into runs: of `STRETCH` at most, and shorter if workers would idle."""
    most = max(1, min(STRETCH, -(-len(missing) // workers)))
    start = 0
    for end in range(1, len(missing) + 1):
        gap = end == len(missing) or missing[end] != missing[end - 1] + 1
        if gap or end - start == most:
            yield range(missing[start], missing[end - 1] + 1)
            start = end


def extract(job: Job) -> int:
    """Make the blocks of a stretch; runs in a worker. Returns its rows.

    Raises:
        UsageError: a feature is too large for the file's dtype, or not finite.
        DataError: the data are not what their manifest says.
    """
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
        torch.set_num_threads(job.threads)
    trained, about = job.trained, job.about
    net = _network(trained.found.path, trained.run, job.device, len(about.classes))
    first, stop = job.blocks.start * BLOCK, about.rows(job.blocks[-1]).stop
    growing = Growing(job.base, about)
    stream = Stream(
        trained.data,
        split=about.split,
        batch_size=BATCH,
        position=first,
        device="gpu" if device.type == "cuda" else "cpu",
        view="centre",
        mean=trained.config.mean,
        once=True,
        threads=job.threads,
        quarantine=trained.quarantine,
        strict=trained.config.strict,
        **trained.config.cached,
    )
    dtype = compute_dtype(trained.config.dtype, device)
    try:
        with stream, autocast(dtype, device):
            for block in job.blocks:
                rows, damaged = _block(net, stream, about.rows(block))
                growing.put(block, _stored(rows, about, block), damaged)
    finally:
        growing.close()
    return stop - first


@lru_cache(maxsize=1)
def _network(checkpoint: Path, run: Path, device: str, classes: int) -> AlexNet:
    """A worker's network: loaded for its first stretch, and kept."""
    net = create_network(settings(run)[0], classes)
    load_checkpoint(checkpoint, net)
    return net.to(device).eval()


def _block(net: AlexNet, stream: Stream, rows: range) -> tuple[Tensor, Ids]:
    """The features of a block, float32 [rows, units] on the host, and its damaged places."""
    kept, damaged = [], []
    for start in range(rows.start, rows.stop, BATCH):
        batch = next(stream)
        count = min(BATCH, rows.stop - start)
        kept.append(_features(net, batch)[:count])
        gone = batch.replaced[:count]
        due = torch.arange(start, start + count)
        if not torch.equal(batch.ids[:count][~gone], due[~gone]):
            raise RuntimeError(f"the stream gave other images than {start} to {start + count}")
        kept[-1][gone] = 0
        damaged.append(start - rows.start + gone.nonzero().flatten())
    return torch.cat(kept), torch.cat(damaged).numpy()


@torch.no_grad()
def _features(net: AlexNet, batch: Batch) -> Tensor:
    """What the last layer reads, float32 [b, units] on the host."""
    seen: list[Tensor] = []
    hook = head_of(net).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        net(batch.images.float())
    finally:
        hook.remove()
    return seen[0].float().cpu()


def _stored(rows: Tensor, about: About, block: int) -> Rows:
    values = rows.numpy()
    # What float16 cannot hold becomes infinite, and is told below.
    with np.errstate(over="ignore"):
        stored = values.astype(about.dtype)
    if not np.isfinite(stored).all():
        bad = int(np.flatnonzero(~np.isfinite(stored).all(1))[0])
        most = float(np.abs(values[bad]).max())
        hint = "use --dtype float32" if np.isfinite(most) else "the network has diverged; take "
        hint += "" if np.isfinite(most) else "an earlier checkpoint with --step"
        raise UsageError(
            f"a feature of image {about.rows(block)[bad]} of {about.split} is {most:g}, which "
            f"{about.dtype} cannot hold; {hint}"
        )
    return stored


def _labels(trained: Trained, about: About) -> Ids:
    dataset = open_dataset(trained.data, **trained.config.cached)
    storage = ShardReader(dataset, about.split)
    try:
        labels: Ids = storage.read_labels(np.arange(about.samples))
    finally:
        storage.close()
        dataset.close()
    return labels


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other calls away from the files."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another call is making {path.with_suffix('')}; wait for it, or name another "
                "folder with --features"
            ) from error
        yield


@contextmanager
def _told(growing: Growing) -> Iterator[None]:
    """Show how far the workers are."""
    ended = threading.Event()
    done, total = growing.done(), growing.about.samples
    what = f"features of {growing.about.split}"
    with Progress(what, total=total, unit="img", already=done) as progress:

        def look() -> None:
            seen = done
            while not ended.wait(LOOK):
                now = growing.done()
                progress.advance(now - seen)
                seen = now

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
