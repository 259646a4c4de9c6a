"""Names of files and tar members: images, archives, and bystanders that are passed over.

A name in a source is an image, a class, a shard, or a reject, unless it is one of the few kinds of
bystanders that are known here. An archive is never a bystander: a whole class may be in it.
"""

from __future__ import annotations

from pipeline.dataset.samples import IMAGE_KINDS
from pipeline.dataset.tar import Member

IMAGE_ENDINGS = tuple(f".{kind}" for kind in IMAGE_KINDS)
"""Endings of the names of images, in lower case."""
TAR = ".tar"
PARQUET = ".parquet"

_ARCHIVE_ENDINGS = (
    *(TAR, ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma"),
    *(".z", ".zip", ".7z", ".rar"),
)
_DOCUMENT_ENDINGS = (
    *(".md", ".rst", ".txt", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml"),
    *(".html", ".htm", ".pdf", ".log", ".py", ".sh", ".ipynb", ".bib", ".cff", ".mat", ".url"),
    *(".md5", ".sha1", ".sha256", ".idx", ".index", ".index.npy"),
    *("stats.npz", "aggregates.npz", PARQUET),
)
"""Endings of texts, lists, checksums, indices and tables, none of which holds images."""
_DOCUMENTS = frozenset(
    {
        *("AUTHORS", "CHANGELOG", "CHECKSUMS", "CITATION", "CLASSES", "COPYING", "DATASHEET"),
        *("LICENCE", "LICENSE", "MD5SUMS", "NOTICE", "README", "SHA1SUMS", "SHA256SUMS", "TERMS"),
        *("VERSION", "_SUCCESS"),
    }
)
_SYSTEM = frozenset(
    {
        *("__MACOSX", ".DS_Store", ".AppleDouble", ".Spotlight-V100", ".fseventsd", ".Trashes"),
        *(".TemporaryItems", ".DocumentRevisions-V100", "@eaDir", "Thumbs.db", "desktop.ini"),
        *("lost+found", "$RECYCLE.BIN", "System Volume Information", ".Trash", ".thumbnails"),
        *(".git", ".svn", ".hg", ".dvc", ".cache", ".huggingface", ".ipynb_checkpoints"),
        *(".idea", ".vscode", ".venv", ".snapshot", ".build"),
    }
)
"""Names of files and folders that systems and tools leave anywhere."""

NO_IMAGE = "no image: unknown file ending"
"""Reason for rejecting a file whose name does not end like that of an image."""

ARCHIVE = "no image: an archive, which is not looked into; unpack it"
"""Reason for rejecting an archive among the images of a class."""

HIDDEN = "hidden: its name, or that of its folder, begins with a dot; rename it"
"""Reason for rejecting an image, an archive or a folder of a hidden name."""

NO_FILE = "no regular file: a link that leads nowhere, or a device"
"""Reason for rejecting a name in a folder that is neither a file nor a folder."""

LINK = "no regular file: a link, a folder or a device"
"""Reason for rejecting a member of a tar that is named as an image."""

HARD_LINK = "no regular file: a hard link to another member; pack with tar --hard-dereference"
"""Reason for rejecting a member of a tar that is another name of one before it."""

SPARSE = "stored sparsely, which is not read; pack with tar without --sparse"
"""Reason for rejecting a member of a tar whose zeros were left out."""


def is_image(name: str) -> bool:
    """Return whether a name ends like that of an image, in capital or small letters."""
    return name.lower().endswith(IMAGE_ENDINGS)


def is_tar(name: str) -> bool:
    """Return whether a name ends in `.tar`, in capital or small letters."""
    return name[-4:].lower() == TAR


def is_archive(name: str) -> bool:
    """Return whether a name ends like that of a tar or of a packed or compressed file."""
    return name.lower().endswith(_ARCHIVE_ENDINGS)


def is_document(name: str) -> bool:
    """Return whether a file of this name, beside classes or shards, is known to hold no images."""
    if is_archive(name) or is_image(name):
        return False
    known = name.lower().endswith(_DOCUMENT_ENDINGS) or name.partition(".")[0].upper() in _DOCUMENTS
    return known or name[:1] == "."  # hidden, and neither an image nor an archive


def is_system(name: str) -> bool:
    """Return whether a path has a part that systems or tools leave anywhere: `a/._1.jpg`."""
    return name[:2] == "._" or "/._" in name or not _SYSTEM.isdisjoint(name.split("/"))


def is_hidden(name: str) -> bool:
    """Return whether the name of a tar member, or of a folder in it, begins with a dot."""
    if name[:1] != "." and "/." not in name:
        return False
    return any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))


def describe_no_image(name: str) -> str:
    """Return the reason for rejecting a file whose name is not that of an image."""
    return ARCHIVE if is_archive(name) else NO_IMAGE


def describe_special(member: Member) -> str:
    """Return the reason for rejecting a member of a tar that is named as an image, but no file."""
    if member.sparse:
        return SPARSE
    return HARD_LINK if member.hard_link else LINK


def member_name(image: str, field: str) -> str:
    """Return the name of the file beside an image that is its member: `1.seg.png` of `1.jpg`."""
    return f"{image.rpartition('.')[0]}.{field}"


def is_class(word: str) -> bool:
    """Return whether a list may name a class so: no path, and no number of unknown meaning."""
    return word.isprintable() and "/" not in word and word.strip(".0123456789") != ""
