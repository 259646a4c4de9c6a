"""Computes fc7 of every image of a split once, in several processes.

The split is cut into stretches of whole blocks. A worker streams a stretch in stored order and
writes each block as soon as it is complete. The batches, and so the features, do not depend on the
number of workers, on which worker has which stretch, or on where an earlier call was killed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.checkpoint.format import load_checkpoint
from cluster.config import read_run_config
from cluster.experiments.neighbors.features import (
    BLOCK_ROWS,
    FeatureInfo,
    Features,
    FeatureSource,
    FeatureWriter,
    Ids,
    Rows,
    begin_features,
    locate_features,
    remove_features,
)
from cluster.run.folder import CONFIG
from cluster.training.precision import autocast, compute_dtype, prepare_device
from model.alexnet import AlexNet
from pipeline.batches import Batch, Stream
from pipeline.remote.dataset import open_dataset
from pipeline.remote.lease import lock_folder
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DataError, UsageError, hint_resume
from pipeline.tools.processes import LocalPool
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

BATCH = 64
STRETCH = 16
"""Most blocks in a stretch."""
POLL = 0.5
"""Seconds between two updates of the progress bar."""


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """A stretch of a split for one worker."""

    source: FeatureSource
    about: FeatureInfo
    folder: Path
    """Folder of the feature files."""
    blocks: range
    device: str
    """"cpu", or a GPU as "cuda:0"."""
    threads: int


def make_features(
    folder: Path,
    source: FeatureSource,
    split: str,
    *,
    dtype: str = "float16",
    devices: Sequence[str] = ("cpu",),
    anew: bool = False,
) -> Features:
    """Return the features of a split; those that do not exist yet are computed.

    Args:
        folder: folder of the feature files.
        source: run, checkpoint and data set.
        split: split of the data set.
        dtype: type of a file that is made, float16 or float32.
        devices: device of each worker.
        anew: compute them even if they exist.

    Raises:
        UsageError: no such split, another call is making them, or a feature exceeds `dtype`.
        DataError: existing features are of another run, step or data set, or damaged.
        SetupError: the disk has no room.
    """
    about = _describe(source, split, dtype)
    lock = locate_features(folder, split, "lock")
    with lock_folder(lock.parent, lock.name, "call"):
        if anew:
            remove_features(folder, split)
        if not locate_features(folder, split, "json").exists():
            kept = f"{folder} keeps the features made so far"
            with nullcontext() if anew else hint_resume(kept):
                _compute(folder, source, about, devices)
    found = Features(folder, split)
    if difference := found.about.describe_difference(about):
        raise DataError(
            f"features {found.path} are of another {difference}; use them with what they are of, "
            "or make them again with --anew"
        )
    found.verify()
    return found


def _describe(source: FeatureSource, split: str, dtype: str) -> FeatureInfo:
    net = AlexNet(classes=len(source.manifest.classes), design=source.config.design)
    return FeatureInfo(
        split=split,
        samples=source.manifest.split(split, source.metadata).samples,
        units=find_last_layer(net).in_features,
        dtype=dtype,
        classes=source.manifest.classes,
        data_sha256=source.data_sha256,
        step=source.checkpoint.mark.step,
        checkpoint=source.checkpoint.name,
        checkpoint_sha256=source.checkpoint_sha256,
    )


def find_last_layer(net: AlexNet) -> nn.Linear:
    """Return the layer whose input the features are: fc8."""
    head = net.get_submodule(net.stages[-1].layer.name)
    assert isinstance(head, nn.Linear)
    return head


def _compute(
    folder: Path, source: FeatureSource, about: FeatureInfo, devices: Sequence[str]
) -> None:
    """Compute what an earlier call has left missing, and seal the features."""
    begin_features(folder, about)
    writer = FeatureWriter(folder, about)
    missing = writer.reset_incomplete()
    # The object that keeps a downloaded checkpoint alive stays here; workers only read its files.
    sent = replace(source, checkpoint=replace(source.checkpoint, holder=None))
    threads = max(1, cpu_count() // len(devices))
    jobs = [
        FeatureJob(
            source=sent,
            about=about,
            folder=folder,
            blocks=blocks,
            device=devices[number % len(devices)],
            threads=threads,
        )
        for number, blocks in enumerate(cut_stretches(missing, len(devices)))
    ]
    with _show_progress(writer), LocalPool(min(len(devices), max(1, len(jobs)))) as pool:
        for _ in pool.run(extract, jobs):
            pass
    writer.finish(_read_labels(source, about))


def cut_stretches(missing: Sequence[int], workers: int) -> Iterator[range]:
    """Cut missing blocks into stretches of at most `STRETCH`, shorter where workers would idle."""
    most = max(1, min(STRETCH, -(-len(missing) // workers)))
    start = 0
    for end in range(1, len(missing) + 1):
        gap = end == len(missing) or missing[end] != missing[end - 1] + 1
        if gap or end - start == most:
            yield range(missing[start], missing[end - 1] + 1)
            start = end


def extract(job: FeatureJob) -> int:
    """Compute the blocks of a stretch in a worker; returns the number of rows.

    Raises:
        UsageError: a feature is too large for the file's dtype, or not finite.
        DataError: the data are not what their manifest says.
    """
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    prepare_device(device, job.threads)
    source, about = job.source, job.about
    net = _load_network(source.checkpoint.path, source.run, job.device, len(about.classes))
    first, stop = job.blocks.start * BLOCK_ROWS, about.rows(job.blocks[-1]).stop
    writer = FeatureWriter(job.folder, about)
    stream = Stream(
        source.data,
        version=source.data_sha256,
        split=about.split,
        batch_size=BATCH,
        position=first,
        device="gpu" if device.type == "cuda" else "cpu",
        crop="center",
        size=source.config.design.image_size,
        mean=source.config.mean,
        once=True,
        threads=job.threads,
        quarantine=source.quarantine,
        strict=source.config.strict,
        **source.config.cached,
    )
    with stream, autocast(compute_dtype(source.config.dtype, device), device):
        for block in job.blocks:
            rows, damaged = _compute_block(net, stream, about.rows(block))
            writer.put(block, _convert(rows, about, block), damaged)
    return stop - first


@lru_cache(maxsize=1)
def _load_network(checkpoint: Path, run: Path, device: str, classes: int) -> AlexNet:
    """Load a worker's network for its first stretch, and keep it."""
    net = AlexNet(classes=classes, design=read_run_config(run / CONFIG)[0].design)
    load_checkpoint(checkpoint, net)
    return net.to(device).eval()


def _compute_block(net: AlexNet, stream: Stream, rows: range) -> tuple[Tensor, Ids]:
    """Features of a block, float32 [rows, units] on the host, and the indices of damaged images."""
    kept, damaged = [], []
    for start in range(rows.start, rows.stop, BATCH):
        batch = next(stream)
        count = min(BATCH, rows.stop - start)
        values = _compute_batch(net, batch)[:count]
        replaced = batch.replaced[:count]
        expected = torch.arange(start, start + count)
        if not torch.equal(batch.ids[:count][~replaced], expected[~replaced]):
            raise RuntimeError(f"the stream gave other images than {start} to {start + count}")
        values[replaced] = 0
        kept.append(values)
        damaged.append(start - rows.start + replaced.nonzero().flatten())
    return torch.cat(kept), torch.cat(damaged).numpy()


@torch.no_grad()
def _compute_batch(net: AlexNet, batch: Batch) -> Tensor:
    """Input of the last layer, float32 [b, units] on the host."""
    seen: list[Tensor] = []
    with find_last_layer(net).register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        net(batch.images.float())
    return seen[0].float().cpu()


def _convert(rows: Tensor, about: FeatureInfo, block: int) -> Rows:
    values = rows.numpy()
    # What float16 cannot hold becomes infinite, and is refused below.
    with np.errstate(over="ignore"):
        stored = values.astype(about.dtype)
    if not np.isfinite(stored).all():
        bad = int(np.flatnonzero(~np.isfinite(stored).all(1))[0])
        most = float(np.abs(values[bad]).max())
        hint = "use --dtype float32"
        if not np.isfinite(most):
            hint = "the network has diverged; take an earlier checkpoint with --step"
        raise UsageError(
            f"a feature of image {about.rows(block)[bad]} of {about.split} is {most:g}, which "
            f"{about.dtype} cannot hold; {hint}"
        )
    return stored


def _read_labels(source: FeatureSource, about: FeatureInfo) -> Ids:
    with (
        closing(
            open_dataset(source.data, version=source.data_sha256, **source.config.cached)
        ) as dataset,
        closing(ShardReader(dataset, about.split)) as reader,
    ):
        return reader.read_labels(np.arange(about.samples))


@contextmanager
def _show_progress(writer: FeatureWriter) -> Iterator[None]:
    """Show the number of rows written while the workers compute."""
    ended = threading.Event()
    done, total = writer.count_rows(), writer.about.samples
    what = f"features of {writer.about.split}"
    with Progress(what, total=total, unit="img", already=done) as progress:

        def poll() -> None:
            seen = done
            while not ended.wait(POLL):
                now = writer.count_rows()
                progress.advance(now - seen)
                seen = now

        watcher = threading.Thread(target=poll, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
