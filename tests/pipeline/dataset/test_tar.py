from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.dataset.tar import EXTENSION_LIMIT, Member, read_members
from pipeline.tools.errors import UsageError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KINDS = [
    *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE),
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
]
WITH_DATA = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}

names = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    st.lists(st.text("abc/.é漢", min_size=1, max_size=60), min_size=1, max_size=6).map("/".join),
    st.sampled_from(
        ["../../etc/passwd.jpg", "/abs.jpg", "./x.jpg", "a//b.jpg", "-", "\x1b[2J.jpg"]
    ),
)
entries = st.lists(
    st.tuples(names, st.sampled_from(KINDS), st.integers(0, 1500), names), min_size=1, max_size=8
)


def archive(found, format=tarfile.PAX_FORMAT, shared=None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, pax_headers=shared) as tar:
        for name, kind, size, target in found:
            if kind == tarfile.AREGTYPE:  # with a slash at its end it would be a folder
                name = name.replace("/", "_")
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = size if kind in WITH_DATA else 0
            info.linkname = target if kind in {tarfile.SYMTYPE, tarfile.LNKTYPE} else ""
            tar.addfile(info, io.BytesIO(bytes(size)))
    return file.getvalue()


def ours(data: bytes, start: int = 0, stop: int | None = None) -> list[Member]:
    return list(read_members(io.BytesIO(data), "x.tar", start, stop))


def tarfiles(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        return [
            Member(
                info.name,
                info.offset_data,
                info.size if info.isreg() else 0,
                info.isreg(),
                info.islnk(),
            )
            for info in tar
        ]


def header(name: str = "a.jpg", kind: bytes = b"0", size: int = 0, **changed: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for where, value in changed.items():
        at = {"size": 124, "sum": 148, "kind": 156}[where.rstrip("_")]
        raw[at : at + len(value)] = value
    if "sum_" not in changed:
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


END = bytes(1024)


@settings(max_examples=200, deadline=None)
@given(entries, st.sampled_from(FORMATS), st.booleans())
def test_members_are_those_of_tarfile(found, format, commented):
    shared = {"comment": "global"} if commented and format == tarfile.PAX_FORMAT else None
    try:
        data = archive(found, format, shared)
    except ValueError:
        assume(False)  # a name that does not fit into ustar
    plain = [one._replace(name=one.name.rstrip("/")) for one in ours(data)]
    assert plain == [one._replace(name=one.name.rstrip("/")) for one in tarfiles(data)]
    # The same as a tar inside a file: places count from that file's start.
    inside = ours(b"x" * 700 + data + b"y" * 900, 700, 700 + len(data))
    assert [(one.name, one.offset - 700) for one in inside] == [
        (one.name, one.offset) for one in ours(data)
    ]


def test_real_contents_lie_where_it_says():
    contents = {f"{'long/' * number}{number}.jpg": bytes([number]) * number for number in range(99)}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = file.getvalue()
    assert {one.name: data[one.offset :][: one.size] for one in ours(data)} == contents


def test_sizes_of_8_gib_and_more_are_read_in_gnu_and_in_pax():
    class Holes(io.RawIOBase):
        """A file of 10 GB that is zeros but for its start and its end."""

        start, size = b"", 0
        place = 0

        def seek(self, place, whence=0):
            self.place = place + (self.size if whence == 2 else 0)
            return self.place

        def read(self, count=-1):
            assert count <= 1 << 20
            count = max(0, min(count, self.size - self.place))
            data = self.start[self.place : self.place + count]
            self.place += count
            return data + bytes(count - len(data))

    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("large.jpg")
        info.size = 10**10
        file = Holes()
        file.start = info.tobuf(format)
        file.size = len(file.start) + 10**10 + 1024
        assert list(read_members(file, "x.tar")) == [
            Member("large.jpg", len(file.start), 10**10, True)
        ]


def test_large_members_are_not_read():
    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            self.count += size
            return super().read(size)

    data = archive([(f"{number}.jpg", tarfile.REGTYPE, 400_000, "") for number in range(20)])
    file = Counting(data)
    assert len(list(read_members(file, "x.tar"))) == 20
    assert file.count < len(data) / 25


def test_v7_folders_are_known_by_their_slash():
    data = header("a/", kind=b"\0") + header("a/1.jpg", kind=b"\0", size=3) + bytes(512) + END
    assert (
        ours(data)
        == tarfiles(data)
        == [
            Member("a", 512, 0, False),
            Member("a/1.jpg", 1024, 3, True),
        ]
    )


def test_old_checksums_of_signed_bytes_are_known():
    raw = bytearray(header("h\u00e9.jpg"))
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in raw)
    assert [one.name for one in ours(bytes(raw) + END)] == ["h\u00e9.jpg"]
    assert ours(bytes(raw) + END) == tarfiles(bytes(raw) + END)


def test_a_cut_tar_is_never_taken_for_a_whole_one():
    found = [(f"{'d' * 120}{number}.jpg", tarfile.REGTYPE, 600, "") for number in range(3)]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = archive(found, format)
        whole = len(ours(data))
        last = ours(data)[-1].offset + 1024  # the end mark begins here
        assert whole == 3
        for stop in range(0, last + 1, 64):
            with pytest.raises(UsageError, match=r"x\.tar cannot be read"):
                ours(data[:stop])


DAMAGED = {
    "empty": (b"", "it is empty"),
    "garbage": (b"no tar" * 999, "no valid header at byte 0"),
    "checksum": (header(sum_=b"000001\0 ") + END, "no valid header at byte 0"),
    "no checksum": (header(sum_=b"nonsense") + END, "no valid header at byte 0"),
    "in the middle": (header() + b"\x01" * 512 + END, "no valid header at byte 512"),
    "no end": (header(), "no end mark"),
    "negative": (header(size_=b"\xff" * 12) + END, "without a valid size"),
    "minus": (header(size_=b"-1\0") + END, "without a valid size"),
    "no number": (header(size_=b"12x45\0") + END, "without a valid size"),
    "beyond": (header(size=513) + bytes(512), r"a\.jpg goes on after its end"),
    "absurd": (header(size_=b"\x80" + b"\xff" * 11) + END, r"a\.jpg goes on after its end"),
    "gigantic name": (
        header(kind=b"L", size=1 << 32) + END,
        "an extension header of 4,294,967,296",
    ),
    "just too long": (
        header(kind=b"x", size=EXTENSION_LIMIT + 1) + bytes(EXTENSION_LIMIT + 1024),
        "an extension header of 65,537 bytes",
    ),
    "cut name": (header(kind=b"L", size=600) + bytes(512), "inside an extension header"),
    "half a header": (header(kind=b"L", size=2) + b"a".ljust(512, b"\0") + END, "first half"),
    "pax without length": (
        header(kind=b"x", size=9) + b"path=a.jpg"[:9].ljust(512, b"\0") + END,
        "damaged extension",
    ),
    "pax of length 0": (
        header(kind=b"x", size=9) + b"0 path=a\n".ljust(512, b"\0") + END,
        "damaged extension",
    ),
    "pax without a blank": (
        header(kind=b"x", size=31) + (b"A" * 30 + b"\n").ljust(512, b"\0") + END,
        "damaged extension",
    ),
    "pax without a second blank": (
        header(kind=b"x", size=42) + (b"11 path=ab\n" + b"A" * 30 + b"\n").ljust(512, b"\0") + END,
        "damaged extension",
    ),
    "pax too long": (
        header(kind=b"x", size=9) + b"9999 pa=a".ljust(512, b"\0") + END,
        "damaged extension",
    ),
    "pax size": (
        header(kind=b"x", size=11) + b"11 size=-1\n".ljust(512, b"\0") + header() + END,
        "without a valid size",
    ),
    "pax size of many digits": (
        header(kind=b"x", size=9010)
        + (b"9010 size=" + b"9" * 8999 + b"\n").ljust(9216, b"\0")
        + header()
        + END,
        "without a valid size",
    ),
    "sparse": (header(kind=b"S") + END, r"a\.jpg is stored sparsely"),
    "joined": (header() + END + header("b.jpg") + END, "goes on after its end mark, at byte 1,536"),
    "gzip": (gzip.compress(header() + END), "compressed with gzip"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "bzip2": (bz2.compress(header() + END), "compressed with bzip2"),
    "xz": (lzma.compress(header() + END), "compressed with xz"),
    "escape": (header("\x1b[2J.jpg", size=9999), r"\\x1b\[2J\.jpg goes on"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named_in_one_line(data, message):
    with pytest.raises(UsageError, match=message) as caught:
        ours(data)
    text = str(caught.value)
    assert text.startswith("tar x.tar cannot be read (")
    assert text.isprintable()


def test_pax_names_win_over_the_header():
    record = b"20 path=renamed.jpg\n"
    data = header(kind=b"x", size=len(record)) + record.ljust(512, b"\0") + header() + END
    assert [one.name for one in ours(data)] == ["renamed.jpg"]
    assert ours(data) == tarfiles(data)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damage_ends_in_one_error_or_in_members_inside_the_file(data):
    format = data.draw(st.sampled_from(FORMATS))
    name = "d" * 120 + "/a.jpg" if format != tarfile.USTAR_FORMAT else "a.jpg"
    raw = bytearray(
        archive([(name, tarfile.REGTYPE, 700, ""), ("b", tarfile.DIRTYPE, 0, "")], format)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw), 5000) - 1))
        raw[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # with a good checksum damage gets further
            head = at // 512 * 512
            raw[head + 148 : head + 156] = b" " * 8
            raw[head + 148 : head + 156] = b"%06o\0 " % sum(raw[head : head + 512])
    message = ""
    try:
        for member in ours(bytes(raw)):
            assert 0 <= member.offset <= member.offset + member.size <= len(raw)
    except UsageError as error:
        message = str(error)
    assert not message or message.isprintable()
