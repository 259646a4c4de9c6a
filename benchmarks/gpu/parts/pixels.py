"""Are a GPU's pixels those of the CPU, and the same every time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parts.lanes import Setting
from pipeline.batches import Stream
from pipeline.stream.config import Device

MEAN = 0.5
"""Grey levels by which GPU and CPU may differ on average."""
MOST = 4.0
"""Grey levels by which all but one of a thousand values may differ. Both decoders round the inverse
transform, the chroma upsampling and the colour conversion, each to about a level; blue takes 1.8
times of it."""
LEVELS = 16
"""Steps of a grey level in which differences are counted."""
QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)
CHUNK = 64


def read_pixels(
    data: Path, device: Device, setting: Setting, samples: int, world_size: int = 1
) -> torch.Tensor:
    """Return the first pixels of a stream with the full recipe, [samples, 3, 224, 224] float16.

    On the host, in the order of the whole job, whichever rank they came from.
    """
    global_batch = -(-setting.batch // world_size) * world_size
    steps = -(-samples // global_batch)
    ranks = []
    for rank in range(world_size):
        with Stream(
            data,
            batch_size=global_batch,
            rank=rank,
            world_size=world_size,
            device=device,
            threads=setting.threads,
            prefetch=setting.prefetch,
            hw_decoder_load=setting.load,
        ) as stream:
            ranks.append([next(stream).images.half().cpu() for _ in range(steps)])
    in_order = [slices[step] for step in range(steps) for slices in ranks]
    return torch.cat(in_order)[:samples]


def measure_difference(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Return how two stacks of images differ, in grey levels of 0..255."""
    counts = torch.zeros(512 * LEVELS + 1, dtype=torch.int64)
    total = bias = most = 0.0
    samples = 0
    for a, b in zip(_chunks(found), _chunks(wanted), strict=True):
        delta = a.float() - b.float()
        size = delta.abs()
        bias += delta.sum(dtype=torch.float64).item()
        total += size.sum(dtype=torch.float64).item()
        most = max(most, size.max().item())
        samples += int((size.flatten(1).amax(1) > 0).sum())
        steps = (size * LEVELS).ceil().clamp(max=len(counts) - 1).to(torch.int64)
        counts += torch.bincount(steps.flatten(), minlength=len(counts))
    below = counts.cumsum(0) / counts.sum()
    quantiles = {f"{q:g}": int((below < q).sum()) / LEVELS for q in QUANTILES}
    return {
        "samples": len(found),
        "differing": samples,
        "mean": round(total / found.numel(), 4),
        "bias": round(bias / found.numel(), 4),
        "quantiles": quantiles,
        "max": most,
    }


def is_within_bounds(row: dict[str, Any]) -> bool:
    """Return whether a difference is within the bounds."""
    return bool(row["mean"] <= MEAN and row["quantiles"]["0.999"] <= MOST)


def compare(
    data: Path, device: Device, setting: Setting, samples: int, host: torch.Tensor
) -> list[dict[str, Any]]:
    """Return the differences of one setting to the CPU, and to itself in other circumstances.

    `host` is what `read_pixels` gives on the CPU. Raw pixels are to be those of the CPU exactly.
    """
    first = read_pixels(data, device, setting, samples)
    smaller = replace(setting, batch=max(1, setting.batch // 4))
    other = replace(setting, threads=max(1, setting.threads // 2), prefetch=setting.prefetch + 1)
    rows = [{"against": "the CPU"} | measure_difference(first, host)]
    for name, changed, world_size in (
        ("itself again", setting, 1),
        ("a quarter of the batch", smaller, 1),
        ("two ranks", setting, 2),
        ("half the threads, one batch more ahead", other, 1),
    ):
        again = read_pixels(data, device, changed, samples, world_size)
        rows.append({"against": name} | measure_difference(again, first))
    return [{"load": setting.load} | row for row in rows]


def _chunks(images: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(images, CHUNK)
