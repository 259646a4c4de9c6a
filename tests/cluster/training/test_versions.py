"""Runs whose data set grows or loses samples between two starts, below Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.run.folder import read_identity
from cluster.train import main
from pipeline.dataset.manifest import Manifest, identity, version_folder
from pipeline.dataset.segments import Segment
from pipeline.stream.ledger.proof import prove
from pipeline.tools.errors import UsageError
from tests.helpers.images import folder_per_class, packed
from tests.helpers.training_runs import CONFIG, alone, rows
from tests.helpers.versions import append_samples, copy_set, withdraw

# Six steps of 8 are an epoch of 48; the seventh and eighth are of the next.
LEDGERED = replace(CONFIG, ledger=True, steps=0, epochs=2.0, checkpoint_every=4, validate_every=8)
LATEST = "--data-version", "latest"


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack a set of 12 other images of the same classes."""
    root = tmp_path_factory.mktemp("more")
    folder_per_class(root / "train", 3, first_seed=900)
    packed(root / "data", train=root / "train", samples_per_shard=5)
    return root / "data"


@pytest.fixture(name="data")
def own_copy(tiny_data: Path, tmp_path: Path) -> Path:
    return copy_set(tiny_data, tmp_path / "data")


def start(config: Config, data: Path, run: Path, *words: str, stop_after: int = 0) -> None:
    """Start a run as the command does, but for Ray."""

    def trainer(ready: Config, where: str, folder: Path, _: object) -> None:
        alone(ready, Path(where), folder, stop_after)

    path = run.parent / "config.toml"
    settings = {name: value for name, value in config.to_settings().items() if value != ""}
    path.write_text("\n".join(f"{name} = {json.dumps(one)}" for name, one in settings.items()))
    main([str(path), "--data", str(data), "--run", str(run), *words], trainer=trainer)


def test_a_run_keeps_the_version_that_it_began_with(data, more, tmp_path):
    run, first = tmp_path / "run", identity(data)
    start(LEDGERED, data, run, stop_after=4)
    append_samples(data, more)
    start(LEDGERED, data, run)
    assert read_identity(run).data_sha256 == first != identity(data)
    assert read_identity(run).segments == ()
    assert [row["position"] for row in rows(run)] == list(range(8, 97, 8))
    assert rows(run)[-1]["epoch"] == 2.0
    proof = prove(data, [run])
    assert (proof.findings, proof.epochs, proof.segments) == ((), (0, 1), ())
    with pytest.raises(UsageError, match=r"reads version 1 of .*, not 2; give --data-version lat"):
        start(LEDGERED, data, run, "--data-version", "2")


def test_a_run_goes_on_with_the_newest_version_and_its_ledger_is_proved(data, more, tmp_path):
    run, first = tmp_path / "run", identity(data)
    start(LEDGERED, data, run, *LATEST, stop_after=4)
    second = append_samples(data, more)
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
    table = json.loads((run / "checkpoints/step-00000014/checkpoint.json").read_text())
    assert table["segments"] == [list(one) for one in expected]
    start(LEDGERED, data, run, *LATEST)  # finished
    assert Manifest.load(data / version_folder(2)).number == 2
