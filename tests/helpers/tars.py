"""Writes tars for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def tar_of(
    path: Path,
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    mode: str = "w",
    folders: Iterable[str] = (),
    **options: Any,
) -> Path:
    """Write a tar: folders, then files in their order; a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name in folders:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
