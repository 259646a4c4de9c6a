"""litData: 64 MB chunks of the stored JPEGs, `StreamingDataset`, Pillow; a worker process a core.

Chunks lie on the local disk already. The loader's workers stay over epochs. Its own JPEG decoding
(torchvision's) is not used: Pillow was faster here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from peers.work import SHARD, Floats, Work, pillow_crop, repeat_files, stored


class _Images(StreamingDataset):  # type: ignore[misc]
    crop = ""

    def __getitem__(self, place: Any) -> torch.Tensor:
        return pillow_crop(super().__getitem__(place), self.crop)


def _same(jpeg: bytes) -> bytes:
    return jpeg


def prepare(work: Work) -> None:
    """Write the chunks; a small set several times over, since an epoch is one pass over them."""
    _write(work, list(stored(work)) * work.passes, "chunks", chunk_bytes="64MB")


def _write(work: Work, images: list[bytes], name: str, **size: Any) -> None:
    optimize(
        fn=_same,
        inputs=images,
        output_dir=str(work.folder / name),
        **size,
        num_workers=work.cores,
        start_method="fork",
        verbose=False,
    )


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    loader = _load(work, "chunks")
    floats = Floats(work.mean)
    while True:
        yield from map(floats, loader)


def prepare_resume(work: Work, samples: int) -> dict[str, Any]:
    """Make a set of so many samples; return the state in the middle of its first epoch.

    Its chunks are links to one of a thousand images, its index names them all. The state is that
    of a loader after some batches, with other numbers of samples.
    """
    _write(work, list(itertools.islice(itertools.cycle(stored(work)), SHARD)), "large",
           chunk_size=SHARD)  # fmt: skip
    index = work.folder / "large" / "index.json"
    found = json.loads(index.read_text())
    chunk = found["chunks"][0]
    links = repeat_files(index.parent, chunk["filename"], samples // SHARD, "chunk-0-{}.bin")
    found["chunks"] = [chunk | {"filename": name} for name in links]
    index.write_text(json.dumps(found))
    loader = _load(work, "large")
    next(iter(loader))
    state: dict[str, Any] = loader.state_dict()
    each = samples // 2 // work.cores
    state["num_samples_yielded"] = each * work.cores
    state["dataset"]["num_samples_yielded"] = each * work.cores
    return state


def resume(work: Work, samples: int, state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield batches from a state on."""
    loader = _load(work, "large")
    loader.load_state_dict(state)
    yield from map(Floats(work.mean), loader)


def _load(work: Work, name: str) -> StreamingDataLoader:
    images = _Images(str(work.folder / name), shuffle=True, drop_last=True)
    images.crop = work.crop
    return StreamingDataLoader(
        images,
        batch_size=work.batch_size,
        num_workers=work.cores,
        persistent_workers=True,
    )
