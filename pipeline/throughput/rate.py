"""The rate of the stream alone, or of DALI's own WebDataset reader, as the yardstick.

The first batches are left out; the rate is the median over equal windows, with the slowest and
the fastest beside it. DALI's reader runs on the same shards with the same graph.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import torch

from pipeline.native import NativeReader
from pipeline.remote.dataset import open_dataset
from pipeline.throughput.setting import Setting
from pipeline.throughput.stream_rate import WARM_UP
from pipeline.tools.errors import UsageError
from pipeline.tools.progress import Progress


def measure(
    setting: Setting, *, reader: str, windows: int, batches: int, ledger: Path | None = None
) -> list[float]:
    """Return the img/s of each window, after a warm-up that is not counted.

    Args:
        setting: of the stream.
        reader: `stream` is ours, `native` is DALI's.
        windows: of time.
        batches: in each of them.
        ledger: folder for a ledger.

    Raises:
        UsageError: DALI's reader and a set in a store.
    """
    rates = []
    source = _native(setting) if reader == "native" else _stream(setting, ledger)
    with closing(source):
        for _ in itertools.islice(source, WARM_UP):
            pass
        pictures = batches * setting.batch_size
        with Progress("measuring", total=windows * pictures, unit="img") as progress:
            for _ in range(windows):
                start = time.perf_counter()
                for _ in itertools.islice(source, batches):
                    pass
                if setting.device == "gpu":
                    torch.cuda.synchronize()
                rates.append(pictures / (time.perf_counter() - start))
                progress.advance(pictures)
    return rates


def _stream(setting: Setting, ledger: Path | None) -> Generator[torch.Tensor]:
    with setting.stream(ledger=ledger) as stream:
        for batch in stream:
            yield batch.images


def _native(setting: Setting) -> Generator[torch.Tensor]:
    if setting.remote:
        raise UsageError(f"--reader native reads local folders only, not {setting.data}")
    reader = NativeReader(
        open_dataset(setting.data).folder,
        split=setting.split,
        batch_size=setting.batch_size,
        device=setting.device,
        threads=setting.threads,
    )
    while True:
        yield next(reader)


def main(
    setting: Setting, *, reader: str, windows: int, batches: int, ledger: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Measure and say the rate."""
    rates = measure(setting, reader=reader, windows=windows, batches=batches, ledger=ledger)
    median, low, high = statistics.median(rates), min(rates), max(rates)
    if as_json:
        facts = {
            "reader": reader,
            "device": setting.device,
            "threads": setting.threads,
            "batch_size": setting.batch_size,
            "img_s": round(median, 1),
            "windows": [round(rate, 1) for rate in rates],
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    sys.stderr.write(
        f"{reader} reader, {setting.device}, {setting.threads} threads, batch "
        f"{setting.batch_size}: {median:,.0f} img/s (windows {low:,.0f} to {high:,.0f})\n"
    )
    return 0
