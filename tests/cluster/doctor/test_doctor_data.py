"""Findings of the doctor on data sets, stores and run folders, each with what mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.doctor import data as doctor_data
from cluster.doctor.finding import Finding
from pipeline.tools.files import drop_page_cache
from tests.cluster.doctor.test_doctor_machine import lacks, only
from tests.helpers.images import packed

CONFIG = Config(batch_size=16)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_data, "SECONDS", 0.2)


def judged(data: Path | str, config: Config = CONFIG) -> list[Finding]:
    return list(doctor_data.DatasetCheck(str(data), config).judge())


def test_a_sound_set_is_described_and_its_speed_told(tiny_data):
    found = {finding.name: finding for finding in judged(tiny_data)}
    assert {finding.status for finding in found.values()} == {"ok"}
    assert "48 train, 20 val; 4 classes; 7 shards" in found["data"].value
    assert "(duet verify reads every byte)" in found["data"].value
    assert "a batch of 16 in" in found["stream"].value
    assert "single images at random" in found["data speed"].value
    assert "kB were there to be read" in found["data speed"].value  # too few to believe
    blocks = {f.name: f for f in judged(tiny_data, Config(batch_size=16, shuffle="block"))}
    assert "shard after shard" in blocks["data speed"].value


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda data: (data / "train-000001.tar").unlink(), ["train-000001.tar is missing"]),
        (lambda data: (data / "val-000000.tar").write_bytes(b"short"), ["has 5 bytes instead of"]),
        (lambda data: (data / "stats.npz").unlink(), ["stats.npz"]),
        (lambda data: (data / "val.index.npy").write_bytes(b"?"), ["val.index.npy"]),
        (lambda data: (data / "manifest.json").unlink(), ["manifest", "duet build-shards"]),
    ],
)
def test_a_set_that_is_not_whole_is_told(data, harm: Callable[[Path], None], words):
    harm(data)
    found = only(judged(data))
    assert found.status == "FAIL"
    assert lacks(found, words) == []
    assert "duet " in found.mend


def test_a_set_without_validation_images_does_not_fit_a_config_that_validates(
    image_folder, tmp_path
):
    packed(tmp_path / "data", train=image_folder / "train", samples_per_shard=10)
    found = only(judged(tmp_path / "data"))
    assert found.status == "FAIL"
    assert "--validate-every 0" in found.mend
    settled = judged(tmp_path / "data", Config(batch_size=16, validate_every=0))
    assert {finding.status for finding in settled} == {"ok"}


def resident(path: Path) -> int:
    """Bytes of a file in the page cache, by util-linux."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not shutil.which("fincore"), reason="needs fincore of util-linux")
def test_what_is_in_the_page_cache_is_counted_as_others_count_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1_000_003))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    kept = drop_page_cache(file)
    assert kept == min(1_000_003, resident(path))
    shared = Path("/dev/shm", f"doctor-{os.getpid()}")  # memory: nothing can be dropped
    try:
        shared.write_bytes(bytes(1_000_003))
        there = os.open(shared, os.O_RDONLY)
        assert drop_page_cache(there) == 1_000_003
    finally:
        shared.unlink()
    for number in (file, there):
        os.close(number)


def test_a_disk_that_is_slower_than_the_decoder_is_told(tiny_data, monkeypatch):
    slow = doctor_data.DiskSpeed(10, 10**6, 1, cached=0.5, order="single images")
    monkeypatch.setattr(doctor_data, "measure_disk", lambda *_: slow)
    monkeypatch.setattr(doctor_data, "measure_stream", lambda *_: 1000.0)
    found = only(judged(tiny_data))
    assert (found.name, found.status) == ("data speed", "warn")
    words = ["10 images/s from the disk (1 MB/s", "a batch of 16 in 1,600 ms",
             "50% of it stayed in the page cache", "--shuffle block"]  # fmt: skip
    assert lacks(found, words) == []


def test_a_set_on_a_server_is_asked_for_shards(server, tmp_path):
    config = Config(batch_size=16, shuffle="block", cache=str(tmp_path / "cache"), cache_size="1GB")
    found = {finding.name: finding for finding in judged(server.address, config)}
    assert {finding.status for finding in found.values()} == {"ok"}, found
    assert "7 of 7 shards looked at" in found["store"].value
    assert "MB/s with 4 at a time" in found["store"].value
    assert not list((tmp_path / "cache").rglob("*.tar")), "a look must not fill the cache"


def test_what_a_server_lacks_is_told(server, data, tmp_path):
    config = Config(batch_size=16, cache=str(tmp_path / "cache"), cache_size="1GB")
    server.folder = data
    (data / "train-000002.tar").unlink()
    found = only(judged(server.address, config))
    assert (found.name, found.status) == ("store", "FAIL")
    assert "train-000002.tar is not there" in found.value
    (data / "manifest.json").unlink()
    found = only(judged(server.address.replace("//", "//me:secret@"), config))
    assert (found.name, found.status) == ("data", "FAIL")
    assert "secret" not in found.value + found.mend


def test_a_server_that_is_not_there_is_told_at_once():
    found = only(judged("http://127.0.0.1:1/set"))
    assert (found.name, found.status) == ("data", "FAIL")
    assert "curl" in found.mend


def test_credentials_that_are_missing_are_asked_for(s3_bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = only(judged(f"{s3_bucket}/set"))
    assert found.status == "FAIL"
    assert "export AWS_ACCESS_KEY_ID=" in found.mend


def test_a_run_folder_is_written_to_and_left_clean(tmp_path):
    (found,) = doctor_data.judge_run(tmp_path / "run", Config(), 10)
    assert (found.name, found.status) == ("run", "ok")
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert only(list(doctor_data.judge_run(tmp_path / "file", None, None))).status == "FAIL"
    (found,) = doctor_data.judge_run(tmp_path / "run", Config(keep=10**6), 1000)
    assert found.status == "warn"
    assert "--keep 1" in found.mend


def test_the_store_of_a_run_is_written_to_and_left_clean(s3_bucket, monkeypatch):
    boto3 = pytest.importorskip("boto3")
    found = doctor_data.judge_store(f"{s3_bucket}/runs/one")
    assert (found.status, found.mend) == ("ok", "")
    left = boto3.resource("s3").Bucket(s3_bucket.removeprefix("s3://")).objects.all()
    assert list(left) == []
    assert doctor_data.judge_store("s3://no-such-bucket-anywhere/x").status == "FAIL"
    assert doctor_data.judge_store("http://127.0.0.1:1/x").status == "FAIL"  # cannot be written
