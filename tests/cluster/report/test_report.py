"""The report: one page with everything in it, whatever the run has or lacks."""

import base64
import io
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from cluster.checkpoint.writer import CheckpointManager
from cluster.config import Config, load_settings
from cluster.mesh import ProcessMesh
from cluster.report.curves import draw_curves
from cluster.report.images import KERNEL_SCALE
from cluster.report.page import write_report
from cluster.report.records import read_records
from cluster.report.tables import make_run_tiles, write_verdict
from cluster.run.folder import Mark, format_toml
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from pipeline.dataset.manifest import identity
from pipeline.tools.errors import UsageError
from tests.helpers.processes import run_command

VOID = {"meta", "br", "img", "link", "input", "hr"}
CLASSES = ("<b>cat & dog</b>", "fox", "owl")


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self.links: list[str] = []
        self.images: dict[str, str] = {}
        self.tags: list[str] = []
        self.headings: list[tuple[int, str]] = []
        """(level, text) of every heading."""
        self.paths = 0
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        table = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            assert table["alt"], "an image without a text in its place"
            self.images[table["alt"]] = table["src"] or ""
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        self.paths += tag == "path"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.paths += tag == "path"

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if heading := [tag for tag in self._open if re.fullmatch("h[1-6]", tag)]:
            self.headings[-1] = (int(heading[-1][1]), self.headings[-1][1] + data.strip())
        if self._open[-1:] != ["style"]:
            self.text += " ".join(data.split()) + "\n" if data.strip() else ""


def metrics(run: Path, steps: int, first: int = 1) -> None:
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(first, steps + 1):
            numbers = {
                "position": 128 * step,
                "epoch": 128 * step / 4000,
                "step": step,
                "loss": float(rng.uniform(0.5, 2.5)),
                "top1_error": float(rng.uniform(0, 1)),
                "lr": 0.01 if step <= steps // 2 else 0.001,
                "lr_bias": 0.02,
                "img_s": 256.0,
                "data_wait": 0.0625,
                "seconds": 0.5,
                "memory": 1_500_000_000,
            }
            file.write(json.dumps(numbers) + "\n")


def evaluation(run: Path, views: int, **parts: Any) -> None:
    table = {"views": views, "samples": 800, "step": 60, "position": 7680, **parts}
    (run / f"evaluation-{views}.json").write_text(json.dumps(table))


def checkpoint(run: Path) -> None:
    net = AlexNet(classes=len(CLASSES), width=0.0625)
    state = {"classes": list(CLASSES)}
    (run / "checkpoints").mkdir()
    checkpoints = CheckpointManager(run, ProcessMesh(), state, lambda event: None, keep=1)
    checkpoints.begin(Mark(step=60, position=7680), net, Sgd2012(net.named_parameters()))
    checkpoints.finish(must=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has everything but a data set."""
    folder = tmp_path / "a run & <more>"
    folder.mkdir()
    metrics(folder, 60)
    validation = {"position": 7680, "epoch": 1.92, "step": 60, "loss": 1.1, "seconds": 1.0}
    (folder / "validation.jsonl").write_text(
        json.dumps(validation | {"top1_error": 0.4321, "top5_error": 0.111}) + "\n"
    )
    origin = {"config": "demo", "command": "duet train demo --seed '<3>'", "commit": "0123456789ab"}
    (folder / "config.toml").write_text(
        'width = 0.0625\nseed = 3\npair = true\ndtype = "auto"\n'
        + "".join(f'{name} = "{text}"\n' for name, text in origin.items())
    )
    (folder / "machine.json").write_text(
        '{"cpu": "Motorola 68000", "memory_bytes": 8000000, "dtype": "bfloat16"}'
    )
    errors = dict(zip(CLASSES, (0.5, 0.25, 0.125), strict=True))
    counts = [[4, 3, 1], [1, 6, 1], [0, 1, 7]]
    evaluation(folder, 1, top1_error=0.3217, top5_error=0.0123, classes=errors)
    evaluation(folder, 10, top1_error=0.2917, top5_error=0.0104, classes=errors, confusion=counts)
    checkpoint(folder)
    return folder


def test_page_of_a_whole_run(run: Path, tiny_data: Path) -> None:
    path = write_report(run, str(tiny_data))
    assert path == run / "report.html"
    page = Page(path)
    for number in ("32.2", "29.2", "1.2", "1.0", "7,680", "256", "6.2", "step 60", "1.5"):
        assert number in page.text, number
    for fact in (
        "Motorola 68000",
        "8 MB",
        "0.0625",
        "48 images",
        "50.0 %",
        "12.5 %",
        "lr 0.001",
        "bfloat16",
        "duet train demo --seed '<3>'",
        "0123456789ab",
        "29.2 % top-1 error",
        "66.7 %",
    ):
        assert fact in page.text, fact
    missing = [part.split("<")[0] for part in page.source.split('class="missing">')[1:]]
    assert [words.split(":")[0] for words in missing] == [
        "No answers", "No kernels over time", "No attempts.jsonl",
    ]  # fmt: skip
    assert {"conv1 kernels of column a", "conv1 kernels of column b"} <= set(page.images)
    assert page.text.count("conv") >= 5  # the table of layers


def test_what_people_ask_comes_first_and_details_are_folded(run: Path, tiny_data: Path) -> None:
    page = Page(write_report(run, str(tiny_data)))
    assert [words for level, words in page.headings if level == 2] == [
        "What it answers", "How it learned", "What it confuses", "How it was run",
        "What the first layer looks for", "The two columns", "What the network sees",
        "Starts and checkpoints", "Environment",
    ]  # fmt: skip
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    folded = page.source[page.source.index('class="folds"') :]
    assert folded.count("<summary><h2>") == 5
    assert "<details open" not in folded
    charts = page.source[page.source.index("How it learned") : page.source.index("What it conf")]
    titles = ("Loss", "Error", "Learning rate", "Images per second", "Waiting for data", "Memory")
    assert re.findall("<h3>([^<]*?) ?<", charts) == list(titles)
    changed = page.source[page.source.index("Settings that differ from demo") :]
    changed = changed[: changed.index("other settings")]
    assert re.findall(r'scope="row">([^<]*)', changed) == ["width", "seed"]
    assert re.findall(r'class="ours">([^<]*)</td><td>([^<]*)', changed) == [
        ("0.0625", f"{load_settings(Path('demo'))['width']:g}"), ("3", "0"),
    ]  # fmt: skip


def test_a_run_that_has_just_begun_has_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(format_toml(Config(), "abc"))
    page = Page(write_report(tmp_path))
    for words in ("not started", "no step is recorded yet", "There is no result yet.",
                  "No curves: metrics.jsonl has no readable row yet.",
                  "last step written never"):  # fmt: skip
        assert words in page.text, words
    (tmp_path / "attempts.jsonl").write_text('{"time": 5.0, "event": "end", "why": "stopped"}\n')
    assert "stopped" in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("steps", [1, 3])
def test_curves_of_a_few_steps_have_dots(tmp_path: Path, steps: int) -> None:
    metrics(tmp_path, steps)
    first = draw_curves(read_records(tmp_path))[0]
    dots = re.findall('stroke-width: 5[;"]', first.svg)
    assert len(dots) == steps


def test_the_verdict_says_what_guessing_would_have(run: Path) -> None:
    records = read_records(run)
    assert write_verdict(records, 3) == (
        "29.2 % top-1 error (800 images, ten views, step 60); guessing would have 66.7 %."
    )
    assert "and 1.0 % top-5 error" in write_verdict(records, 1000)
    assert "99.9 % and 99.5 %." in write_verdict(records, 1000)
    evaluation(run, 10, top1_error=0.655, top5_error=0.0)
    assert write_verdict(read_records(run), 3).endswith("This cannot be told from guessing.")
    for path in run.glob("evaluation-*"):
        path.unlink()
    assert "(one view, step 60 (validation))" in write_verdict(read_records(run), 3)
    (run / "validation.jsonl").unlink()
    assert "Not validated yet. The last training batches: " in write_verdict(read_records(run), 3)


def test_page_stands_alone(run: Path, tiny_data: Path) -> None:
    page = Page(write_report(run, str(tiny_data)))
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert "http" not in page.source
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "prefers-color-scheme: dark" in page.source


def test_names_are_text_not_markup(run: Path, tiny_data: Path) -> None:
    page = Page(write_report(run, str(tiny_data)))
    assert CLASSES[0] in page.text
    assert CLASSES[0] not in page.source
    assert "a run & <more>" in page.text
    assert "more" not in page.tags


def test_confusion_matrix_has_its_counts_in_order(run: Path) -> None:
    page = Page(write_report(run))
    table = page.source[page.source.index("<tbody>") : page.source.index("</tbody>")]
    cells = [cell.split(">")[1].split("<")[0] for cell in table.split("<td")[1:]]
    assert cells == ["4", "3", "1", "1", "6", "1", "", "1", "7"]
    right = [number for number, cell in enumerate(table.split("<td")[1:]) if "right" in cell]
    assert right == [0, 4, 8]


def test_kernels_are_those_of_the_checkpoint(run: Path) -> None:
    page = Page(write_report(run))
    for column in "ab":
        uri = page.images[f"conv1 kernels of column {column}"]
        png = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        small = np.asarray(png)[:55:KERNEL_SCALE, :55:KERNEL_SCALE]
        saved = load_file(next(run.glob(f"checkpoints/step-*/column-{column}.safetensors")))
        first = saved[f"weights/{column}.conv1.weight"][0].transpose(1, 2, 0)
        shades = 127.5 * (1 + first / np.abs(first).max())
        np.testing.assert_allclose(small[:11, :11, :3], shades, atol=0.51)
        assert small[:11, :11, 3].min() == 255


def test_run_with_nothing_but_steps(tmp_path: Path) -> None:
    metrics(tmp_path, 5)
    page = Page(write_report(tmp_path))
    for words in (
        "not evaluated with --views 10 and --views 1",
        "Not recorded yet: validation loss",
        "No validation rows yet.",
        "No images: " + f"{tmp_path} does not say where its data set is (it has no config.toml)",
        "--save-probabilities",
        "No attempts.jsonl",
        "No checkpoint in this folder.",
        "No kernels: the run has no complete checkpoint yet.",
        "No errors by class: run duet evaluate first.",
        "No table: it needs the width",
        "No config.toml.",
        "No machine.json.",
    ):
        assert words in page.text, words


def test_run_without_a_readable_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"posi')
    page = Page(write_report(tmp_path))
    assert "No curves: metrics.jsonl has no readable row yet." in page.text
    assert "1 line of metrics.jsonl could not be read" in page.text


def test_rows_that_lack_numbers(tmp_path: Path) -> None:
    rows = ({"position": 128 * step, "step": step, "loss": None} for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path))
    assert "1,024" in page.text
    assert "nan" not in page.text.lower()


def test_last_validation_stands_in_for_the_evaluation(run: Path) -> None:
    (run / "evaluation-1.json").unlink()
    page = Page(write_report(run))
    assert "43.2" in page.text
    assert "validation 43.2 %" in page.text
    (run / "evaluation-10.json").unlink()
    assert "one view, step 60 (validation)" in Page(write_report(run)).text


def test_data_set_that_is_gone(run: Path, tmp_path: Path) -> None:
    page = Page(write_report(run, str(tmp_path / "gone")))
    assert "No images: data set" in page.text
    assert "is not a folder" in page.text


def test_data_set_of_another_run_is_noticed(run: Path, tiny_data: Path) -> None:
    said = "is not the data set that the run was trained on"
    config = run / "config.toml"
    config.write_text(config.read_text() + f'data_sha256 = "{identity(tiny_data)}"\n')
    assert said not in Page(write_report(run, str(tiny_data))).text
    config.write_text(config.read_text().replace(identity(tiny_data), "0" * 64))
    assert said in Page(write_report(run, str(tiny_data))).text


def test_damaged_checkpoint_is_named(run: Path) -> None:
    path = next(run.glob("checkpoints/step-*/column-b.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    page = Page(write_report(run))
    assert "is damaged" in page.text
    assert "column-b.safetensors" in page.text


def test_restart_is_said(tmp_path: Path) -> None:
    metrics(tmp_path, 1500)
    metrics(tmp_path, 1600, first=1001)
    page = Page(write_report(tmp_path))
    assert "had reached step 1,500, went on from step 1,000" in page.text


def test_long_run_of_many_classes_stays_small(run: Path) -> None:
    line = (run / "metrics.jsonl").read_text().splitlines()[0]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 50_001):
            numbers = f'"position": {128 * step}, "epoch": {step / 1e4}, "step": {step}'
            file.write(line.replace('"position": 128, "epoch": 0.032, "step": 1', numbers) + "\n")
    classes = {f"class {number}": number / 1000 for number in range(1000)}
    evaluation(run, 10, top1_error=0.4, top5_error=0.18, classes=classes)
    path = write_report(run)
    assert path.stat().st_size < 500_000
    page = Page(path)
    assert "6,400,000" in page.text
    assert "step 50,000" in page.text
    assert "class 999\n" in page.text, "the worst is shown"
    assert "class 0\n" in page.text, "the best too"
    assert "class 500\n" not in page.text, "what lies between is not"


def test_again_replaces_and_leaves_nothing_else(run: Path) -> None:
    (run / "report.html").write_text("old")
    before = {path.name for path in run.iterdir()}
    write_report(run)
    assert {path.name for path in run.iterdir()} == before
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run \(config\.toml is missing\)"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_line(run: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_command(
            [sys.executable, "-m", "cluster.report", *arguments],
            cwd=Path(__file__).resolve().parents[3],
        )

    good = command(str(run))
    assert (good.returncode, good.stdout) == (0, f"{run / 'report.html'}\n"), good.stderr
    bad = command(str(tmp_path))
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def test_parameters_in_the_table_are_those_of_the_network(run: Path) -> None:
    page = Page(write_report(run))
    net = AlexNet(classes=len(CLASSES), width=0.0625)
    # With an odd number of classes column b holds one unit that is cut off; it is counted.
    count = sum(parameter.numel() for parameter in net.parameters())
    assert f"{count:,} parameters" in page.text


def test_the_tile_says_what_the_waiting_was_for(tmp_path):
    rows = [
        {"position": 8 * step, "epoch": 1.0, "step": step, "loss": 1.0, "top1_error": 0.5,
         "lr": 0.1, "img_s": 8.0, "data_wait": 0.5, "wait_storage": 0.3, "wait_feed": 0.0,
         "wait_decode": 0.1, "wait_transfer": 0.1, "seconds": 1.0, "replaced": 0}
        for step in (1, 2)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = [
        tile.note for tile in make_run_tiles(read_records(tmp_path)) if "waiting" in tile.label
    ]
    assert notes == ["of the time in steps; for storage 60%, decode 20%"]
