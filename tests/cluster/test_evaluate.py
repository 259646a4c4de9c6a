"""Evaluation: against counts made one image at a time, and its files and exit codes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.checkpoint.format import load_checkpoint
from cluster.config import Config
from cluster.evaluate import AnswerCounts, Predictions, main
from cluster.experiments.ensemble import main as ensemble
from cluster.mesh import ProcessMesh
from cluster.report.page import main as report
from cluster.run.folder import write_run_config
from cluster.run.probabilities import (
    ProbabilityInfo,
    SavedProbabilities,
    open_writer,
    probability_path,
)
from cluster.training.loop import train
from model.alexnet import AlexNet
from model.architecture import Design
from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, identity
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.images import flip_bit, packed
from tests.helpers.processes import drop_progress
from tests.helpers.resealed_data import edit_manifest

CONFIG = Config(
    dtype="float32",
    design=Design(width=0.125),
    batch_size=8,
    steps=4,
    checkpoint_every=2,
    validate_every=2,
)


PICTURE = replace(CONFIG, mean="image", seed=1)


def make_run(run: Path, config: Config, data: Path) -> Path:
    origin = {"data": str(data)}
    write_run_config(run, config, identity(data), samples=48, step=0, origin=origin)
    train(config, data, run, ProcessMesh(), lambda event: None)
    return run


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"), CONFIG, tiny_data)


@pytest.fixture(scope="module")
def with_image(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had the mean image subtracted."""
    return make_run(tmp_path_factory.mktemp("picture"), PICTURE, tiny_data)


def one_by_one(
    run: Path, data: Path, views: int, mean: torch.Tensor | float = 0.0
) -> list[tuple[int, list[float]]]:
    """(label, probabilities) of every validation image, each crop cut and run by itself.

    `mean` is subtracted from each crop instead of what the stream subtracts.
    """
    net = AlexNet(classes=4, width=CONFIG.design.width)
    load_checkpoint(run / "checkpoints" / "step-00000004", net)
    net.eval()
    corners = [(16, 16)] if views == 1 else [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    found = []
    with (
        torch.no_grad(),
        Stream(data, split="val", batch_size=1, crop="whole", once=True, threads=1) as stream,
    ):
        back = torch.tensor(stream.mean) if isinstance(mean, torch.Tensor) else 0.0
        for batch in stream:
            pixels = batch.images + back
            crops = [pixels[:, :, y : y + 224, x : x + 224] for y, x in corners]
            crops += [crop.flip(3) for crop in crops] if views == 10 else []
            crops = [crop - mean for crop in crops]
            answers = [torch.softmax(net(crop), dim=1)[0] for crop in crops]
            found.append((int(batch.labels), torch.stack(answers).mean(0).tolist()))
    return found


@pytest.mark.parametrize("views", [1, 10])
def test_errors_are_those_counted_one_image_at_a_time(trained, tiny_data, views, capsys):
    assert main([str(trained), "--data", str(tiny_data), "--views", str(views), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((trained / f"evaluation-{views}.json").read_text())
    assert printed == written
    answers = one_by_one(trained, tiny_data, views)
    wrong = [label != max(range(4), key=p.__getitem__) for label, p in answers]
    assert (written["samples"], written["views"], written["step"]) == (20, views, 4)
    assert written["top1_error"] == pytest.approx(sum(wrong) / 20)
    assert written["top5_error"] == 0  # there are four classes
    loss = -sum(torch.tensor(p[label]).log().item() for label, p in answers) / 20
    assert written["loss"] == pytest.approx(loss, rel=1e-4)
    confusion = [[0] * 4 for _ in range(4)]
    for label, p in answers:
        confusion[label][p.index(max(p))] += 1
    assert written["confusion"] == confusion
    names = Manifest.load(tiny_data).classes
    assert written["classes"] == {
        name: pytest.approx(1 - confusion[place][place] / 5) for place, name in enumerate(names)
    }


def test_a_report_evaluates_first_where_it_is_asked_to(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("evaluation-*", "prob*"))
    assert report([str(run), "--evaluate"]) == 0
    first, _, last = capsys.readouterr().out.splitlines()
    assert (first.split(", ")[2], last) == ("ten views", str(run / "report.html"))
    assert json.loads((run / "evaluation-10.json").read_text())["samples"] == 20
    page = (run / "report.html").read_text()
    assert "Randomly sampled" in page
    assert "not evaluated with" not in page


@pytest.mark.parametrize("classes", [4, 100_000])
def test_memory_grows_with_the_classes_and_not_with_their_square(classes):
    counts = AnswerCounts.zeros(classes)
    probabilities = torch.zeros(3, classes)
    probabilities[[0, 1, 2], [2, 3, 0]] = 1
    counts.add(probabilities, torch.tensor([2, 2, 0]), torch.tensor([1.0, 1.0, 0.0]))
    assert counts.images[:4].tolist() == [0, 0, 2, 0]
    assert counts.right[:4].tolist() == [0, 0, 1, 0]
    assert (counts.confusion is None) == (classes > 50)
    if counts.confusion is not None:
        assert counts.confusion.nonzero().tolist() == [[2, 2], [2, 3]]


def test_one_view_agrees_with_the_validation_during_training(trained, capsys):
    main([str(trained)])  # on the data set that the run has recorded
    row = json.loads((trained / "validation.jsonl").read_text().splitlines()[-1])
    written = json.loads((trained / "evaluation-1.json").read_text())
    assert written["top1_error"] == pytest.approx(row["top1_error"])
    assert written["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert "top-1 error" in capsys.readouterr().out


@pytest.mark.parametrize("views", [1, 10])
def test_the_mean_image_is_subtracted_as_in_training(with_image, tiny_data, views, capsys):
    words = ["--data", str(tiny_data), "--views", str(views), "--save-probabilities"]
    assert main([str(with_image), *words]) == 0
    mean = Statistics.load(tiny_data).mean_picture[16:240, 16:240].transpose(2, 0, 1)
    answers = one_by_one(with_image, tiny_data, views, torch.from_numpy(mean))
    saved = SavedProbabilities(with_image, views)
    expected = torch.tensor([p for _, p in answers])
    torch.testing.assert_close(saved.rows(0, 20), expected, rtol=1e-4, atol=1e-6)
    if views == 1:
        row = json.loads((with_image / "validation.jsonl").read_text().splitlines()[-1])
        written = json.loads((with_image / "evaluation-1.json").read_text())
        assert written["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert f"probabilities -> {probability_path(with_image, views)}" in capsys.readouterr().out


def test_saved_probabilities_are_those_that_were_counted(trained, with_image, tiny_data, capsys):
    runs = [str(trained), str(with_image)]
    for run in runs:
        main([run, "--data", str(tiny_data), "--save-probabilities"])
    saved = SavedProbabilities(trained, 1)
    answers = one_by_one(trained, tiny_data, 1)
    assert saved.labels.tolist() == [label for label, _ in answers]
    np.testing.assert_allclose(saved.rows(0, 20), [p for _, p in answers], rtol=1e-4)
    about = saved.about
    assert (about.views, about.split, about.samples, about.step) == (1, "val", 20, 4)
    assert (about.classes, about.data_sha256) == (
        Manifest.load(tiny_data).classes,
        identity(tiny_data),
    )
    capsys.readouterr()
    assert ensemble([*runs, "--views", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for run, one in zip(runs, found["runs"], strict=True):
        counted = json.loads((Path(run) / "evaluation-1.json").read_text())
        for name in ("top1_error", "top5_error", "loss"):
            assert one[name] == pytest.approx(counted[name], rel=1e-6)


def test_probabilities_are_written_as_they_come(tmp_path):
    """The file grows with the rows: all of them at once need not be in memory."""
    names = tuple(map(str, range(1000)))
    about = ProbabilityInfo(
        views=1, split="val", samples=128, classes=names, data_sha256="", step=1
    )
    rows, labels = torch.rand(128, 1000), torch.arange(128)
    with open_writer(probability_path(tmp_path, 1), about) as writer:
        for part in (slice(0, 64), slice(64, 128)):
            writer.add(rows[part], labels[part], torch.ones(64))
            (partial,) = tmp_path.iterdir()
            assert partial.stat().st_size > (part.start + 60) * 4000
    saved = SavedProbabilities(tmp_path, 1)
    assert torch.equal(saved.rows(0, 128), rows)
    assert torch.equal(saved.labels, labels)


def test_nothing_is_saved_unless_it_is_asked_for(trained, tiny_data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    probability_path(run, 1).unlink(missing_ok=True)
    main([str(run), "--data", str(tiny_data)])
    assert not list(run.glob("probabilities*"))


def test_a_damaged_image_counts_nowhere(trained, data, tmp_path, capsys):
    flip_bit(data, "val", 3, 19)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    main([str(run), "--data", str(data), "--save-probabilities"])
    written = json.loads((run / "evaluation-1.json").read_text())
    answers = one_by_one(trained, data, 1)
    sound = [answer for place, answer in enumerate(answers) if place not in (3, 19)]
    wrong = sum(label != p.index(max(p)) for label, p in sound)
    assert (written["samples"], written["top1_error"]) == (18, pytest.approx(wrong / 18))
    saved = SavedProbabilities(run, 1)
    assert (saved.weights == 0).nonzero()[:, 0].tolist() == [3, 19]
    assert not saved.rows(3, 4).any()
    assert drop_progress(capsys.readouterr().err) == ""


def test_without_a_run_or_a_checkpoint_the_message_says_what_to_do(trained, tiny_data, tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        main([str(tmp_path), "--data", str(tiny_data)])
    shutil.copy(trained / "config.toml", tmp_path)
    with pytest.raises(UsageError, match="has no complete checkpoint yet"):
        main([str(tmp_path), "--data", str(tiny_data)])


def test_the_checkpoint_may_be_chosen(trained, capsys):
    rows = [json.loads(line) for line in (trained / "validation.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: (row["top1_error"], -row["step"]))["step"]
    for words, step, chosen in (
        (["--checkpoint", "2"], 2, "named"),
        (["--best"], best, "best"),
        ([], 4, "newest"),
    ):
        assert main([str(trained), *words]) == 0
        assert f"step {step} ({chosen}): top-1 error" in capsys.readouterr().out
        written = json.loads((trained / "evaluation-1.json").read_text())
        assert (written["step"], written["chosen"]) == (step, chosen)
        (row,) = [row for row in rows if row["step"] == step]
        assert written["loss"] == pytest.approx(row["loss"], rel=1e-4)
    with pytest.raises(UsageError, match="give --best or --checkpoint 2, not both"):
        main([str(trained), "--best", "--checkpoint", "2"])
    with pytest.raises(UsageError, match="no checkpoint of step 5; there are 4, 2"):
        main([str(trained), "--checkpoint", "5"])


def test_a_checkpoint_may_be_named_by_its_folder(trained, tmp_path, capsys):
    folder = trained / "checkpoints" / "step-00000002"
    copied = Path(shutil.copytree(folder, tmp_path / folder.name))
    for named in (folder, copied, copied / "checkpoint.json"):
        assert main([str(trained), "--checkpoint", str(named)]) == 0
        assert "step 2 (named): top-1 error" in capsys.readouterr().out
    for named, words in (
        (tmp_path / "step-00000007", f"{tmp_path} has no checkpoint of step 7; there are 2"),
        (tmp_path, f"{tmp_path} is neither a step nor .*; the steps of {trained} are 4, 2"),
        ("last", "--checkpoint last is neither a step nor a checkpoint's folder"),
        ("-2", "--checkpoint -2 is neither a step"),
    ):
        with pytest.raises(UsageError, match=words):
            main([str(trained), f"--checkpoint={named}"])
    column = copied / "column-a.safetensors"
    column.write_bytes(column.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"no checkpoint of .* is sound"):
        main([str(trained), "--checkpoint", str(copied)])


def test_a_data_set_that_has_moved_is_named_by_data(trained, data, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub("(?m)^data = .*", f'data = "{data}"', text))
    before = (run / "config.toml").read_bytes()
    data.rename(moved)
    with pytest.raises(UsageError, match=rf"was at {data} and is not there .* by --data"):
        main([str(run)])
    assert main([str(run), "--data", str(moved)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before, "an evaluation writes no record"


def test_a_data_set_with_other_classes_is_refused(trained, tiny_data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    edit_manifest(other, lambda table: table["classes"].__setitem__(0, "zebra"))
    with pytest.raises(UsageError, match=r"has 4 classes, not the 4 of the run in .* that order"):
        main([str(trained), "--data", str(other)])
    edit_manifest(other, lambda table: table["classes"].__setitem__(0, "apple"))
    edit_manifest(other, lambda table: table.update(seed=9))
    main([str(trained), "--data", str(other)])
    assert f"{other} is not the data set of the training" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no split 'test'; it has train, val"):
        main([str(trained), "--data", str(tiny_data), "--split", "test"])


def test_another_split_of_another_data_set(
    trained, with_image, tiny_data, image_folder, tmp_path, capsys
):
    """The images of validation as the test split of a set with another mean: the same errors."""
    other = tmp_path / "other"
    packed(other, train=image_folder / "val", test=image_folder / "val")
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for views in ("1", "10"):
        assert main([str(run), "--data", str(tiny_data), "--views", views]) == 0
        before = (run / f"evaluation-{views}.json").read_bytes()
        capsys.readouterr()
        words = ["--data", str(other), "--split", "test", "--views", views]
        assert main([str(run), *words]) == 0
        printed = capsys.readouterr()
        path = run / f"evaluation-test-{views}.json"
        assert f"-> {path}\n" in printed.out
        assert f"{other} is not the data set of the training; the mean of the" in printed.err
        found, wanted = json.loads(path.read_text()), json.loads(before)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert found["classes"] == wanted["classes"]
        assert (run / f"evaluation-{views}.json").read_bytes() == before
    run = Path(shutil.copytree(with_image, tmp_path / "picture"))
    assert main([str(run), "--data", str(other), "--split", "test"]) == 0
    assert "its own mean is subtracted" in capsys.readouterr().err


def write_class_list(folder: Path, classes: tuple[str, ...]) -> Path:
    path = folder / "classes.txt"
    path.write_text("".join(f"{name}\n" for name in classes))
    return path


def pack_unlabelled(folder: Path, image_folder: Path, names: dict[str, str]) -> Path:
    """Pack images of the validation split without labels, renamed as ILSVRC's test images."""
    (folder / "test").mkdir()
    for name, origin in names.items():
        shutil.copy(image_folder / "val" / origin, folder / "test" / name)
    packed(folder / "data", train=folder / "test", labels=False)
    return folder / "data"


def read_guesses(path: Path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in path.read_text().splitlines()]


def test_a_submission_has_a_line_an_image_in_the_order_of_the_names(
    trained, image_folder, tmp_path, capsys
):
    """The oracle runs each image by itself, and ranks with NumPy; image 3 was never packed."""
    origins = sorted(str(path.relative_to(image_folder / "val")) for path in
                     (image_folder / "val").glob("*/*.jpg"))  # fmt: skip
    numbers = [1, 2, 4, 5, 6, 7]
    named = {f"ILSVRC2012_test_{number:08d}.JPEG": origins[3 * number] for number in numbers[:-1]}
    named[f"ILSVRC2012_test_{7:08d}.JPEG"] = origins[0]
    data = pack_unlabelled(tmp_path, image_folder, named)
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    out, classes = tmp_path / "test.txt", Manifest.load(read_address(trained)).classes
    ids = [3, 9, 4, 7]
    listed = tuple(
        classes[ids.index(number)] if number in ids else f"other{number}" for number in range(1, 10)
    )
    words = [str(run), "--data", str(data), "--split", "train", "--json"]
    submit = ["--submission", str(out), "--class-list", str(write_class_list(tmp_path, listed))]
    evaluations = {path: path.read_bytes() for path in run.glob("evaluation*")}
    assert main([*words, *submit]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["samples"], result["step"]) == (6, 4)
    assert "top1_error" not in result
    assert evaluations == {path: path.read_bytes() for path in run.glob("evaluation*")}
    assert f"submission -> {out}" in printed.err
    assert "1 images are damaged or missing, such as ILSVRC2012_test_00000003;" in printed.err
    net = AlexNet(classes=4, width=CONFIG.design.width).eval()
    load_checkpoint(run / "checkpoints" / "step-00000004", net)
    rows = {}
    mean = tuple(Statistics.load(read_address(trained)).channel_mean)
    with Stream(data, batch_size=1, crop="center", once=True, threads=1, mean=mean) as stream:
        for batch in stream:
            with torch.no_grad():
                rows[batch.names[0]] = torch.softmax(net(batch.images), 1)[0].numpy()
    wanted = [rows[name] for name in sorted(rows)]
    wanted.insert(2, np.mean(wanted, axis=0))
    assert read_guesses(out) == [[ids[place] for place in np.argsort(-row)] for row in wanted]


def read_address(run: Path) -> Path:
    return Path(re.search(r'(?m)^data = "(.*)"', (run / "config.toml").read_text())[1])


def test_a_submission_counts_as_the_servers_routine_does(trained, tiny_data, tmp_path, capsys):
    """The oracle is `eval_flat` of the development kits: is the truth among the first k?"""
    classes = Manifest.load(tiny_data).classes
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    out = tmp_path / "val.txt"
    listed = write_class_list(tmp_path, classes[::-1])
    words = [str(run), "--data", str(tiny_data), "--submission", str(out), "--class-list"]
    assert main([*words, str(listed), "--views", "10"]) == 0
    assert f"10.json\nval, 20 images, ten views, step 4 (newest): submission -> {out}\n" in (
        capsys.readouterr().out
    )
    with Stream(tiny_data, split="val", batch_size=20, once=True, crop="center") as stream:
        batch = next(stream)
    by_name = dict(zip(batch.names, batch.labels.tolist(), strict=True))
    names = sorted(by_name, key=lambda name: (name.rpartition("/")[2], name))
    truth = [len(classes) - by_name[name] for name in names]
    guesses = read_guesses(out)
    wrong = sum(answer[0] != right for answer, right in zip(guesses, truth, strict=True))
    written = json.loads((run / "evaluation-10.json").read_text())
    assert written["top1_error"] == pytest.approx(wrong / 20)


def test_lines_of_images_without_numbers_are_in_the_order_of_their_names(tmp_path):
    names = ["b/2.jpg", "a/3.jpg", "c/1.jpg", ""]
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    batch = SimpleNamespace(ids=torch.arange(4), names=names, weights=weights)
    found = Predictions(torch.tensor([10, 20, 30]), 3)
    rows = [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5], [0.0, 0.0, 0.0]]
    found.add(batch, torch.tensor(rows))
    found.save(tmp_path / "out.txt")
    assert read_guesses(tmp_path / "out.txt") == [[30, 10, 20], [10, 20, 30], [20, 30, 10]]


def test_what_no_submission_can_be_made_of_is_refused(trained, image_folder, tmp_path):
    names = {f"{number}.jpg": f"cat/{number:03d}.jpg" for number in (1, 2)}
    data = pack_unlabelled(tmp_path, image_folder, names)
    run, out = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "out.txt"
    words = [str(run), "--data", str(data), "--split", "train"]
    submit = [*words, "--submission", str(out)]
    whole = write_class_list(tmp_path, Manifest.load(read_address(trained)).classes)
    half = tmp_path / "half.txt"
    half.write_text("".join(whole.read_text().splitlines(keepends=True)[:2]))
    twice = tmp_path / "twice.txt"
    twice.write_text("n01440764 tench\nn01440764 tench\n")
    void, gap = tmp_path / "void.txt", tmp_path / "gap.txt"
    void.write_text("\n")
    gap.write_text("a\n\nb\n")
    listed = ["--class-list", str(whole)]
    for command, message in (
        (words, "has no classes to count errors by; give --submission FILE --class-list FILE"),
        (submit, "needs the numbers of the classes; give --class-list FILE: ILSVRC's development"),
        ([*words, "--class-list", str(whole)], "--class-list goes with --submission FILE"),
        ([*submit, "--class-list", "x"], "class list x does not exist; name a kit or a list"),
        ([*submit, "--class-list", str(data)], "is no development kit; name a kit or a list"),
        ([*submit, "--class-list", str(half)], "lacks '.*' and 1 more of the run's 4 classes"),
        ([*submit, "--class-list", str(twice)], "has 'n01440764' twice; give a class a line"),
        ([*submit, "--class-list", str(void)], "is empty; give a class a line"),
        ([*submit, "--class-list", str(gap)], "has an empty line 2; give a class a line"),
        ([*submit, "--class-list", str(whole), "--save-probabilities"], "has no classes, which"),
        (
            [*words, "--submission", f"{out}/x", *listed],
            "folder of the submission .*; name another",
        ),
        ([*words, "--submission", str(tmp_path), *listed], "cannot write .*; name another --subm"),
    ):
        out.unlink(missing_ok=True)
        if f"{out}/x" in command:
            out.write_text("a file")
        with pytest.raises(UsageError, match=message) as caught:
            main(command)
        assert str(caught.value).isprintable()
        assert not list(tmp_path.glob("out.txt.*")), "nothing half-written is left"
