"""`Stream`: the whole pipeline as an iterator of batches, whose only state is one integer."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.dataset.segments import Segment, find_divergence, parse_segments
from pipeline.remote.local import LocalDataset
from pipeline.stream.config import Crop, StreamConfig
from pipeline.stream.decode import DecodedBatch
from pipeline.stream.fields import StoredSample
from pipeline.stream.ledger.format import LedgerHeader
from pipeline.stream.ledger.writer import Ledger
from pipeline.stream.loader import BatchReader, DecodeFailure, EncodedBatch, Loader
from pipeline.stream.mixture import Data, MixedReader, check_shares, open_datasets
from pipeline.stream.normalization import crop_mean_image
from pipeline.stream.operators import import_dali
from pipeline.stream.quarantine import UNDECODABLE
from pipeline.stream.shard_reader import Damage, ShardReader
from pipeline.stream.timing import WaitTimes
from pipeline.stream.transfer import to_device
from pipeline.tools.errors import UsageError

__all__ = ["Batch", "Crop", "EpochIterable", "StoredSample", "Stream", "StreamConfig"]

P = ParamSpec("P")
_Init: TypeAlias = Callable[["Stream", Data, StreamConfig], None]


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch: b samples."""

    ids: torch.Tensor
    """int64 [b], on the host: sample ids, indices in the stored order of the split."""
    images: torch.Tensor
    """[b, 3, height, width] on the device: RGB, grey levels 0..255 minus the mean and the sample's
    colour shift, divided by `std`; 224x224 float32 (on a GPU float16) unless settings say other."""
    labels: torch.Tensor
    """int64 [b], on the device: indices in the manifest's class list, -1 in a set without classes;
    with labels of your own, rows of those, [b] or [b, k]."""
    weights: torch.Tensor
    """float32 [b], on the device: loss weight, 0 for padding and for replaced samples of an
    evaluation, else 1."""
    replaced: torch.Tensor
    """bool [b], on the host: whether a damaged sample was replaced by another here."""
    position: int
    """Samples consumed by the whole job after this batch: the `position` to resume from."""
    fields: dict[str, list[Any]] = field(default_factory=dict)
    """Other members of the samples, b of each of the stream's `fields`: of `json` what it holds,
    of `txt` a text, of `cls` a number or a text, of `npy` an array, else bytes."""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    """uint8 [b, height, width] of each of the stream's `masks`, on the device."""
    _reader: ShardReader | MixedReader | None = field(default=None, repr=False)

    @functools.cached_property
    def keys(self) -> list[str]:
        """WebDataset keys of the samples, b of them; looked up when they are asked for.

        Of a set in a store ask for keys or names while the stream is open.
        """
        return [] if self._reader is None else self._reader.read_keys(self.ids.numpy())

    @functools.cached_property
    def names(self) -> list[str] | None:
        """Original file names of the samples, relative to the source they were packed from.

        None where the set has no table of names: it was packed before, or by another tool.
        """
        return None if self._reader is None else self._reader.read_names(self.ids.numpy())

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets: keys and names, and no open files."""
        return vars(self) | {"keys": self.keys, "names": self.names, "_reader": None}

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch with what is on the device moved to another; the rest stays.

        Lightning and accelerate call it.
        """
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("images", "labels", "weights")
        }
        masks = {
            name: mask.to(device, non_blocking=non_blocking) for name, mask in self.masks.items()
        }
        batch = copy.copy(self)  # with keys and names that were looked up
        vars(batch).update(moved, masks=masks)
        return batch


def _take_settings(
    make_config: Callable[P, StreamConfig],
) -> Callable[[_Init], Callable[Concatenate[Stream, Data, P], None]]:
    """Decorate a constructor that takes a config: its callers give the settings as keywords.

    Type checkers and `help` see the settings of `make_config` with their types and defaults.
    """

    def decorate(init: _Init) -> Callable[Concatenate[Stream, Data, P], None]:
        @functools.wraps(init)
        def accept(stream: Stream, data: Data, *args: P.args, **settings: P.kwargs) -> None:
            if "view" in settings:
                raise TypeError("Stream has no setting 'view' any more; it is called crop")
            init(stream, data, make_config(*args, **settings))

        own, path, _ = inspect.signature(init).parameters.values()
        settings = inspect.signature(make_config).parameters.values()
        accept.__signature__ = inspect.Signature([own, path, *settings])  # type: ignore[attr-defined]
        return accept  # type: ignore[return-value]  # its first two may be keywords, too

    return decorate


class Stream:
    """An endless stream of training batches, or one pass for evaluation.

    The samples of a global batch, their order, crops, flips and colours follow from `seed` and
    `position` alone: ranks, threads, prefetch and restarts change nothing, to the bit (on a GPU to
    what its decoder gives). Every epoch holds every sample once, unless they are weighted or mixed.

        with Stream(DATA, split="train", batch_size=128, seed=0, rank=0, world_size=1) as stream:
            batch = next(stream)

    Every sample is checked against its CRC-32. One that is damaged, or cannot be decoded, is
    replaced by another that follows from seed, epoch and sample alone (in an evaluation: gets no
    weight), and is found in `damaged`, and in the file `quarantine` if one is named.

    It holds threads and open files: open it after a fork, not before.

    Args:
        data: folder that `pipeline.build_shards` sealed, or the address of one in a store
            (`https://`, `s3://`, `gs://`, anything fsspec knows); or several with their shares:
            {"a": 0.7, "s3://bucket/b": 0.3}. Each 1,000 positions hold each dataset as often as its
            share says; each has epochs of its own, and ids count on from one to the next.
        settings: keywords, the fields of `StreamConfig`, which documents them all (`split`,
            `batch_size`, ...).

    Raises:
        UsageError: no dataset, no such split, or a cache that cannot work.
        DataError: the dataset is not what its manifest says.
        SetupError: device `gpu` without a CUDA device, or DALI or a package for the store is
            missing.
        StoreError: the store does not answer.
        TypeError: a setting that does not exist.
        ValueError: a setting out of range.
    """

    @_take_settings(StreamConfig)
    def __init__(self, data: Data, config: StreamConfig) -> None:
        """Open a split of a dataset; the arguments are explained above."""
        import_dali()
        shares = check_shares(data)
        self._datasets = open_datasets(list(shares), config)
        self._reader = reader = BatchReader(self._datasets, config, tuple(shares.values()))
        _check_cache(reader)
        self.channel_mean = reader.statistics.channel_mean
        """float64 [3]: the mean of each channel over the training set."""
        self.mean = reader.normalization.subtracted
        """float32 [3, 1, 1] or [3, height, width]: mean that was subtracted, for showing images."""
        self.view_mean: torch.Tensor | None = None
        """float32 [3, size, size] on the host: mean image that is yet to be subtracted from each
        view cut out of a whole image; None where nothing is left to subtract."""
        if config.mean == "image" and config.crop == "whole":
            self.view_mean = torch.from_numpy(crop_mean_image(reader.statistics, config.image_size))
        self.waits = WaitTimes()
        """Seconds that `next` has waited so far, by the stage that was not ready. A stream that is
        fast enough has next to none, because it prefetches."""
        self.data_sha256 = reader.selection.identity
        """Identity of the data set: the SHA-256 of its manifest; of a mixture, of all manifests; of
        segments, that of the first version."""
        self._position = config.position
        self._loader: Loader | None = Loader(reader, config.position, self.waits)
        self._ledger: Ledger | None = None
        if config.ledger:
            self._ledger = self._open_ledger(config)

    @classmethod
    def from_config(cls, data: Data, config: StreamConfig) -> Stream:
        """Open a split of a dataset with the settings of a config."""
        return cls(data, **{one.name: getattr(config, one.name) for one in fields(StreamConfig)})

    @property
    def samples(self) -> int:
        """Samples of an epoch, N: those of the split that were selected; of the last segment."""
        return self._reader.order.samples

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is a place in it."""
        return tuple(self._reader.shard_reader.manifest.classes)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every sample once: N / `batch_size`, rounded up."""
        return math.ceil(self.samples / self._reader.config.batch_size)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, key: str | int) -> StoredSample:
        """Return one sample as it is stored, by its WebDataset key, original file name or id.

        Raises:
            KeyError: there is no such sample, or several of that key; the message is one line.
            DataError: the sample is damaged.
            ValueError: the stream was closed.
        """
        if self._loader is None:
            raise ValueError("this stream was closed")
        return self._reader.members.read_sample(key, self._reader.labels)

    def __repr__(self) -> str:
        config, (height, width) = self._reader.config, self._reader.config.image_size
        classes = len(self.classes) or "no"
        return (
            f"Stream({config.split}: {self.samples:,} samples of {classes} classes, "
            f"{config.crop} {height}x{width} {config.pixel_dtype} on {config.device}, batch "
            f"{config.batch_size}, rank {config.rank} of {config.world_size}, "
            f"position {self._position:,})"
        )

    def as_iterable(self) -> EpochIterable:
        """Return the stream cut into epochs, for frameworks that want an end and a `len`."""
        return EpochIterable(self)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: position, and what decides the samples from there on.

        It is the same on every rank: plain numbers and words, fit for JSON.
        """
        return {"position": self._position, **self._identify()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream was that gave `state`, on any rank of any world.

        Batch size, ranks, device and everything else about pixels may differ.

        Raises:
            ValueError: it is the state of other samples or another order (names what differs), or
                the stream was closed.
        """
        if self._loader is None:
            raise ValueError("this stream was closed")
        own = self._identify()
        for name in (*(one for one in own if one != "segments"), "selection"):
            here, there = own.get(name), state.get(name)
            if there != here:
                raise ValueError(f"a state of another stream: {name} was {there!r}, is {here!r}")
        config = replace(self._reader.config, position=state.get("position", "missing"))
        self._check_segments(state.get("segments"), config.position)
        self._loader.close()
        self._position = config.position
        self._loader = Loader(self._reader, config.position, self.waits)
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = self._open_ledger(config)

    def _identify(self) -> dict[str, Any]:
        """Return what the samples and their order follow from, besides the position."""
        config = self._reader.config
        facts = {
            "data_sha256": self.data_sha256,
            "split": config.stored_split,
            "seed": config.seed,
            "shuffle": config.order_name,
        }
        selection = self._reader.selection
        facts |= {"selection": selection.digest} if selection.digest else {}
        segments = [list(segment) for segment in selection.segments]
        return facts | ({"segments": segments} if segments else {})

    def _check_segments(self, rows: object, position: int) -> None:
        """Refuse a state whose samples before `position` were of other versions than ours are.

        Raises:
            ValueError: they were, or `rows` are no segments.
        """
        whole = (Segment(self.data_sha256, self.samples),)
        own = self._reader.selection.segments or whole
        theirs = own[:1] if rows is None else parse_segments(rows)
        first = find_divergence(own, theirs)
        if first is not None and first < position:
            raise ValueError(
                f"a state of another stream: from position {first} on its version was another"
            )

    @property
    def damaged(self) -> Mapping[int, Damage]:
        """The damaged samples this stream has found, by id."""
        return self._reader.quarantine.known

    @property
    def read_ahead(self) -> int:
        """Batches that were read and waited for DALI when the last one was requested, 0..prefetch.

        0: storage, checksums or the feed hold the stream back.
        """
        return self._loader.ready if self._loader else 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: the one pass has ended.
            DataError: a sample is damaged and `strict`, or more than replacing can mend.
            StoreError: a shard could not be fetched.
            UsageError: the augmentation has changed the shape of an image; the stream is closed.
            ValueError: the stream was closed.
        """
        while True:
            if self._loader is None:
                raise ValueError("this stream was closed")
            try:
                encoded, decoded = self._loader.run()
                break
            except DecodeFailure as failure:
                self._restart_without(self._loader, failure)
            except UsageError:  # that batch is lost: the next pixels would get its ids
                self.close()
                raise
        start, images = perf_counter(), decoded.images
        if self._ledger is not None:
            self._record(self._ledger, encoded, decoded)
        batch = Batch(
            ids=torch.from_numpy(encoded.ids),
            images=images,
            labels=to_device(torch.from_numpy(encoded.labels), images.device),
            weights=to_device(torch.from_numpy(encoded.weights), images.device),
            replaced=torch.from_numpy(encoded.ids != encoded.due),
            position=encoded.position,
            fields=encoded.fields,
            masks=dict(zip(self._reader.config.masks, decoded.masks, strict=True)),
            _reader=self._reader.shard_reader,
        )
        self._position = encoded.position
        self.waits.handover += perf_counter() - start
        return batch

    def flush(self) -> None:
        """Write what the ledger still holds back: call it before a checkpoint names a position.

        On a GPU it waits until the checksums of the batches taken so far are computed.
        """
        if self._ledger is not None:
            self._ledger.flush()

    def close(self) -> None:
        """Stop reading and decoding, and let files and memory go. Batches stay valid."""
        if self._loader is not None:
            for dataset in self._datasets:  # first: the reader may be waiting for a shard
                dataset.close()
            self._loader.close()
            self._loader = None
            if self._ledger is not None:
                self._ledger.close()
            self._reader.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_ledger(self, config: StreamConfig) -> Ledger:
        """Open the ledger that a config names, or close the stream and raise."""
        assert config.ledger
        try:
            selection, encoding = self._reader.selection, self._reader.shard_reader.encoding
            header = LedgerHeader.of(config, selection, encoding)
            return Ledger(Path(config.ledger), header, selection)
        except BaseException:
            self.close()
            raise

    def _record(self, ledger: Ledger, encoded: EncodedBatch, decoded: DecodedBatch) -> None:
        """Record a batch: its pixels, or its crops, and what else its checksums are made of."""
        given, pixels, facts = encoded.input, decoded.images, list[npt.NDArray[Any] | None]()
        if ledger.checksum == "stored-crc32":
            crcs = self._reader.shard_reader.read_crcs(encoded.ids).astype(np.uint32)
            facts = [crcs, given.x, given.y, given.flip, given.mean, given.divisor]
        elif decoded.crops is not None:
            pixels, facts = decoded.crops, [given.flip, given.mean, given.divisor]
        known = [one for one in facts if one is not None]
        ledger.record(encoded.first, encoded.due, encoded.ids, pixels, known)

    def _restart_without(self, loader: Loader, failure: DecodeFailure) -> None:
        """Restart at the batch that failed, without the samples that cannot be decoded."""
        samples = failure.batch.ids[failure.places].tolist()
        damages = [self._reader.shard_reader.make_damage(sample, UNDECODABLE) for sample in samples]
        self._reader.add_damage(damages)
        loader.close()
        self._loader = Loader(self._reader, failure.batch.start, self.waits)


class EpochIterable(IterableDataset[Batch]):
    """A stream cut into epochs of `stream.steps_per_epoch` batches each, as frameworks want it.

        for epoch in range(90):
            for batch in iterable:

    Each `for` begins where the one before has ended, even if that was left early; the first
    after a resume delivers the rest of the epoch that was cut. Batches cross the borders between
    two passes over the data, so an epoch here is up to a batch longer than a pass, and drifts
    against it: `batch.position // stream.samples` counts the passes. A stream with `once` starts
    again from its first sample with each `for`.

    `torch.utils.data.DataLoader(iterable, batch_size=None)` takes it without workers: a stream has
    threads of its own, which neither a fork nor a pickle can hold.
    """

    def __init__(self, stream: Stream) -> None:
        """Args: the stream; who opened it closes it."""
        self.stream = stream
        self._first: int | None = None  # position at which the epoch began
        self._resumes = True

    def __len__(self) -> int:
        return self.stream.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Deliver the next epoch, or the rest of one that was resumed.

        Raises:
            UsageError: in a worker process of a `DataLoader`.
            DuetError, ValueError: as `Stream.__next__`.
        """
        if get_worker_info() is not None:
            self._refuse_to_leave()
        stream, batch_size = self.stream, self.stream._reader.config.batch_size
        left = self._count_left()
        if not self._resumes or left <= 0:
            if stream._reader.config.once and stream._position > 0:
                stream.load_state_dict(stream.state_dict() | {"position": 0})
            self._first, left = stream._position, len(self) * batch_size
        self._resumes = False
        yield from itertools.islice(stream, math.ceil(left / batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream, and where its epoch began; the same on every rank."""
        return self.stream.state_dict() | {"epoch_start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as `Stream.load_state_dict`; it takes the state of a stream, too."""
        self.stream.load_state_dict(state)
        self._first, self._resumes = state.get("epoch_start"), True

    @property
    def _start(self) -> int:
        """Position at which the epoch began; unknown, that of equal epochs from position 0 on."""
        length = len(self) * self.stream._reader.config.batch_size
        return self.stream._position // length * length if self._first is None else self._first

    def _count_left(self) -> int:
        """Return the number of samples that the epoch lacks, 0 or less at its end."""
        if self.stream._reader.config.once:
            return self.stream.samples - self.stream._position
        length = len(self) * self.stream._reader.config.batch_size
        return self._start + length - self.stream._position

    def __reduce__(self) -> NoReturn:
        self._refuse_to_leave()

    def _refuse_to_leave(self) -> NoReturn:
        raise UsageError(
            "a Stream cannot be used in another process than the one that opened it: it has "
            "threads of its own; give DataLoader num_workers=0 (settings threads, prefetch)"
        )


def _check_cache(reader: BatchReader) -> None:
    """Refuse a cache so small that shards would be downloaded again and again.

    Raises:
        UsageError: says how much it should hold.
    """
    datasets = reader.datasets
    remote = [not isinstance(dataset, LocalDataset) for dataset in datasets]
    if not any(remote):
        return
    config, parts = reader.config, reader.shard_reader.parts
    cached = [
        shard.bytes if is_cached else 0
        for part, is_cached in zip(parts, remote, strict=True)
        for shard in part.shards
    ]
    needed = [shard for shard in reader.order.list_shards(config.position) if cached[shard]]
    # A pass in stored order reads shard after shard; the others are only prefetched.
    needed = needed[:1] if config.once else needed
    size = sum(cached[shard] for shard in needed)
    metadata = sum(  # not *.partial: another process's, gone the next moment
        path.stat().st_size
        for dataset, is_cached in zip(datasets, remote, strict=True)
        for path in (dataset.folder.iterdir() if is_cached else ())
        if path.suffix in (".json", ".npy", ".npz", ".txt")
    )
    if size + metadata > config.cache_size:
        raise UsageError(
            f"a cache of {config.cache_size:,} bytes cannot hold the {len(needed)} shards "
            f"({size:,} bytes) that are read at a time, and the index; "
            "give a larger --cache-size, or --shuffle block with a smaller --window"
        )
