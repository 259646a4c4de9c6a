"""Damaged sources: skipped from the fault on, listed with source, byte or row, and reason."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.dataset import tar as tars
from pipeline.dataset.tar import TarFault
from pipeline.sources import Listing, Reject, open_reader, scan
from pipeline.sources import folders as sources_folders
from pipeline.sources.listing import Unreadable, read_rejects
from pipeline.sources.names import SPARSE
from pipeline.tools.errors import UsageError
from tests.helpers.parquets import IMAGES, LABELS
from tests.helpers.parquets import write as write_parquet
from tests.helpers.range_servers import RangeServer
from tests.helpers.tars import tar_of
from tests.helpers.webdatasets import write_shards

SKIPPED = "damaged, and skipped from here on: "


def list_source(source: Path, scratch: Path, **options) -> Listing:
    return scan(str(source), scratch, split="train", **options)


def names(listing: Listing) -> list[str]:
    return sorted(listing.names)


def faults(listing: Listing) -> list[Reject]:
    found = list(listing.rejects())
    assert len(found) == listing.rejected
    return [one for one in found if one.reason.startswith(SKIPPED)]


def check_one_fault(
    source: Path, tmp_path: Path, lost: int, reason: str, offset: int | None = None
) -> Listing:
    """Return the listing of a source with one fault, which --strict refuses in one line."""
    listing = list_source(source, tmp_path / "lenient")
    (fault,) = faults(listing)
    assert reason in fault.reason
    assert fault.source is not None
    assert fault.name.startswith(fault.source)
    assert offset in (None, fault.offset)
    assert listing.lost + 1 == lost
    (note,) = [note for note in listing.notes if "is damaged" in note]
    assert f"about {lost} image" in note
    assert fault.name in note
    with pytest.raises(UsageError, match="cannot be read") as caught:
        list_source(source, tmp_path / "strict", strict=True)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 2
    return listing


def classes_of(folder: Path, count: int = 3) -> dict[str, bytes]:
    """Write tars `a`, `b` and `c` of ten images of 600 bytes; return their bytes."""
    found = {}
    for name in "abc"[:count]:
        members = {f"{name}{n}.jpg": bytes([n + 1]) * 600 for n in range(10)}
        found[name] = tar_of(folder / f"{name}.tar", members).read_bytes()
    return found


ENTRY = 512 + 1024
"""Bytes of an image of 600 bytes in a tar."""


@pytest.mark.parametrize(
    ("cut", "reason", "offset", "left"),
    [
        (3 * ENTRY + 700, "b3.jpg goes on after its end", 3 * ENTRY, 3),
        (3 * ENTRY + 100, "no end mark", 3 * ENTRY, 3),
        (4 * ENTRY, "no end mark", 4 * ENTRY, 4),
    ],
)
def test_a_cut_tar_of_a_class(tmp_path, cut, reason, offset, left):
    source = tmp_path / "s"
    whole = classes_of(source)
    (source / "b.tar").write_bytes(whole["b"][:cut])
    listing = check_one_fault(source, tmp_path, 10 - left, reason, offset)
    assert names(listing) == sorted(
        f"{name}{n}.jpg" for name in "abc" for n in range(left if name == "b" else 10)
    )


def test_a_tar_with_a_bad_header_a_hole_or_a_tail_of_zeros(tmp_path):
    source = tmp_path / "s"
    whole = classes_of(source)
    at = 6 * ENTRY
    spoiled = bytearray(whole["b"])
    spoiled[at : at + 100] = b"\xff" * 100
    (source / "b.tar").write_bytes(spoiled)
    listing = check_one_fault(source, tmp_path / "1", 7, f"no valid header at byte {at:,}", at)
    assert len(listing) == 26  # 4 are behind it; its padding at the end makes them 7
    spoiled[at : at + 512] = bytes(512)
    (source / "b.tar").write_bytes(spoiled)
    check_one_fault(source, tmp_path / "2", 7, f"a header of zeros at byte {at:,}", at)
    # What a download of known size has when it stopped; a hole takes no disk.
    with (source / "b.tar").open("r+b") as file:
        file.truncate(at)
        file.truncate(at + (3 << 20))
    listing = list_source(source, tmp_path / "3")
    assert f"{3 << 20:,} bytes of zeros at its end" in faults(listing)[0].reason
    assert len(listing) == 26
    (source / "b.tar").write_bytes(whole["b"] + b"junk" * 300)
    check_one_fault(source, tmp_path / "4", 1, "other data after its end mark", len(whole["b"]))
    (source / "b.tar").write_bytes(whole["b"] + bytes(300_000))
    assert not list_source(source, tmp_path / "5").rejected  # only padding


def test_shards_that_are_cut_damaged_or_not_there(tmp_path, monkeypatch):
    source = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    paths = sorted(source.glob("*.tar"))
    whole = paths[1].read_bytes()
    fifth = whole.index(b"00012.jpg")
    paths[1].write_bytes(whole[: fifth + 1000])
    listing = check_one_fault(source, tmp_path / "1", 2, "00012.jpg goes on after its end", fifth)
    # 8 a shard, 4 in the last: 6 on average, of which 4 are there; the half of a sample is told.
    assert len(listing) == 16
    assert "it has no image" in [one.reason for one in listing.rejects()]
    paths[1].write_bytes(b"<html>404</html>")
    listing = check_one_fault(source, tmp_path / "2", 6, "it is a web page", 0)
    assert len(listing) == 12

    paths[1].write_bytes(whole)
    denied = str(paths[1])
    real = open

    def refuse(path, *arguments, **options):
        if str(path) == denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    listing = check_one_fault(source, tmp_path / "3", 6, "cannot be opened: Permission denied")
    assert len(listing) == 12


def test_a_cut_shard_of_a_store(tmp_path):
    source = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    second = source / "train-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[: whole.index(b"00012.jpg") + 1000])
    with RangeServer(source) as server:
        address = f"{server.address}/train-{{000000..000002}}.tar"
        listing = scan(address, tmp_path / "scratch", split="train")
        assert len(listing) == 16
        (fault,) = faults(listing)
        assert fault.source == f"{server.address}/train-000001.tar"
        with pytest.raises(UsageError, match=r"000001\.tar cannot be read \(00012\.jpg goes on"):
            scan(address, tmp_path / "strict", split="train", strict=True)


class BadDisk(io.FileIO):
    """A file with a place that its disk cannot read."""

    bad = range(0)

    def read(self, size=-1):
        at = self.tell()
        if at < self.bad.stop and at + size > self.bad.start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


def test_a_disk_that_fails_in_the_middle_of_a_tar(tmp_path, monkeypatch):
    source = tmp_path / "s"
    classes_of(source)

    def open_bad(address, *_):
        file = BadDisk(address)
        file.bad = range(5 * ENTRY, 5 * ENTRY + 512) if address.endswith("b.tar") else range(0)
        return file

    monkeypatch.setattr("pipeline.sources.tars.open_file", open_bad)
    listing = check_one_fault(source, tmp_path, 8, "Input/output error at byte 7,680", 5 * ENTRY)
    assert len(listing) == 25


def test_a_failing_disk_of_a_label(tmp_path, monkeypatch):
    source = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    first = min(source.glob("*.tar")).read_bytes()
    at = first.index(b"00003.cls") + 512

    def open_bad(address, *_):
        file = BadDisk(address)
        file.bad = range(at, at + 1) if address.endswith("000.tar") else range(0)
        return file

    monkeypatch.setattr("pipeline.sources.tars.open_file", open_bad)
    monkeypatch.setattr(tars, "_SMALLEST", 512)
    monkeypatch.setattr(tars, "_NEAR", 0)
    listing = list_source(source, tmp_path / "scratch")
    assert "its label cannot be read: Input/output error" in [
        one.reason for one in listing.rejects()
    ]
    assert len(listing) == 19


def test_a_tar_of_tars_that_ends_inside_a_class(tmp_path):
    inner = classes_of(tmp_path / "inner")
    whole = tar_of(tmp_path / "s.tar", {f"{name}.tar": data for name, data in inner.items()})
    data = whole.read_bytes()
    begin = data.index(b"c0.jpg")  # the header of its first image
    whole.write_bytes(data[: begin + 4 * ENTRY + 900])
    # The header of the inner tar tells its size: of 20,480 bytes the first 6,144 are there.
    listing = check_one_fault(whole, tmp_path / "1", 7, "c4.jpg goes on after", begin + 4 * ENTRY)
    assert len(listing) == 24
    assert faults(listing)[0].name == f"{whole}/c.tar"
    # A fault inside a class costs the rest of that class, not the classes behind it.
    spoiled = bytearray(data)
    at = data.index(b"b2.jpg")
    spoiled[at : at + 512] = b"\xff" * 512
    whole.write_bytes(spoiled)
    listing = list_source(whole, tmp_path / "2")
    assert sorted(listing.classes) == ["a", "b", "c"]
    assert len(listing) == 22
    # Cut before the first image of a class, there is no such class.
    whole.write_bytes(data[: begin + 100])
    assert list_source(whole, tmp_path / "3").classes == ("a", "b")


def test_a_class_or_a_source_of_which_nothing_is_left_is_refused(tmp_path):
    source = tmp_path / "s"
    whole = classes_of(source)
    left = "; no image of class 'b' is left, so it is not skipped: mend it, or move it away"
    (source / "b.tar").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    wanted = r"b\.tar cannot be read \(it is compressed with gzip.*" + left
    with pytest.raises(UsageError, match=wanted):
        list_source(source, tmp_path / "1")
    (source / "b.tar").write_bytes(whole["b"][:700])
    with pytest.raises(UsageError, match=rf"b\.tar cannot be read \(b0\.jpg goes on.*{left}"):
        list_source(source, tmp_path / "4")
    for name in "ac":
        (source / f"{name}.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a\.tar cannot be read \(it is empty\)"):
        list_source(source, tmp_path / "2")
    write_parquet(tmp_path / "p/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read"):
        list_source(tmp_path / "p", tmp_path / "3")


def test_a_folder_that_cannot_be_listed_or_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    source = tmp_path / "s"
    for name in ("a/1", "a/more/2", "a/more/3", "b/4"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / f"{name}.jpg").write_bytes(b"x")
    real = os.scandir

    def fail(folder):
        if str(folder).endswith("more"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), folder)
        return real(folder)

    monkeypatch.setattr(sources_folders.os, "scandir", fail)
    listing = check_one_fault(source, tmp_path, 1, "the folder cannot be read: Input/output error")
    assert names(listing) == ["1.jpg", "4.jpg"]
    assert faults(listing)[0].source == str(source / "a/more")

    reader = open_reader(listing.containers[0])
    monkeypatch.setattr(os, "read", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O")))
    with pytest.raises(Unreadable, match="cannot be read: I/O"):
        reader.read("1.jpg", 0, -1)


def spoil_group(path: Path, group: int, column: str) -> None:
    """Overwrite a column of a row group of a parquet file."""
    meta = pq.ParquetFile(path).metadata.row_group(group)
    chunk = next(
        meta.column(n) for n in range(meta.num_columns) if meta.column(n).path_in_schema == column
    )
    with path.open("r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * chunk.total_compressed_size)


def test_a_row_group_whose_labels_cannot_be_read(tmp_path):
    path = write_parquet(tmp_path / "s/a.parquet")
    spoil_group(path, 1, "label")
    listing = check_one_fault(path, tmp_path, 6, "row group 1: ", 6)
    assert listing.rows["place"].tolist() == [*range(6), *range(12, 20)]
    reader = open_reader(listing.containers[0])
    assert reader.read("", 19, -1) == IMAGES[19]
    assert [listing.classes[row["label"]] for row in listing.rows] == [
        str(LABELS[place]) for place in listing.rows["place"]
    ]


def test_a_row_group_whose_images_cannot_be_read(tmp_path):
    path = write_parquet(tmp_path / "s/a.parquet")
    spoil_group(path, 2, "image.bytes")
    listing = list_source(path, tmp_path / "scratch")
    assert len(listing) == 20
    reader = open_reader(listing.containers[0])
    with pytest.raises(Unreadable, match="row group"):
        reader.read("", 13, -1)
    assert reader.read("", 19, -1) == IMAGES[19]
    reject = listing.make_reject(13, "no")
    assert reject == Reject(f"{path}/n13.JPEG", "no", str(path), 13)


def test_a_parquet_file_without_its_end(tmp_path):
    source = tmp_path / "s"
    for name in "abc":
        write_parquet(source / f"{name}.parquet")
    whole = (source / "b.parquet").read_bytes()
    (source / "b.parquet").write_bytes(whole[: len(whole) // 2])
    listing = check_one_fault(source, tmp_path, 20, "", 0)
    assert len(listing) == 40


def test_tars_that_were_joined_are_one(tmp_path):
    source = tmp_path / "s"
    whole = classes_of(source, 2)
    more = tar_of(tmp_path / "more", {"a0.jpg": b"new", "extra.jpg": b"y" * 9}).read_bytes()
    (source / "a.tar").write_bytes(whole["a"] + more)
    listing = list_source(source, tmp_path / "1", strict=True)
    assert "extra.jpg" in names(listing)
    assert len(listing) == 21
    assert "replaced by a later one" in listing.notes[0]
    reader = open_reader(listing.containers[0])
    place = list(listing.names).index("a0.jpg")
    row = listing.rows[place]
    assert reader.read("a0.jpg", int(row["place"]), int(row["size"])) == b"new"
    # The second one is cut: the fault is its own.
    (source / "a.tar").write_bytes(whole["a"] + more[:700])
    check_one_fault(source, tmp_path / "2", 1, "no end mark", len(whole["a"]) + 1024)
    # Joined shards; keys that come twice are samples of their own.
    shards = write_shards(tmp_path / "w", cls=lambda place: place % 4)
    paths = sorted(shards.glob("*.tar"))
    paths[0].write_bytes(paths[0].read_bytes() + paths[1].read_bytes() + paths[0].read_bytes())
    listing = list_source(shards, tmp_path / "3")
    assert len(listing) == 36
    assert not listing.rejected
    assert "8 images have the name of one before" in listing.notes[0]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_beyond_8_gib_is_passed_over(tmp_path, format):
    (tmp_path / "s/b").mkdir(parents=True)
    (tmp_path / "s/b/2.jpg").write_bytes(b"x")
    size = 9 << 30
    large, small = tarfile.TarInfo("large.jpg"), tarfile.TarInfo("small.jpg")
    large.size, small.size = size, 5
    with (tmp_path / "s/a.tar").open("wb") as file:  # a hole takes no disk
        file.write(large.tobuf(format))
        file.seek(size, os.SEEK_CUR)
        file.write(small.tobuf(format) + b"small".ljust(512, b"\0") + bytes(1024))
    listing = list_source(tmp_path / "s", tmp_path / "scratch")
    assert names(listing) == ["2.jpg", "large.jpg", "small.jpg"]
    assert not listing.rejected
    reader = open_reader(listing.containers[0])
    rows = dict(zip(listing.names, listing.rows, strict=True))
    with pytest.raises(Unreadable, match="too large: 9,663,676,416 bytes"):
        reader.read("large.jpg", int(rows["large.jpg"]["place"]), int(rows["large.jpg"]["size"]))
    small_row = rows["small.jpg"]
    assert reader.read("small.jpg", int(small_row["place"]), 5) == b"small"


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize(
    "options", ["--format=gnu", "--sparse-version=0.1", "--sparse-version=1.0"]
)
def test_members_stored_sparsely_are_named(tmp_path, options):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, holes in (("1.jpg", 0), ("2.jpg", 40), ("3.jpg", 2)):
        with (folder / name).open("wb") as file:
            for _ in range(holes):
                file.seek(1 << 16, os.SEEK_CUR)
                file.write(b"x" * 4096)
            file.write(b"end")
    (tmp_path / "s/b").mkdir(parents=True)
    (tmp_path / "s/b/2.jpg").write_bytes(b"x")
    form = [] if "format" in options else ["--format=posix"]
    command = ["tar", "--sparse", *form, options, "-cf", tmp_path / "s/a.tar", "-C", folder]
    made = subprocess.run([*command, "1.jpg", "2.jpg", "3.jpg"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(made.stderr)
    listing = list_source(tmp_path / "s", tmp_path / "scratch", strict=True)
    sparse = {one.name.rpartition("/")[2]: one.reason for one in listing.rejects()}
    if not sparse:
        pytest.skip("the file system has no holes")
    assert sparse == {"2.jpg": SPARSE, "3.jpg": SPARSE}
    assert names(listing) == ["1.jpg", "2.jpg"]


def test_compressed_files_in_tars_are_named(tmp_path):
    packed = b"\x1f\x8b\x08" + bytes(500)
    source = tmp_path / "s"
    tar_of(source / "a.tar", {"1.jpg": b"x", "2.jpg.gz": packed, "more.tar.gz": packed})
    tar_of(source / "b.tar", {"1.jpg": b"x"})
    listing = list_source(source, tmp_path / "1")
    assert [one.reason for one in listing.rejects()] == [
        "no image: an archive, which is not looked into; unpack it"
    ] * 2
    shard = tar_of(
        tmp_path / "w.tar",
        [
            *(("0.jpg", b"x"), ("0.cls", b"0"), ("1.jpg", b"x"), ("1.cls", b"1")),
            *(("2.jpg.gz", packed), ("2.cls", b"1")),
        ],
    )
    (reject,) = list_source(shard, tmp_path / "2").rejects()
    assert reject.reason == "its image is a .jpg.gz, compressed; unpack it"
    outer = tar_of(tmp_path / "o.tar", {"a/1.jpg": b"x", "b/1.jpg": b"x", "c.tar.gz": packed})
    with pytest.raises(UsageError, match=r"c\.tar\.gz, an archive that is not looked into"):
        list_source(outer, tmp_path / "3")


def test_rejects_of_before_are_read(tmp_path):
    path = tmp_path / "rejects.jsonl"
    path.write_text('{"name": "a", "reason": "b"}\n{"name": "c", "reason": "d", "later": 1}\n')
    assert list(read_rejects(path)) == [Reject("a", "b"), Reject("c", "d")]
    assert Reject("a", "b").to_json_line() == '{"name": "a", "reason": "b"}\n'


def test_a_fault_comes_whole_from_a_helper_process():
    fault = TarFault("x.tar", 512, "why", 7, None)
    again = pickle.loads(pickle.dumps(fault))
    assert (str(again), again.offset, again.lost) == (str(fault), 512, 7)
