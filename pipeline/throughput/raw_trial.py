"""What raw pictures would give: some of the set's own, packed raw and streamed for real."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.stream.loader import Loaded
from pipeline.throughput.clock import Load, Rate
from pipeline.throughput.setting import Setting, opened
from pipeline.throughput.stream_rate import running

PICTURES = 1024
"""Raw ones take 197 kB each: a fifth of a gigabyte, which no processor cache holds."""


def measure(setting: Setting, loaded: Sequence[Loaded], seconds: float) -> tuple[Rate, float]:
    """Pack pictures raw in a temporary folder, and run the stream on them.

    Returns:
        pictures a second, all of them in the page cache, and the bytes of a picture.

    Raises:
        OSError, subprocess.CalledProcessError: there is no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="duet-raw-") as scratch:
        source, packed = Path(scratch) / "jpegs", Path(scratch) / "packed"
        unpack(loaded, source, PICTURES)
        subprocess.run(
            [sys.executable, "-m", "pipeline.build_shards", str(packed), "--train", str(source),
             "--encoding", "raw", "--samples-per-shard", "256"],
            check=True, capture_output=True,
        )  # fmt: skip
        raw = setting.but(data=str(packed), split="train", shuffle="full", cache=None)
        with opened(raw) as parts:
            # Their first epoch copies them out of the files, the next ones do not (`Storage`).
            epoch = -(-len(parts.storage) // raw.batch_size)
            with running(raw) as run:
                run.window(0, epoch)
                load = Load()
                rates = tuple(run.window(seconds / 5) for _ in range(5))
            return Rate(rates, load.cores(), load.others()), parts.bytes_each


def unpack(batches: Iterable[Loaded], folder: Path, most: int) -> None:
    """Write up to `most` JPEGs of some batches as files, in a folder for each class."""
    written = 0
    for batch in batches:
        for number, label, picture in zip(
            batch.ids.tolist(), batch.labels.tolist(), batch.feed.pictures, strict=True
        ):
            path = folder / str(label) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.tobytes())
            if (written := written + 1) >= most:
                return
