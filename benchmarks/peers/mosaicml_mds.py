"""mosaicml streaming: MDS shards of the stored JPEGs, Pillow; a worker process a core.

Its default shuffle (`py1e`), shards on the local disk already, no hash check (its default). The
loader's workers stay over epochs.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import torch
from torch.utils.data import DataLoader

from peers.work import SHARD, Floats, Work, pillow_crop, repeat_files, stored

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
    dataset = _open(work, "mds", work.passes)
    floats = Floats(work.mean)
    loader = _load(work, dataset)
    while True:
        yield from map(floats, loader)


def prepare_resume(work: Work, samples: int) -> dict[str, Any]:
    """Make a set of so many samples; return the state in the middle of its first epoch.

    Its shards are links to one of a thousand images, its index names them all. The state is what
    `StreamingDataset.state_dict` returns there.
    """
    images = list(itertools.islice(itertools.cycle(stored(work)), SHARD))
    with MDSWriter(
        out=str(work.folder / "large"), columns={"jpeg": "bytes"}, size_limit=None
    ) as writer:
        for jpeg in images:
            writer.write({"jpeg": jpeg})
    index = work.folder / "large" / "index.json"
    found = json.loads(index.read_text())
    (shard,) = found["shards"]
    name = shard["raw_data"]["basename"]
    found["shards"] = [
        shard | {"raw_data": shard["raw_data"] | {"basename": link}}
        for link in repeat_files(index.parent, name, samples // SHARD, "link.{:05}.mds")
    ]
    index.write_text(json.dumps(found))
    dataset = _open(work, "large")
    return dataset.state_dict(samples // 2, from_beginning=True) | {"epoch": 0}


def resume(work: Work, samples: int, state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield batches from a state on."""
    dataset = _open(work, "large")
    dataset.load_state_dict(state)
    yield from map(Floats(work.mean), _load(work, dataset))


def _open(work: Work, name: str, passes: int = 1) -> _Images:
    dataset = _Images(
        streams=[Stream(local=str(work.folder / name), repeat=passes)],
        batch_size=work.batch_size,
        shuffle=True,
    )
    dataset.crop = work.crop
    return dataset


def _load(work: Work, dataset: _Images) -> DataLoader[torch.Tensor]:
    return DataLoader(
        dataset,
        work.batch_size,
        num_workers=work.cores,
        persistent_workers=True,
        drop_last=True,
    )
