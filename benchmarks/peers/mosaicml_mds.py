"""mosaicml streaming: MDS shards of the stored JPEGs, Pillow; a worker process a core.

Its default shuffle (`py1e`), shards on the local disk already, no hash check (its default). The
loader's workers stay over epochs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import torch
from torch.utils.data import DataLoader

from peers.work import Floats, Work, pillow_crop, stored

_TORCHVISION: dict[str, dict[str, object]] = {
    "torchvision": {},
    "torchvision.datasets": {"VisionDataset": object},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"to_tensor": None},
}


def _stand_in_for_torchvision() -> None:
    """Let `streaming` be imported where torchvision cannot be.

    It imports torchvision for data sets that are not used here. Beside a torch without CUDA the
    torchvision of the package index fails: `operator torchvision::nms does not exist`.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name, content in _TORCHVISION.items():
            sys.modules[name] = module_from_spec(ModuleSpec(name, None))
            vars(sys.modules[name]).update(content)


_stand_in_for_torchvision()
from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402


class _Images(StreamingDataset):  # type: ignore[misc, unused-ignore]
    crop = ""

    def __getitem__(self, place: Any) -> torch.Tensor:
        return pillow_crop(super().__getitem__(place)["jpeg"], self.crop)


def prepare(work: Work) -> None:
    """Write the shards."""
    with MDSWriter(out=str(work.folder / "mds"), columns={"jpeg": "bytes"}) as writer:
        for jpeg in stored(work):
            writer.write({"jpeg": jpeg})


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    dataset = _Images(
        streams=[Stream(local=str(work.folder / "mds"), repeat=work.passes)],
        batch_size=work.batch_size,
        shuffle=True,
    )
    dataset.crop = work.crop
    loader: DataLoader[torch.Tensor] = DataLoader(
        dataset,
        work.batch_size,
        num_workers=work.cores,
        persistent_workers=True,
        drop_last=True,
    )
    floats = Floats(work.mean)
    while True:
        yield from map(floats, loader)
