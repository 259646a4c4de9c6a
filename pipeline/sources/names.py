"""What the name of a file, or the word of a list, may be."""

from __future__ import annotations

from pipeline.sources.listing import PICTURE_ENDINGS

NO_PICTURE = "no picture: unknown file ending"
"""Why a file is left out whose name ends as no picture's does."""

NO_FILE = "no regular file: a link that leads nowhere, or a device"
"""Why a name in a folder is left out that is neither a file nor a folder."""


def is_picture(name: str) -> bool:
    """Whether a name ends as pictures do, in capital or small letters."""
    return name.lower().endswith(PICTURE_ENDINGS)


def is_hidden(name: str) -> bool:
    """Whether a member of a tar, or a folder that it lies in, begins with a dot."""
    if name[:1] != "." and "/." not in name:
        return False
    return any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))


def is_class(word: str) -> bool:
    """Whether a list may call a class so: no path, and no number that counts we know not what."""
    return word.isprintable() and "/" not in word and word.strip(".0123456789") != ""
