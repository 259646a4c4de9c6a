"""Whether what arrived is the shard of the manifest, and whose fault it is if not."""

from __future__ import annotations

from pathlib import Path

from pipeline.dataset.manifest import Shard
from pipeline.stores.errors import Mismatch
from pipeline.tools.files import sha256


class Arrival:
    """Compares what arrived with the manifest, and knows the store's own damage when it sees it."""

    def __init__(self, shard: Shard) -> None:
        """Know nothing yet; `as_stored` is the hash of what was accepted although it is damaged."""
        self.as_stored: str | None = None
        self._shard = shard
        self._last = ""

    def __call__(self, arrived: Path) -> None:
        """Accept the file at `arrived`, or raise `Mismatch`."""
        size, found = arrived.stat().st_size, sha256(arrived)
        if size == self._shard.bytes and found == self._shard.sha256:
            return
        if size > 0 and found == self._last:
            # The same wrong bytes twice did not go wrong on the way. The CRC-32 of each sample
            # tells which of them are usable.
            self.as_stored = found
            return
        self._last = found
        if size != self._shard.bytes:
            raise Mismatch(f"it has {size} bytes, not the {self._shard.bytes} of the manifest")
        raise Mismatch("its bytes are not those of the manifest (SHA-256 differs)")
