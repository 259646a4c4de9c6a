"""How the stream that is measured is set, and its parts opened one by one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.asked import Asked
from pipeline.batches import Stream
from pipeline.dataset.images import Encoding
from pipeline.opened import Opened
from pipeline.remote.dataset import CACHE_SIZE, DataSet, is_remote, open_dataset
from pipeline.stream.decode import Decoder, Device, Feed
from pipeline.stream.loader import Loaded
from pipeline.stream.order import Shuffle


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The arguments of `Stream` that its speed depends on."""

    data: str
    split: str = "train"
    device: Device = "cpu"
    shuffle: Shuffle = "full"
    window: int = 16
    batch_size: int = 128
    threads: int = len(os.sched_getaffinity(0))
    prefetch: int = 2
    hw_decoder_load: float = 1.0
    cache: str | None = None
    cache_size: int = CACHE_SIZE
    cores: int = len(os.sched_getaffinity(0))
    """That the stream may keep busy."""

    def but(self, **changes: Any) -> Setting:
        """The same with some of it changed."""
        return replace(self, **changes)

    @property
    def remote(self) -> bool:
        """Whether the data set is in a store."""
        return is_remote(self.data)

    def stream(self, position: int = 0, ledger: Path | None = None) -> Stream:
        """Open the stream.

        Raises:
            DuetError: as `Stream` does.
        """
        return Stream(
            self.data, position=position, split=self.split, device=self.device,
            shuffle=self.shuffle, window=self.window, batch_size=self.batch_size,
            threads=self.threads, prefetch=self.prefetch, hw_decoder_load=self.hw_decoder_load,
            cache=self.cache, cache_size=self.cache_size, ledger=ledger,
        )  # fmt: skip

    @property
    def asked(self) -> Asked:
        """The same as the parts of the stream take it.

        Raises:
            ValueError: a number is out of range.
        """
        return Asked(
            split=self.split, batch_size=self.batch_size, seed=0, position=0, rank=0, world_size=1,
            device=self.device, view="random", once=False, shuffle=self.shuffle,
            window=self.window, colour=0.1, colour_divide=False, mean="channel",
            threads=self.threads, prefetch=self.prefetch, hw_decoder_load=self.hw_decoder_load,
        )  # fmt: skip


class Parts(Opened):
    """What a stream of some setting is made of, to be measured part by part."""

    def __init__(self, setting: Setting, dataset: DataSet) -> None:
        """Open them; `opened` closes them as well."""
        super().__init__(setting.asked, dataset)
        self.setting = setting
        self.encoding: Encoding = self.storage.encoding

    @property
    def bytes_each(self) -> float:
        """Bytes of a stored picture, on average, tar headers included."""
        shards = self.storage.shards
        return sum(shard.bytes for shard in shards) / len(self.storage)

    def loaded(self, batches: int, position: int = 0) -> list[Loaded]:
        """The first batches from a position, read and kept."""
        return list(itertools.islice(self.reader().batches(position), batches))

    def touch(self, pictures: int) -> None:
        """Bring the first pictures of the stream into memory: a clock then sees no disk."""
        reader, size = self.reader(), self.setting.batch_size
        for loaded in itertools.islice(
            reader.batches(0), min(pictures, len(self.storage)) // size + 1
        ):
            reader.give_back(loaded)

    def decoder(self, feeds: list[Feed], threads: int, load: float | None = None) -> Decoder:
        """A decoder that is given the same feeds again and again.

        `load` is another hardware-decoder load than the setting's.
        """
        setting = self.setting
        return Decoder(
            itertools.cycle(feeds).__next__, batch_size=setting.batch_size, device=setting.device,
            threads=threads, prefetch=setting.prefetch, size=224, encoding=self.encoding,
            hw_decoder_load=setting.hw_decoder_load if load is None else load,
        )  # fmt: skip


@contextmanager
def opened(setting: Setting) -> Iterator[Parts]:
    """Open the parts of a stream.

    Raises:
        DuetError: as `Stream` does.
    """
    with closing(
        open_dataset(setting.data, cache=setting.cache, cache_size=setting.cache_size)
    ) as dataset:
        parts = Parts(setting, dataset)
        try:
            yield parts
        finally:
            parts.storage.close()
