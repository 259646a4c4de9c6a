"""Images to batches: everything between a folder of JPEGs and a tensor on the device.

batches         `Stream`, `Batch`: the public face
build_shards    command: images to a sealed data set
index_shards    command: index another tool's WebDataset shards in place
withdraw        command: a version of a set without some samples
verify          command: a data set against its manifest, ledgers against the order
describe        command: what a data set holds, as a table and a page
throughput      command: how fast the stream is, and what limits it
demo_images     command: draw a small data set to try everything on
options         flags of the commands
sources         where images come from
packing         images to chunks to shards
stream          stored bytes to batches
remote          object stores: download, upload, cache
dataset         the on-disk format
tools           files, processes, errors, progress
"""

import sys
from typing import TYPE_CHECKING, Any

from pipeline.tools.startup import Renames, install_for_module

if TYPE_CHECKING:
    from pipeline.batches import Batch, Stream, StreamConfig

__all__ = ["Batch", "Stream", "StreamConfig"]

sys.meta_path.insert(
    0,
    Renames(
        {
            "pipeline.demo_pictures": "pipeline.demo_images",
            "pipeline.index": "pipeline.index_shards",
            "pipeline.inspect": "pipeline.describe",
        }
    ),
)

install_for_module()


def __getattr__(name: str) -> Any:
    """Import `Stream`, `Batch` and `StreamConfig` at their first use: they bring torch and DALI.

    Raises:
        SetupError: this is not Linux, or DALI is missing.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.tools.errors import check_platform

    check_platform()
    from pipeline import batches
    from pipeline.stream.operators import import_dali

    import_dali()

    return getattr(batches, name)
