"""Runs whose data set grows or loses samples between two starts, below Ray."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster import evaluate, train
from cluster.cli.options import TrainOptions
from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.folder import read_identity
from cluster.train import main
from cluster.training import loop
from cluster.training.learning_rate import RateSettings
from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest, identity, tables_folder, version_folder
from pipeline.dataset.members import TextTable
from pipeline.dataset.segments import Segment, append_version, count_epochs, find_divergence
from pipeline.options import BuildConfig, WithdrawOptions
from pipeline.packing.additions import add_version
from pipeline.stream.ledger.proof import prove
from pipeline.stream.shard_reader import WITHDRAWN
from pipeline.tools.errors import UsageError
from pipeline.verify import verify
from pipeline.withdraw import make_version
from tests.helpers.http_servers import Server
from tests.helpers.images import InProcess, jpeg
from tests.helpers.resealed_data import edit_manifest
from tests.helpers.training_runs import CONFIG, alone, rows
from tests.helpers.versions import append_samples, make_identity, withdraw

# Six steps of 8 are an epoch of 48; the seventh and eighth are of the next.
LEDGERED = replace(CONFIG, ledger=True, steps=0, epochs=2.0, checkpoint_every=4, validate_every=8)
LATEST = "--data-version", "latest"


def start(config: Config, data: object, run: Path, *words: str, stop_after: int = 0) -> None:
    """Start a run as the command does, but for Ray."""

    def trainer(ready: Config, where: str, folder: Path, _: object) -> None:
        alone(ready, where, folder, stop_after)

    path = run.parent / "config.toml"
    settings = {name: value for name, value in config.to_settings().items() if value != ""}
    path.write_text("\n".join(f"{name} = {json.dumps(one)}" for name, one in settings.items()))
    main([str(path), "--data", str(data), "--run", str(run), *words], trainer=trainer)


def check_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluate the last step: the same version, normalized as in training, has the same errors."""
    capsys.readouterr()  # what the training has said
    evaluate.main([str(run), "--json"])
    out, err = capsys.readouterr()
    last, found = rows(run, "validation.jsonl")[-1], json.loads(out)
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["samples"] == last["samples"]
    assert "is not the data set of the training" not in err


def test_a_run_keeps_the_version_that_it_began_with(data, more_data, tmp_path, capsys):
    run, first = tmp_path / "run", identity(data)
    start(LEDGERED, data, run, stop_after=4)
    append_samples(data, more_data, statistics=more_data)
    start(LEDGERED, data, run)
    assert read_identity(run).data_sha256 == first != identity(data)
    assert read_identity(run).segments == ()
    assert [row["position"] for row in rows(run)] == list(range(8, 97, 8))
    assert rows(run)[-1]["epoch"] == 2.0
    proof = prove(data, [run])
    assert (proof.findings, proof.epochs, proof.segments) == ((), (0, 1), ())
    check_evaluation(run, capsys)
    with pytest.raises(UsageError, match=r"reads version 1 of .*, not 2; give --data-version lat"):
        start(LEDGERED, data, run, "--data-version", "2")


def test_a_run_goes_on_with_the_newest_and_its_ledger_is_proved(data, more_data, tmp_path, capsys):
    run, first = tmp_path / "run", identity(data)
    start(LEDGERED, data, run, *LATEST, stop_after=4)
    second = append_samples(data, more_data, statistics=more_data)
    withdrawn = withdraw(data, [5])
    start(LEDGERED, data, run, *LATEST)
    assert second != withdrawn == identity(data)
    expected = (Segment(first, 48), Segment(withdrawn, 59, 48, 1))
    assert read_identity(run).segments == expected
    assert read_identity(run).data_sha256 == first
    found = rows(run)
    assert len(found) == 14  # 48 and 59 images are 13.4 batches of 8
    assert [row["epoch"] for row in found[5:8]] == [1.0, 1.1356, 1.2712]  # 1 + 8 / 59, ...
    proof = prove(data, [run])
    assert proof.findings == ()
    assert [(one.number, one.epochs) for one in proof.segments] == [(1, (0,)), (3, (1,))]
    check_evaluation(run, capsys)
    table = json.loads((run / "checkpoints/step-00000014/checkpoint.json").read_text())
    assert table["segments"] == [list(one) for one in expected]
    start(LEDGERED, data, run, *LATEST)  # finished
    assert Manifest.load(data / version_folder(2)).number == 2


def test_a_version_of_other_classes_is_not_gone_on_with(data, more_data, tmp_path, monkeypatch):
    table = {"data_sha256": identity(data), "position": 32}
    append_samples(data, more_data)
    for folder in (data, data / version_folder(2)):
        edit_manifest(folder, lambda table: table["classes"].reverse())
    monkeypatch.setattr(train, "_read_checkpoint", lambda _: table)
    command = TrainOptions(
        config=Path("demo"), data=str(data), run=tmp_path / "run",
        settings=replace(CONFIG, data_version="latest"),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"version 2 of .* has other classes than version 1, wh"):
        train.choose_segments(command)


def read_names(data: Path) -> list[str]:
    manifest = Manifest.load(data)
    count = manifest.splits["train"].samples
    return TextTable(tables_folder(data, manifest), "train", "names", count).read(np.arange(count))


def test_a_run_goes_on_with_a_version_in_which_an_image_was_replaced(data, tmp_path, capsys):
    run, first, name = tmp_path / "run", identity(data), read_names(data)[7]
    start(LEDGERED, data, run, *LATEST, stop_after=4)
    (tmp_path / "new" / name).parent.mkdir(parents=True)
    (tmp_path / "new" / name).write_bytes(jpeg(9999))
    settings = BuildConfig(out=str(data), add=str(tmp_path / "new"), replace=True)
    manifest = add_version(settings, pool=InProcess())
    assert (manifest.change["replaced"], manifest.splits["train"].samples) == (1, 48)
    start(LEDGERED, data, run, *LATEST)
    segments = read_identity(run).segments
    assert segments == (Segment(first, 48), Segment(identity(data), 48, 48, 1))
    proof = prove(data, [run])
    assert proof.findings == ()
    assert [(one.number, one.epochs) for one in proof.segments] == [(1, (0,)), (2, (1,))]
    check_evaluation(run, capsys)
    images = {}
    plain = {"crop": "whole", "flip": 0, "colour": 0, "mean": "channel"}
    with Stream(data, version=segments, batch_size=8, seed=LEDGERED.seed, **plain) as stream:
        for batch in itertools.islice(stream, 12):
            for at, one in enumerate(batch.ids.tolist()):
                images[one] = batch.images[at].clone()
    assert len(images) == 96  # those of the second segment have ids of their own
    changed = [one for one in range(48) if not torch.equal(images[one], images[48 + one])]
    assert changed == [7]


def test_a_run_resumes_after_samples_of_its_version_were_withdrawn_and_purged(
    data, tmp_path, capsys
):
    run, first, gone = tmp_path / "run", identity(data), (3, 11, 40)
    start(LEDGERED, data, run, stop_after=4)
    names = read_names(data)
    (tmp_path / "keys").write_text("".join(f"{names[one]}\n" for one in gone))
    make_version(
        WithdrawOptions(data=str(data), keys=tmp_path / "keys", purge=True), pool=InProcess()
    )
    assert verify(data) == []
    start(LEDGERED, data, run)
    found = read_identity(run)
    assert (found.data_sha256, found.segments) == (first, ())
    assert [row["step"] for row in rows(run)] == list(range(1, 13))
    assert sum(row["replaced"] for row in rows(run)[4:]) >= len(gone)  # all are due in epoch 1
    listed = {(row["sample"], row["reason"]) for row in rows(run, "quarantine.jsonl")}
    assert listed == {(one, WITHDRAWN) for one in gone}  # and not damaged
    proof = prove(data, [run])
    assert (proof.findings, proof.epochs) == ((), (0, 1))
    check_evaluation(run, capsys)


def test_segments_are_read_from_a_store(data, more_data, tmp_path, capsys):
    run, first = tmp_path / "run", identity(data)
    config = replace(LEDGERED, cache=str(tmp_path / "cache"))
    with Server(data) as server:
        start(config, server.address, run, *LATEST, stop_after=4)
        second = append_samples(data, more_data, statistics=more_data)
        start(config, server.address, run, *LATEST)
        assert read_identity(run).segments == (Segment(first, 48), Segment(second, 60, 48, 1))
        assert len(rows(run)) == 14
        check_evaluation(run, capsys)
    assert prove(data, [run]).findings == ()


@given(
    st.integers(20, 90), st.lists(st.tuples(st.integers(0, 400), st.integers(20, 90)), max_size=3),
    st.sampled_from(["dexp", "poly", "manual"]), st.sampled_from([1.5, 4.0, 6.0]),
)  # fmt: skip
def test_a_version_that_comes_later_changes_no_rate_before_it(samples, later, schedule, epochs):
    config = Config(
        schedule=schedule, epochs=epochs, batch_size=12, warmup=1.0, warmup_lr=0.001,
        changes=("2 colour 0",),
    )  # fmt: skip
    segments, position = append_version((), 0, make_identity(0), samples), 0
    for number, (read, count) in enumerate(later, 1):
        position += read
        grown = append_version(segments, position, make_identity(number), count)
        border = find_divergence(segments, grown)
        old, new = (
            RateSettings(config=config, samples=one, total=config.total_steps(one))
            for one in (segments, grown)
        )
        for step in range(1, min(old.total, new.total, border // 12) + 1):
            assert old.compute_factor(step) == new.compute_factor(step)
            before = [
                sorted((c.after, str(c.settings)) for c in one.list_scheduled() if c.after < step)
                for one in (old, new)
            ]
            assert before[0] == before[1]
        segments = grown
        # The run ends with the epoch that it was to end with.
        end = config.total_steps(segments)
        assert count_epochs(segments, end * 12) >= epochs - 1e-9
        assert end == 1 or count_epochs(segments, (end - 1) * 12) < epochs


class Opened(Exception):
    """A stream is opened, and that is enough."""


@pytest.mark.parametrize(("position", "versions"), [(40, 1), (47, 1), (48, 2), (200, 2)])
def test_a_validation_reads_the_version_of_its_step(position, versions, tmp_path, monkeypatch):
    segments = (Segment(make_identity(1), 48), Segment(make_identity(2), 59, 48, 1))

    def open_stream(*words: object, **options: object) -> None:
        assert words[4] == segments[:versions]
        assert options["split"] == "val"
        raise Opened

    monkeypatch.setattr(loop, "open_stream", open_stream)
    training = SimpleNamespace(
        config=CONFIG, data="data", run=tmp_path, mesh=ProcessMesh(), segments=segments,
        net=torch.nn.Identity(),
    )  # fmt: skip
    with pytest.raises(Opened):
        loop.validate(training, position)
