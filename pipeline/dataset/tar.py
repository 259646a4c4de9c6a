"""Reads the headers of a tar: name and byte range of each member.

Python's `tarfile` takes 25 us a member, reads an extension header of any size into memory, and
takes damage in the middle for the end. This reader takes a tenth of that, has bounded memory, and
raises on damage. It reads V7, ustar, GNU (long names, large numbers) and pax (path, size).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from pipeline.tools.errors import MEDIUM_ERRORS, DamagedSource
from pipeline.tools.files import describe_foreign

ENCODING = ("utf-8", "surrogateescape")
"""Encoding of names, and its error handler: bytes that are no UTF-8 survive a round trip."""
BLOCK = 512
EXTENSION_LIMIT = 1 << 16
"""Size limit of an extension header in bytes; a path has at most 4 KiB."""

_HEADER = struct.Struct("100s24x12s20xc100x8s80x155s12x")
"""Name, size, type, magic and prefix."""
_REGULAR = frozenset({b"0", b"\0", b"7"})
_EXTENSIONS = frozenset({b"L", b"K", b"x", b"X", b"g"})
_WITHOUT_DATA = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
"""Links, devices, folders and pipes: no data follow, whatever their size field says."""
_ZEROS = bytes(BLOCK)
_SMALLEST, _LARGEST, _NEAR = 8 * BLOCK, 1 << 20, 1 << 16
_MOST_PADDING = 1 << 20
"""Most bytes of zeros that end a tar: 10 KiB are usual, and 1 MiB is the largest block of a tape.
More of them are the rest of a download that was given its size at its beginning."""


class Member(NamedTuple):
    """An entry of a tar."""

    name: str
    offset: int
    """Offset of its data in bytes, from the start of the file that holds the tar."""
    size: int
    regular: bool
    """True for a file with data: no folder, link, device or pipe."""
    hard_link: bool = False
    """True for another name of a file before it, whose data are stored there."""
    sparse: bool = False
    """True for a file that is stored without its zeros (and is not `regular` here)."""


class TarFault(DamagedSource):
    """Damage of a tar, whose members before the fault can be read."""

    def __init__(
        self, name: str, offset: int, reason: str, lost: int = 0, cut: Member | None = None
    ) -> None:
        needs = "it must be whole and not compressed"
        message = f"tar {escape(name)} cannot be read ({reason}); {needs}"
        super().__init__(message, name, offset, reason, lost)
        self.cut = cut
        """The member that goes on after the end of the tar, if that is the fault."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.offset, self.reason, self.lost, self.cut)


def read_members(
    file: BinaryIO,
    name: str,
    start: int = 0,
    stop: int | None = None,
    lenient: bool = False,
) -> Iterator[Member]:
    """Yield the members of a tar in the order in which they lie there.

    Args:
        file: seekable, and best unbuffered: small members are read in large blocks, and large
            members are skipped by a seek.
        name: of the tar, for messages.
        start: where the tar begins in `file`, in bytes.
        stop: where it ends; the end of the file if None.
        lenient: read as a source, not as a shard that others must read, too: tars that were
            joined are one, a sparse member is yielded, and what a disk cannot read is damage.

    Raises:
        TarFault: damaged, cut off, compressed, with an absurd header; if not `lenient`, joined or
            with a sparse member.
        OSError: the file cannot be read.
    """
    window = _TarWindow(file, name, start, stop, lenient)
    extensions = _Extensions(window)
    offset = start
    while (found := window.next_header(offset)) is not None:
        header, offset = found
        raw, size_field, kind, magic, prefix = _HEADER.unpack(header)
        size = window.number(size_field, offset)
        if kind in _EXTENSIONS:
            extensions.add(kind, offset + BLOCK, size)
            offset += BLOCK - size // -BLOCK * BLOCK
            continue
        raw = raw.partition(b"\0")[0]
        if prefix[0] and not magic.startswith(b"ustar "):  # GNU keeps other things there
            raw = prefix.partition(b"\0")[0] + b"/" + raw
        sparse = False
        if extensions.has_any:
            raw, size, sparse = extensions.apply(raw, size, offset)
        if kind in _WITHOUT_DATA or (kind == b"\0" and raw.endswith(b"/")):  # V7's folders
            size, raw, regular = 0, raw.rstrip(b"/"), False
        else:
            regular = kind in _REGULAR and not sparse
        if kind == b"S":
            offset, sparse = window.skip_map(header, offset), True
        member = Member(raw.decode(*ENCODING), offset + BLOCK, size, regular, kind == b"1", sparse)
        window.check(member, offset)
        yield member
        offset += BLOCK - size // -BLOCK * BLOCK
    if extensions.own:
        raise window.damage("it ends after the first half of a header", offset)


def escape(name: str) -> str:
    """Return a name for a message, without characters that control the terminal."""
    return name if name.isprintable() else repr(name)[1:-1]


_SPARSE, _SPARSE_NAME = b"GNU.sparse.", b"GNU.sparse.name"
"""Beginning of the keys of a pax header that tell of a sparse file, and the key of its name."""


class _Extensions:
    """Contents of extension headers: for the next member, and for all that follow."""

    def __init__(self, window: _TarWindow) -> None:
        self._window = window
        self.own: dict[bytes, bytes] = {}
        self._shared: dict[bytes, bytes] = {}
        self.has_any = False

    def add(self, kind: bytes, offset: int, size: int) -> None:
        """Read the content of an extension header."""
        content = self._window.extension(offset, size)
        if kind == b"L":
            self.own.setdefault(b"path", content.partition(b"\0")[0])
        elif kind == b"g":
            self._shared |= self._window.records(content, offset)
        elif kind != b"K":  # the target of a link is not used
            self.own = self._window.records(content, offset) | self.own  # the first one wins
        self.has_any = bool(self.own or self._shared)

    def apply(self, raw: bytes, size: int, offset: int) -> tuple[bytes, int, bool]:
        """Return name, size and sparseness of the member whose header is at `offset`."""
        known = self._shared | self.own
        if b"size" in known:
            size = self._window.number(known[b"size"], offset, base=10)
        self.own, self.has_any = {}, bool(self._shared)
        name = known.get(_SPARSE_NAME, known.get(b"path", raw))
        return name, size, _SPARSE in known


class _TarWindow:
    """The block of a tar that is in memory; raises what is wrong with it."""

    def __init__(
        self, file: BinaryIO, name: str, start: int, stop: int | None, lenient: bool = False
    ) -> None:
        self._file, self._name, self._start = file, name, start
        self._lenient = lenient
        self.stop = file.seek(0, 2) if stop is None else stop
        self._block, self._base, self._length = b"", start, _SMALLEST

    def header(self, offset: int) -> bytes | None:
        """Return the checked header at `offset`, or None where the tar ends."""
        at = offset - self._base
        header = self._block[at : at + BLOCK]
        if len(header) < BLOCK:
            header = self._read(offset, BLOCK)
        if header == _ZEROS:
            if not self._lenient:
                self._check_end(offset + BLOCK)
            return None
        if len(header) < BLOCK:
            if self.stop == self._start:
                raise self.damage("it is empty", offset)
            raise self._header_error(
                header, offset, "it has no end mark, so more of it may be missing"
            )
        if not _is_checksum_right(header):
            raise self._header_error(header, offset, f"no valid header at byte {offset:,}")
        return header

    def next_header(self, offset: int) -> tuple[bytes, int] | None:
        """Return the header at `offset`, or the first of a tar joined there, and where it is.

        None where the tar ends.
        """
        while (header := self.header(offset)) is None:
            if not self._lenient or (following := self.find_next(offset)) is None:
                return None
            offset = following
        return header, offset

    def extension(self, offset: int, size: int) -> bytes:
        """Return the content of an extension header, if it is not too large."""
        if size > EXTENSION_LIMIT:
            raise self.damage(f"an extension header of {size:,} bytes at byte {offset:,}", offset)
        content = self._read(offset, size)
        if len(content) < size:
            raise self.damage("it ends inside an extension header", offset)
        return content

    def check(self, member: Member, offset: int) -> None:
        """Refuse a member that is not all there, or that is sparse."""
        if member.offset + member.size > self.stop:
            what = "goes on after its end"
        elif member.sparse and not self._lenient:
            what = "is stored sparsely"
        else:
            return
        raise self.damage(f"{escape(member.name[:200])} {what}", offset, member)

    def skip_map(self, header: bytes, offset: int) -> int:
        """Return the last block of the header of a sparse member, behind the map of its data."""
        more = header[482]
        while more:
            offset += BLOCK
            block = self._read(offset, BLOCK)
            if len(block) < BLOCK:
                raise self.damage("it ends inside the map of a sparse member", offset)
            more = block[504]
        return offset

    def find_next(self, offset: int) -> int | None:
        """Return where another tar begins behind the end mark at `offset`; None if none does.

        Raises:
            TarFault: there is something else, or there are more zeros than end a tar.
        """
        at, zeros = offset, True
        while at < self.stop and zeros:
            block = self._read(at, min(_LARGEST, self.stop - at))
            zeros = not block.strip(b"\0")
            at += len(block) if zeros else len(block) - len(block.lstrip(b"\0"))
            if not block:
                break
        if zeros:
            if at - offset > _MOST_PADDING:
                what = f"{at - offset:,} bytes of zeros at its end, as of an unfinished download"
                raise self.damage(what, offset)
            return None
        at -= (at - self._start) % BLOCK
        header = self._read(at, BLOCK)
        if len(header) < BLOCK or not _is_checksum_right(header):
            if at - offset == BLOCK:
                raise self.damage(f"a header of zeros at byte {offset:,}", offset)
            raise self.damage(f"other data after its end mark, at byte {at:,}", at)
        return at

    def number(self, field: bytes, offset: int, base: int = 8) -> int:
        """Return a size: octal or, of 8 GiB and more, binary (decimal in pax records)."""
        try:
            if base == 8 and field[0] == 0x80:
                size = int.from_bytes(field[1:], "big")
            else:
                size = int(field.partition(b"\0")[0].strip() or b"0", base)
        except ValueError:
            size = -1
        if size < 0:
            raise self.damage(f"a header without a valid size at byte {offset:,}", offset)
        return size

    def records(self, content: bytes, offset: int) -> dict[bytes, bytes]:
        """Return path and size from a pax header."""
        found, at = {}, 0
        while at < len(content) and content[at]:
            space = content.find(b" ", at, at + 20)
            length = content[at:space] if space > 0 else b""
            end = at + int(length) if length.isdigit() else 0
            if not at < space < end <= len(content) or content[end - 1] != 0x0A:
                raise self.damage(f"a damaged extension header at byte {offset:,}", offset)
            key, _, value = content[space + 1 : end - 1].partition(b"=")
            if key == b"path":
                found[key] = value.rstrip(b"/")
            elif key == b"size":
                found[key] = value
            elif key.startswith(_SPARSE):
                if not self._lenient:
                    raise self.damage(f"a sparse member at byte {offset:,}", offset)
                found |= {_SPARSE: b""} | ({key: value} if key == _SPARSE_NAME else {})
            at = end
        return found

    def damage(self, what: str, offset: int, cut: Member | None = None) -> TarFault:
        """Return an error for the tar, which is damaged at `offset`."""
        return TarFault(self._name, offset, what, self.stop - offset, cut)

    def _header_error(self, header: bytes, offset: int, what: str) -> TarFault:
        if offset == self._start and (foreign := describe_foreign(header)):
            what = f"it is {foreign}"
        return self.damage(what, offset)

    def _check_end(self, offset: int) -> None:
        """Raise if another tar follows: its members would be lost."""
        rest = self._read(offset, _NEAR)
        at = len(rest) - len(rest.lstrip(b"\0"))
        header = rest[at // BLOCK * BLOCK :][:BLOCK]
        if header[257:262] == b"ustar":
            raise self.damage(f"it goes on after its end mark, at byte {offset + at:,}", offset)

    def _read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, fewer where the tar ends."""
        at = offset - self._base
        if at < 0 or at + size > len(self._block):
            near = 0 <= at <= len(self._block) + _NEAR
            self._length = min(2 * self._length, _LARGEST) if near else _SMALLEST
            length = max(0, min(max(size, self._length), self.stop - offset))
            try:
                self._fill(offset, length)
            except OSError as error:
                if not self._lenient or error.errno not in MEDIUM_ERRORS:
                    raise
                self._fill_exactly(offset, size)
            at = 0
        return self._block[at : at + size]

    def _fill(self, offset: int, length: int) -> None:
        self._block, self._base = b"", offset
        self._file.seek(offset)
        while more := self._file.read(length - len(self._block)):
            self._block += more

    def _fill_exactly(self, offset: int, size: int) -> None:
        """Read no more than is asked for, where the disk fails to read what follows."""
        self._length = _SMALLEST
        try:
            self._fill(offset, min(size, self.stop - offset))
        except OSError as error:
            if error.errno not in MEDIUM_ERRORS:
                raise
            raise self.damage(f"{error.strerror} at byte {offset:,}", offset) from error


def _is_checksum_right(header: bytes) -> bool:
    """Return whether a header has its checksum, for which its own 8 bytes count as blanks."""
    try:
        wanted = int(header[148:154], 8)
    except ValueError:
        wanted = -1
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521; a plain sum takes 3 us.
    total = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
    if (wanted - 256 + 1) % 65521 == total and wanted > 0:
        return True
    try:  # rare forms: of 7 digits, or over signed bytes
        wanted = int(header[148:156].partition(b"\0")[0], 8)
    except ValueError:
        return False
    text = header[:148] + header[156:]
    total = 256 + sum(text)
    return wanted in (total, total - 256 * sum(byte > 127 for byte in text))
