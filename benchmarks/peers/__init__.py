"""The loaders that `benchmarks/loaders.py` compares, one small module each.

An adapter module has two functions. `prepare(work)` converts the images into the loader's own
format under `work.folder`; `batches(work)` yields batches without end. Where a loader can resume
within an epoch, `prepare_resume(work, samples)` makes a set of so many images out of the few and
returns the loader's state in mid-epoch; `resume(work, samples, state)` yields batches from there.
All are called in a process of the loader's own (`turns.py`), so that no library sees another's
threads, and nothing is imported before it is asked for. Each adapter's docstring states the
settings that it runs its loader with.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One line of the comparison."""

    title: str
    """Name in the table."""
    adapter: str
    """Name of the module in this package."""
    lane: Literal["jpeg", "raw"] = "jpeg"
    """Encoding of the data set that it reads."""
    module: str | None = None
    """The library's import name; None where Duet itself needs the library anyway."""
    library: str | None = None
    """The library's name on the package index, for its version."""
    install: str = ""
    """Way to install it."""
    copies: bool = False
    """True if it reads a copy of the images in a format of its own."""
    planes: bool = False
    """True to ask for contiguous [b, 3, 224, 224] memory where the library's own way is a
    channels-last view of [b, 224, 224, 3]."""
    gpu: bool = False
    """True if it can decode on a GPU too."""
    no_resume: str = ""
    """Reason why it is not resumed in the middle of a large epoch; empty where it is."""

    @property
    def installed(self) -> bool:
        """True if the library is installed (it is not imported)."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


_FFCV: dict[str, Any] = {
    "adapter": "ffcv_beton",
    "copies": True,
    "module": "ffcv",
    "library": "ffcv",
    "install": "pip install --no-build-isolation ffcv==1.0.2 opencv-python-headless"
    " (Debian: apt install g++ pkg-config libturbojpeg0-dev libopencv-dev)",
    "no_resume": "its docs have no state",
}

PEERS = {
    "limit": Peer(
        title="bare libjpeg-turbo (the limit)",
        adapter="bare_decode",
        module="simplejpeg",
        library="simplejpeg",
        install="pip install simplejpeg",
        no_resume="no loader",
    ),
    "ours": Peer(title="Duet stream", adapter="duet_stream", gpu=True),
    "native": Peer(
        title="DALI readers.webdataset",
        adapter="dali_native",
        gpu=True,
        no_resume="its state is only to be had by reading half of the epoch",
    ),
    "dynamic": Peer(
        title="DALI dynamic mode, readers.Webdataset",
        adapter="dali_dynamic",
        no_resume="checkpoints are not supported in capture mode",
    ),
    "torch": Peer(
        title="torch DataLoader + Pillow",
        adapter="torch_pillow",
        module="PIL",
        library="pillow",
        copies=True,
        no_resume="DataLoader has no state",
    ),
    "webdataset": Peer(
        title="webdataset + Pillow",
        adapter="webdataset_pillow",
        module="webdataset",
        library="webdataset",
        no_resume="it has no state",
    ),
    "torchcodec": Peer(
        title="TorchCodec + threads",
        adapter="torchcodec_threads",
        module="torchcodec",
        library="torchcodec",
        install="pip install torchcodec, beside a torch with CUDA",
        copies=True,
        no_resume="a decoder, without an order",
    ),
    "spdl": Peer(
        title="SPDL pipeline",
        adapter="spdl_pipeline",
        module="spdl",
        library="spdl",
        install="pip install spdl (Debian: apt install libavdevice59 libavfilter8)",
        copies=True,
        no_resume="its sampler has no state within an epoch",
    ),
    "ffcv": Peer(title="FFCV JPEG, channels last", **_FFCV),
    "ffcv-planes": Peer(title="FFCV JPEG, planes", planes=True, **_FFCV),
    "grain": Peer(
        title="Grain + Pillow",
        adapter="grain_dataset",
        module="grain",
        library="grain",
        install="pip install grain",
        copies=True,
    ),
    "litdata": Peer(
        title="litData + Pillow",
        adapter="litdata_chunks",
        module="litdata",
        library="litdata",
        install="pip install litdata",
        copies=True,
    ),
    "mosaicml": Peer(
        title="mosaicml streaming + Pillow",
        adapter="mosaicml_mds",
        module="streaming",
        library="mosaicml-streaming",
        install="pip install mosaicml-streaming",
        copies=True,
    ),
    "ours-raw": Peer(
        title="Duet stream raw",
        adapter="duet_stream",
        lane="raw",
        gpu=True,
        no_resume="as with JPEGs",
    ),
    "native-raw": Peer(
        title="DALI readers.webdataset raw",
        adapter="dali_native",
        lane="raw",
        gpu=True,
        no_resume="as with JPEGs",
    ),
    "ffcv-raw": Peer(title="FFCV raw, channels last", lane="raw", **_FFCV),
    "ffcv-raw-planes": Peer(
        title="FFCV raw, planes",
        lane="raw",
        planes=True,
        **_FFCV,
    ),
}
"""All that can be compared, in the order of the table."""
