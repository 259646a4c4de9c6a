"""Operators of DALI, imported at their first use: commands that decode nothing run without DALI.

`from pipeline.stream import operators as dali`, then `dali.fn`, `dali.types`, `dali.Pipeline`,
`dali.feed_ndarray`, and what else `__all__` lists.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pipeline.tools.errors import SetupError, summarize_error
from pipeline.tools.packages import suggest_extra

if TYPE_CHECKING:
    from nvidia.dali import fn, types
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
    from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

__all__ = [
    "DataNode", "Pipeline", "do_not_convert", "feed_ndarray", "fn", "pipeline_def", "to_torch_type",
    "types",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import DALI, and return one of its names.

    Raises:
        SetupError: DALI is missing, or does not load.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_dali()
    return globals()[name]


def require_dali() -> None:
    """Raise unless DALI can be found; it is not imported.

    Raises:
        SetupError: it is missing; names the extras that bring it.
    """
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        raise SetupError(
            f"NVIDIA DALI, which decodes the images, is missing; {suggest_extra('cuda13')} (cuda12 "
            "for a driver before 580; without a GPU either)"
        )


def import_dali() -> None:
    """Import DALI's modules; raises as `__getattr__`."""
    if "fn" in globals():
        return
    require_dali()
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.data_node import DataNode
        from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
        from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
    except (ImportError, OSError) as error:  # a library of the system is missing
        raise SetupError(
            f"NVIDIA DALI does not load ({summarize_error(error)}); duet doctor says more"
        ) from error
    globals().update(
        DataNode=DataNode,
        Pipeline=Pipeline,
        do_not_convert=do_not_convert,
        feed_ndarray=feed_ndarray,
        fn=fn,
        pipeline_def=pipeline_def,
        to_torch_type=to_torch_type,
        types=types,
    )
