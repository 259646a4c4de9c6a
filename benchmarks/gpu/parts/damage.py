"""Effects of an image that cannot be decoded, tried in a process that it may end.

`try_damage` starts such processes, one for each load, and returns what they printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parts.copies import damage_sample, read_samples
from pipeline.batches import Stream
from pipeline.stream.config import Device, StreamConfig
from pipeline.stream.decode import Decoder, DecoderInput
from pipeline.stream.quarantine import TrialDecoder
from pipeline.tools.processes import tie_to_parent

SAMPLES, BAD, BATCH = 64, 37, 16
SECONDS = 90
"""Timeout of a process."""

Edit = Callable[[bytes], bytes]

EDITS: dict[str, Edit] = {
    "second half missing": lambda jpeg: jpeg[: len(jpeg) // 2],
    "last two bytes missing": lambda jpeg: jpeg[:-2],
    "400 zeros in the scan": lambda jpeg: jpeg[:4000] + bytes(400) + jpeg[4400:],
    "scan missing": lambda jpeg: jpeg[:640],
    "no JPEG at all": lambda jpeg: b"not a JPEG".ljust(len(jpeg)),
}


def try_damage(data: Path, device: Device, loads: list[float]) -> list[dict[str, Any]]:
    """Return what was seen, a row for each load and way to damage an image."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "parts.damage", str(data.resolve()), device]
    rows = []
    with ExitStack() as stack:
        running = []
        for load in loads:  # at the same time: nothing is timed here
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(
                [*command, str(load)], stdout=output, stderr=log, env=environment
            )
            running.append((load, child, output, log))
        for load, child, output, log in running:
            with suppress(subprocess.TimeoutExpired):
                child.wait(SECONDS)
            child.kill()
            code = child.wait()
            output.seek(0)
            rows += [{"load": load} | json.loads(line) for line in output if line.endswith("\n")]
            log.seek(0)
            last = log.read().strip().splitlines()[-1:] if code else []
            ending = {"exit_code": code, "last_words": "".join(last)[:300]}
            rows.append({"load": load, "case": "the process itself"} | ending)
    return rows


def main() -> None:
    """Try everything with one load; a line of JSON as soon as each is known."""
    tie_to_parent()
    data, load = Path(sys.argv[1]), float(sys.argv[3])
    device: Device = "gpu" if sys.argv[2] == "gpu" else "cpu"
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        sound, _ = _streamed(
            damage_sample(data, Path(folder) / "sound", SAMPLES, BAD, bytes), device, load
        )
        for number, (name, edit) in enumerate(EDITS.items()):
            damaged = damage_sample(data, Path(folder) / str(number), SAMPLES, BAD, edit)
            _print(case=name, way="stream", **_replaced(damaged, device, load, sound))
            bad = read_samples(damaged, SAMPLES)[BAD]
            _print(case=name, way="alone", raises=not TrialDecoder().can_decode(bad))
    # Last what our stream avoids, because it may be the end of this process.
    for name, edit in EDITS.items():
        _print(case=name, way="in a batch, not screened", **_bare(data, edit, device, load))


def _streamed(data: Path, device: Device, load: float) -> tuple[list[Any], list[int]]:
    with Stream(data, batch_size=BATCH, device=device, hw_decoder_load=load, threads=2) as stream:
        batches = [next(stream) for _ in range(2 * SAMPLES // BATCH)]
        return [(b.ids, b.replaced, b.images.float().cpu()) for b in batches], [*stream.damaged]


def _replaced(data: Path, device: Device, load: float, sound: list[Any]) -> dict[str, Any]:
    """Return which samples a stream replaced, and how far the others are from what they were."""
    try:
        found, damaged = _streamed(data, device, load)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    most, replaced = 0.0, 0
    for (ids, away, images), (_, _, wanted) in zip(found, sound, strict=True):
        replaced += int(away.sum())
        keep = ~away & (ids != BAD)
        most = max(most, (images[keep] - wanted[keep]).abs().max().item())
    return {"found": damaged == [BAD], "replaced": replaced, "max_change_of_others": most}


def _bare(data: Path, edit: Edit, device: Device, load: float) -> dict[str, Any]:
    """Return what the graph alone does with a batch that holds the damaged image."""
    stored = read_samples(data, BATCH)
    stored[3] = np.frombuffer(edit(stored[3].tobytes()), np.uint8)
    half, none = np.full(len(stored), 0.5, np.float32), np.zeros(len(stored), np.int32)
    feed = DecoderInput(stored, half, half, none, np.zeros((len(stored), 3), np.float32))
    config = StreamConfig(batch_size=len(stored), device=device, threads=2, hw_decoder_load=load)
    decoder = Decoder(lambda: feed, config)
    try:
        images = decoder.run().images
        if device == "gpu":
            torch.cuda.synchronize()
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"raises": True, "words": " ".join(lines)[-200:]}
    return {"raises": False, "grey_levels": images[3].float().mean((1, 2)).tolist()}


def _print(**row: Any) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
