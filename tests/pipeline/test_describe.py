"""The inspection of a set: its numbers against the set's own files; a page that stands alone."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, Shard, Split
from pipeline.describe.__main__ import find_name, main
from pipeline.describe.facts import ORIGINAL_VECTORS, Sizes, SplitFacts, gather_facts
from pipeline.describe.figures import (
    add_shift,
    compute_basis,
    draw_class_chart,
    draw_size_chart,
    make_class_bars,
    make_strips,
)
from pipeline.remote.local import LocalDataset
from pipeline.stream.config import StreamConfig
from pipeline.stream.normalization import Normalization
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import sha256
from tests.helpers.http_servers import Server
from tests.helpers.images import CLASSES, flip_bit, rows_of
from tests.helpers.processes import drop_progress, run_command
from tests.helpers.resealed_data import edit_manifest
from tests.helpers.versions import append_samples

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask for."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.images, self.tags, self._open = "", [], [], []
        self.feed(source)
        self.close()
        assert self._open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += " ".join(data.split()) + "\n" if data.strip() else ""


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set with duplicates, rejects and readable names."""
    copy = tmp_path / "a set & <more>"
    shutil.copytree(tiny_data, copy)
    labels = {split: rows_of(copy, split)["label"].tolist() for split in ("train", "val")}

    def member(split: str, sample: int) -> dict:
        return {"split": split, "sample": sample, "label": labels[split][sample], "name": "s/1.jpg"}

    groups = [
        ("exact", 0, 2, False, False, [member("train", 1), member("train", 2)]),
        ("near", 7, 205, True, True, [member("train", 3), member("val", 4), member("train", 5)]),
    ]
    keys = ("kind", "distance", "count", "leak", "labels_differ", "members")
    lines = [json.dumps(dict(zip(keys, group, strict=True))) for group in groups]
    (copy / "duplicates.jsonl").write_text("\n".join(lines) + "\n")
    reasons = ["truncated (90 bytes)", "truncated (1,234 bytes)", "<i>no</i> image"]
    rejects = [json.dumps({"name": f"{n}.jpg", "reason": why}) for n, why in enumerate(reasons)]
    (copy / "rejects.jsonl").write_text("\n".join(rejects) + "\n")
    new = {f"{name}_sha256": sha256(copy / f"{name}.jsonl") for name in ("duplicates", "rejects")}
    new |= {"rejected": 3, "duplicates": 2, "leaks": 1}
    new |= {"titles": ["<b>apple & pear</b>", "bird", "cat", "dog"]}
    edit_manifest(copy, lambda table: table.update(new))
    return copy


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_json_says_what_the_files_say(data: Path, here: Path, capsys) -> None:
    assert main([str(data), "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert out.count("\n") == 1
    manifest, statistics = Manifest.load(data), Statistics.load(data)
    for name, split in manifest.splits.items():
        rows, found = rows_of(data, name), facts["splits"][name]
        assert found["samples"] == len(rows)
        assert found["shards"] == len(list(data.glob(f"{name}-*.tar")))
        assert found["bytes"] == sum(path.stat().st_size for path in data.glob(f"{name}-*.tar"))
        assert found["bytes_per_picture"]["most"] == rows["size"].max()
        counts = [np.count_nonzero(rows["label"] == label) for label in range(4)]
        assert found["pictures_per_class"]["least"] == min(counts)
        assert split.samples == sum(counts)
    assert facts["channel_mean"] == statistics.channel_mean.tolist()
    deviations = [one["deviation"] ** 2 for one in facts["components"]]
    np.testing.assert_allclose(deviations, statistics.eigenvalues)
    assert facts["rejects"] == {"truncated (… bytes)": 2, "<i>no</i> image": 1}
    expected = {"groups": 2, "pictures": 207, "exact": 1, "near": 1, "leaks": 1}
    assert facts["duplicates"] == {**expected, "labels_differ": 1}
    assert (here / facts["page"]).is_file()


def test_components_are_compared_whatever_their_sign(tiny_data: Path) -> None:
    facts = gather_facts(str(tiny_data), LocalDataset(tiny_data))
    statistics = Statistics.load(tiny_data)
    for place, one in enumerate(facts.components):
        np.testing.assert_allclose(one.vector, statistics.eigenvectors[:, place])
        original = np.array(one.original_vector)
        assert np.abs(original @ ORIGINAL_VECTORS[place]) == pytest.approx(1, abs=1e-4)
        assert np.cos(np.radians(one.degrees_apart)) == pytest.approx(
            original @ one.vector, abs=1e-3
        )


def test_page_stands_alone_and_shows_everything(data: Path, here: Path, capsys) -> None:
    main([str(data)])
    page_path = here / capsys.readouterr().out.splitlines()[-1]
    source = page_path.read_text(encoding="utf-8")
    page = Page(source)
    assert page_path.name == "a set & <more>-describe.html"
    assert len(source) < 1_500_000
    assert not {"script", "link", "iframe", "object", "b"} & set(page.tags)
    for outside in ("http", "@import", "url("):
        assert outside not in source
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.images)
    for words in ("<b>apple & pear</b>", "a set & <more>", "truncated (… bytes)", "Component 3"):
        assert words in page.text, words
    assert "1 group of duplicates is in more than one split" in page.text
    headlines = [
        line for line in page.text.splitlines() if "bits apart" in line or "Same b" in line
    ]
    assert headlines == [
        "7 of 256 bits apart, in several splits, labels differ, 205 images",
        "Same bytes",
    ]


def test_mosaic_shows_the_stored_images(data: Path, here: Path, capsys) -> None:
    main([str(data), "--seed", "5"])
    page = Page((here / capsys.readouterr().out.splitlines()[-1]).read_text(encoding="utf-8"))
    shown = [image for image in page.images if (image["alt"] or "").startswith("train sample")]
    assert len({image["alt"].split()[2] for image in shown[:48]}) == 48  # all of the set, shuffled
    rows = rows_of(data, "train")
    for image in shown[:6]:
        row = rows[int(image["alt"].split()[2].rstrip(","))]
        with (data / f"train-{row['shard']:06d}.tar").open("rb") as file:
            file.seek(int(row["offset"]))
            stored = Image.open(io.BytesIO(file.read(int(row["size"])))).resize((144, 144))
        small = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert np.abs(np.asarray(small, float) - np.asarray(stored, float)).mean() < 4


def test_damaged_images_are_left_out_and_named(data: Path, here: Path, capsys) -> None:
    flip_bit(data, "train", 17)
    main([str(data)])
    page = Page((here / capsys.readouterr().out.splitlines()[-1]).read_text(encoding="utf-8"))
    assert "train sample 17" in page.text
    assert "47 images drawn at random" in page.text


def test_colour_draws_are_those_of_the_training(tiny_data: Path) -> None:
    statistics = Statistics.load(tiny_data)
    (colours,) = Normalization.of(statistics, StreamConfig()).color_shifts
    np.testing.assert_array_equal(compute_basis(statistics), colours)
    grey = np.full((256, 256, 3), 128, np.uint8)
    for component, made in enumerate(make_strips(statistics, [grey])):
        (uris,) = made.images
        for times, uri in zip((-2, -1, 0, 1, 2), uris, strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
            expected = np.rint(128 + times * colours[:, component])
            assert np.abs(found.reshape(-1, 3).mean(0) - expected).max() <= 2  # as a JPEG
    white = add_shift(np.full((1, 1, 3), 250, np.uint8), np.array([9.0, -260.0, 0.4]))
    assert white.tolist() == [[[255, 0, 250]]]


def test_a_set_of_before_has_no_lists(tiny_data: Path, here: Path, tmp_path: Path, capsys) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_data, old)
    for name in ("duplicates.jsonl", "rejects.jsonl"):
        (old / name).unlink(missing_ok=True)
    new = ("titles", "chroma", "duplicates", "leaks", "libraries", "foreign")
    for name in (*new, "rejects_sha256", "duplicates_sha256"):
        edit_manifest(old, lambda table, name=name: table.pop(name))
    edit_manifest(old, lambda table: table.update(rejected=2))
    main([str(old), "--out", "x.html"])
    assert capsys.readouterr().out.splitlines()[-1] == "x.html"
    page = Page((here / "x.html").read_text(encoding="utf-8"))
    assert "Duplicates: not looked for." in page.text
    assert "rejects.jsonl, which lists them, is missing." in page.text


def test_set_in_a_store(data: Path, here: Path, tmp_path: Path, capsys) -> None:
    with Server(data) as server:
        main([server.address, "--cache", str(tmp_path / "cache"), "--json", "--out", "x.html"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["duplicates"]["groups"] == 2
    assert sum(facts["rejects"].values()) == 3
    page = Page((here / "x.html").read_text(encoding="utf-8"))
    (words,) = [line for line in page.text.splitlines() if "drawn at random" in line]
    assert words.split()[0] in ("28", "30")  # of three shards: of ten images each, or of eight


def test_an_older_version_is_described(data, more_data, here: Path, capsys) -> None:
    append_samples(data, more_data)

    def describe(*words: str) -> dict:
        assert main([str(data), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    first, newest = describe("--data-version", "1"), describe("--data-version", "latest")
    assert newest == describe()
    samples = [one["splits"]["train"]["samples"] for one in (first, newest)]
    assert samples[1] == samples[0] + 12
    with pytest.raises(UsageError, match="has versions 1 to 2, not version 3"):
        describe("--data-version", "3")
    with pytest.raises(UsageError, match="--card describes the newest version, not 1; leave one"):
        describe("--data-version", "1", "--card")


def test_command_and_its_errors(data: Path, here: Path) -> None:
    command = [sys.executable, "-m", "pipeline.describe"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(here)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return run_command([*command, *words], env=env)

    done = call(str(data), "--out", "page.html")
    assert (done.returncode, drop_progress(done.stderr)) == (0, "")
    assert done.stdout.splitlines()[-1] == "page.html"
    assert "207 images in 2 groups" in done.stdout
    none = call("nowhere")
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("error: data set nowhere")
    assert none.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["duplicates.jsonl", "rejects.jsonl", "stats.npz"])
def test_other_files_than_were_built_are_refused(data: Path, here: Path, name: str) -> None:
    with (data / name).open("r+b") as file:
        file.seek(20)
        file.write(b"~")
    with pytest.raises(DataError, match=name):
        main([str(data)])


def test_page_never_lies_in_the_set(data: Path, here: Path) -> None:
    with pytest.raises(UsageError, match="sealed"):
        main([str(data), "--out", str(data / "page.html")])
    with pytest.raises(UsageError, match="name a file"):
        main([str(data), "--out", str(here)])
    assert not list(data.glob("*.html"))


def test_names() -> None:
    assert find_name("s3://bucket/imagenet/") == find_name("data/imagenet") == "imagenet"
    assert find_name(".") == Path.cwd().name


def split_of(per_class: list[int], sizes: list[int]) -> SplitFacts:
    shard = Shard(name="x", samples=len(sizes), bytes=1, sha256="", idx_sha256="")
    split = Split(shards=(shard,), index_sha256="")
    return SplitFacts(
        "train", split, np.array(per_class), Sizes.count([np.array(sizes, np.uint32)])
    )


def test_charts_of_many_and_of_few_classes(tiny_data: Path) -> None:
    chart = draw_class_chart(split_of(list(range(1000)), [5]), True)
    assert chart.caption == "1,000 classes, 0 to 999 images each, median 500; 1 without any"
    assert len(chart.svg) < 30_000
    facts = gather_facts(str(tiny_data), LocalDataset(tiny_data))
    counts = [2, 4] + [0] * (len(facts.manifest.classes) - 2)
    assert len(CLASSES) == len(counts) == 4
    assert [bar.length for bar in make_class_bars(facts, split_of(counts, []))][:3] == [0.5, 1, 0]
    assert make_class_bars(facts, split_of(list(range(1000)), [])) == []


def test_histogram_counts_every_size() -> None:
    sizes = [10_000] * 7 + [20_000] * 3
    chart = draw_size_chart(split_of([10], sizes), True)
    (path,) = re.findall(r'<path d="([^"]*)" style="fill: var\(--a\)', chart.svg)
    assert len(set(re.findall(r"[ML] [\d.]+ ([\d.]+)", path))) == 3  # nothing, seven and three
    assert chart.caption == "10.0 to 20.0 kB, mean 13.0, median 10.0"
    assert draw_size_chart(split_of([0], []), True).svg == ""


def test_sizes_are_counted_in_blocks_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 3000, 5001).astype(np.uint32)
    blocks = np.array_split(sizes, 7)
    found = Sizes.count(blocks)
    assert len(found) == 5001
    assert found.mean == pytest.approx(sizes.mean())
    for share in (0, 12.5, 50, 99.8, 100):
        assert found.percentile(share) == pytest.approx(np.percentile(sizes, share))
    monkeypatch.setattr("pipeline.describe.facts.MOST_SIZES", 100)
    coarse = Sizes.count(blocks)
    assert len(coarse) == 5001
    assert len(coarse.values) <= 100  # and the memory of so many
    assert coarse.percentile(50) == pytest.approx(np.median(sizes), abs=64)
