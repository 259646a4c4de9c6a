"""The loaders of `benchmarks/resume.py`, one small module each, and what judges them.

    judge      what a trainer saw, and what is missing, repeated, reordered or other in it
    images     the images: written, read, damaged
    consumer   the trainer's process, one for each rank
    cases      the cases, and a loader's way through them

An adapter module has two functions: `prepare(folder)` writes the images in the library's format;
`open_loader(setup, states)` opens a loader on one rank, with the states that all ranks saved if it
resumes. Each adapter's docstring names the library's own page about its state, and is as good a
user of the library as that page teaches.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

ALL = frozenset({"middle", "border", "world", "workers", "seed"})


@dataclass(frozen=True, kw_only=True)
class ResumePeer:
    """One column of the table."""

    title: str
    """Name in the table."""
    adapter: str
    """Name of the module in this package; empty where there is nothing to run."""
    module: str | None = None
    """Import name of the library; None for what Duet itself needs."""
    libraries: tuple[str, ...]
    """Names on the package index, for the versions."""
    page: str
    """The library's own page or file about its state."""
    offers: frozenset[str] = ALL
    """Ways of resuming that its docs offer: in the `middle` of an epoch, at a `border`, in another
    `world`, with other `workers`; `seed` if it shuffles. The cases of the others are left blank."""
    note: str = ""
    """Remark under the table."""

    @property
    def missing(self) -> str:
        """Reason why it cannot run, or nothing."""
        if not self.adapter:
            return self.note
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return ""
        return f"not installed: pip install {' '.join(self.libraries)}"

    def versions(self) -> dict[str, str]:
        """Return the version of each library that is installed."""
        found = {}
        for name in self.libraries:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


PEERS = {
    "duet": ResumePeer(
        title="Duet",
        adapter="duet_stream",
        libraries=("duet-stream",),
        page="docs/stream.md, In a framework",
        note="loops are of full batches and cross from pass to pass, so that an epoch of 13 "
        "batches has 208 of 203 samples; the passes are whole. Loader workers are threads",
    ),
    "webdataset": ResumePeer(
        title="webdataset + StatefulDataLoader",
        adapter="webdataset_stateful",
        module="torchdata",
        libraries=("webdataset", "torchdata"),
        page="meta-pytorch/data, torchdata/stateful_dataloader/README.md",
        offers=frozenset({"middle", "border", "seed"}),
        note="the loader reads and drops what was delivered, and counts these batches twice "
        "(_num_yielded), so that the next resume skips as many; data set and loader anew each "
        "epoch",
    ),
    "litdata": ResumePeer(
        title="litData",
        adapter="litdata_chunks",
        module="litdata",
        libraries=("litdata",),
        page="Lightning-AI/litData, README, Pause, resume data streaming",
        note="on other ranks or workers the rest of the epoch is dealt anew (streaming/elastic.py)",
    ),
    "mosaicml": ResumePeer(
        title="mosaicml streaming",
        adapter="mosaicml_mds",
        module="streaming",
        libraries=("mosaicml-streaming",),
        page="mosaicml/streaming, fast_resumption.md, elastic_determinism.md",
        note="at another seed the epoch is finished in the old order, the next follow the new "
        "seed; a damaged shard is named in a worker's log, and the loader waits for it without end",
    ),
    "datasets": ResumePeer(
        title="HF datasets, streaming + StatefulDataLoader",
        adapter="datasets_stateful",
        module="datasets",
        libraries=("datasets", "torchdata"),
        page="huggingface/datasets, use_with_pytorch.mdx, stream.mdx",
        offers=frozenset({"middle", "border", "seed"}),
        note="documented: samples in the shuffle buffers (here 32 in each of two workers) are "
        "lost at a resume",
    ),
    "datasets-unshuffled": ResumePeer(
        title="HF datasets, the same, not shuffled",
        adapter="datasets_unshuffled",
        module="datasets",
        libraries=("datasets", "torchdata"),
        page="huggingface/datasets, use_with_pytorch.mdx, stream.mdx",
        offers=frozenset({"middle", "border"}),
    ),
    "grain": ResumePeer(
        title="Grain",
        adapter="grain_dataset",
        module="grain",
        libraries=("grain", "array-record"),
        page="google/grain, docs, Checkpointing; grain.experimental.ElasticIterator",
        note="ranks and workers change with ElasticIterator, which drops the last, short batch; "
        "mp_prefetch alone ends with an IndexError",
    ),
    "spdl": ResumePeer(
        title="SPDL sampler",
        adapter="spdl_sampler",
        module="spdl",
        libraries=("spdl",),
        page="spdl.source.DistributedRandomSampler.shuffle",
        offers=frozenset({"border"}),
        note="no state within an epoch in its docs; loader workers are threads",
    ),
    "dali": ResumePeer(
        title="DALI readers.webdataset",
        adapter="dali_reader",
        libraries=("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        page="DALI user guide, advanced_topics_checkpointing",
        offers=frozenset({"middle", "border", "workers", "seed"}),
        note="loader workers are threads",
    ),
    "ffcv": ResumePeer(
        title="FFCV",
        adapter="",
        libraries=("ffcv",),
        page="libffcv/ffcv, making_dataloaders.rst",
        offers=frozenset(),
        note="its docs have no way of saving or setting a loader's place, so no case can be run",
    ),
}
"""All that are judged, in the order of the table."""
