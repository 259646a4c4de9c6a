"""Exact mode: the same bits for one process, pairs and any number of replicas."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.mesh import ProcessMesh
from cluster.run.folder import CHECKPOINTS, METRICS
from cluster.training.gradients import GradientAverage, GradientTree
from cluster.training.step import TrainStep
from model.alexnet import AlexNet
from model.architecture import Design
from model.column_threads import ColumnThreads
from model.optimizer import Sgd2012
from model.schedule import Rates
from pipeline.dataset.manifest import Manifest
from pipeline.stream.ledger.proof import prove
from tests.helpers.training_runs import CONFIG, STEPS, Call, alone, cut_at, rows, together

LEAVES = 8
EXACT = replace(
    CONFIG, exact=True, batch_size=2 * LEAVES, microbatch=2, statistics_every=2, ledger=True,
    replicas=f"1:{LEAVES}", validate_every=2,
)  # fmt: skip
LOCAL = replace(
    EXACT, lars=0.002, warmup=0.4, layer_decays=("local3=0.004",),
    design=Design(net="local11", lrn_size=9, lrn_alpha=1e-3, norm_layers=("conv2=scale",)),
)  # fmt: skip
TIMES = ("compute", "data_wait", "exchange", "exchange_bytes", "img_s", "memory", "replicas",
         "reduce", "saving", "seconds", "stall", "wait_")  # fmt: skip
"""Beginnings of the fields that depend on the machine and the layout."""


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process, in two pairs, and first in one and then in the other.

    `borders` was stopped at the end of the first epoch, at that of the second, and there once more.
    """
    root = tmp_path_factory.mktemp("exact")
    alone(EXACT, tiny_data, root / "whole")
    alone(LOCAL, tiny_data, root / "local, whole")
    cut_at(3, root / "whole", root / "grown")
    samples = Manifest.load(tiny_data).split("train", tiny_data).samples
    epochs = replace(EXACT, batch_size=samples // 4, microbatch=0, checkpoint_every=4,
                     validate_every=0, lr_drops=1, bias_drops=1, replicas="1:2")  # fmt: skip
    for end in (4, 8, 8):
        alone(replace(epochs, steps=end), tiny_data, root / "borders")
    calls = [
        Call(EXACT, tiny_data, root / "two pairs"),
        Call(LOCAL, tiny_data, root / "local, two pairs"),
        Call(EXACT, tiny_data, root / "grown"),
        Call(replace(epochs, steps=12), tiny_data, root / "borders"),
    ]
    together(root / "job", calls, world=4)
    return root


def read_rows(run: Path, name: str) -> list[dict[str, object]]:
    """Rows from step 4 on, without the fields of the machine."""
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in rows(run, name)
        if row["step"] > 3
    ]


def assert_same_bits(whole: Path, other: Path) -> None:
    for name in (METRICS, "validation.jsonl", "layers.jsonl"):
        assert read_rows(other, name) == read_rows(whole, name)
        assert read_rows(whole, name)
    files = sorted((whole / CHECKPOINTS / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        there = other / file.relative_to(whole)
        assert there.read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["two pairs", "grown"])
def test_losses_statistics_and_state_have_the_bits_of_one_process(runs: Path, name: str) -> None:
    assert_same_bits(runs / "whole", runs / name)
    assert {row["replicas"] for row in rows(runs / name)} == ({2} if name != "grown" else {1, 2})


def test_so_they_have_with_locally_connected_layers_and_lars(runs: Path) -> None:
    assert_same_bits(runs / "local, whole", runs / "local, two pairs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "size"), [(2, 2), (2, 1), (4, 1), (8, 2), (8, 1)],
    ids=["pair", "2 replicas", "4 replicas", "4 pairs", "8 replicas"],
)  # fmt: skip
def test_so_do_all_other_layouts(
    runs: Path, tiny_data: Path, world: int, size: int, tmp_path: Path
) -> None:
    together(tmp_path / "job", [Call(EXACT, tiny_data, tmp_path / "run")], world, size)
    assert_same_bits(runs / "whole", tmp_path / "run")


def test_another_tree_is_seen_in_the_last_bits(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The comparison is not empty."""
    alone(replace(EXACT, microbatch=4), tiny_data, tmp_path / "other")
    ours, theirs = (
        [row["loss"] for row in rows(run)] for run in (runs / "whole", tmp_path / "other")
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_bits(runs / "whole", tmp_path / "other")


def test_a_run_stopped_at_borders_of_epochs_delivers_each_sample_once(
    runs: Path, tiny_data: Path
) -> None:
    """The third epoch had another number of workers."""
    proof = prove(tiny_data, [runs / "borders"])
    assert proof.findings == ()
    assert proof.summary().startswith("epochs 0-2 exactly once (3 x 48 samples)")
    assert "on 1 and 4 ranks" in proof.summary()


def watch_gradients(count: int) -> tuple[list[Tensor], Tensor]:
    """Gradients of some micro-batches, and their sum over the tree."""
    net = nn.Linear(64, 3)
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(count, 5, 64, generator=generator)
    single = [torch.autograd.grad(net(part).square().sum(), net.weight)[0] for part in parts]
    with GradientTree(net, ProcessMesh()) as tree:
        for index, part in enumerate(parts):
            with tree.hold(index + 1 < count):
                net(part).square().sum().backward()
        tree.finish()
    assert net.weight.grad is not None
    return single, net.weight.grad


def test_gradients_are_summed_over_a_balanced_tree() -> None:
    single, found = watch_gradients(8)
    rest = list(single)
    while len(rest) > 1:
        rest = [a + b for a, b in zip(rest[::2], rest[1::2], strict=True)]
    assert torch.equal(found, rest[0])
    assert not torch.equal(found, torch.stack(single).double().sum(0).float())
    assert not torch.equal(found, sum(single))


def test_images_are_answered_in_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may round a row of a larger batch otherwise: so it must be as large everywhere."""
    net = AlexNet(classes=4, width=1 / 16).eval()
    seen: list[int] = []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda x: (seen.append(len(x)), forward(x))[1])
    for average, parts in ((GradientTree, [2, 2]), (GradientAverage, [4])):
        with average(net, ProcessMesh()) as one:
            step = TrainStep(
                net, Sgd2012(net.named_parameters()), torch.float32, microbatch=2, average=one
            )
            assert step.infer(torch.zeros(4, 3, 224, 224)).shape == (4, 4)
        assert seen == parts
        seen.clear()


def test_micro_batches_without_a_balanced_tree_are_refused() -> None:
    with pytest.raises(RuntimeError, match="6 micro-batches have no balanced tree"):
        watch_gradients(6)


def test_a_column_that_fails_is_named_by_its_own_error_and_both_go_on() -> None:
    net = AlexNet(classes=10, width=1 / 16).eval()
    images = torch.zeros(1, 3, 224, 224)
    with closing(ColumnThreads(net)) as columns, torch.no_grad():
        for index in (0, 1):

            def work(column: AlexNet, index: int = index) -> Tensor:
                if column.columns == (index,):
                    raise ValueError(f"column {index}")
                return column(images)

            with pytest.raises(ValueError, match=f"column {index}"):
                columns.run(work)
            a, b = columns.run(lambda column: column(images))
            assert torch.equal(a, b)
            assert not a.requires_grad
        torch.testing.assert_close(a, net(images))


@pytest.mark.parametrize("trust", [0.0, 0.01])
def test_columns_are_updated_with_the_bits_that_they_get_alone(trust: float) -> None:
    """The processor computes in vectors, and the first column ends within one."""
    pieces = torch.randn(2, 13, generator=torch.Generator().manual_seed(0))
    gradients = torch.randn(2, 13, generator=torch.Generator().manual_seed(1))

    def update(values: Tensor, given: Tensor, columns: int) -> Tensor:
        weight = nn.Parameter(values.clone())
        optimizer = Sgd2012([("conv1.weight", weight)], columns=columns, trust=trust)
        for _ in range(3):
            weight.grad = given.clone()
            optimizer.step(Rates(0.0123, 0.02))
        return weight.detach()

    alone = torch.cat([update(pieces[c, :, None], gradients[c, :, None], 1) for c in (0, 1)])
    assert torch.equal(update(pieces.view(26, 1), gradients.view(26, 1), 2), alone)
