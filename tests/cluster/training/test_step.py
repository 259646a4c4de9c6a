"""A step of the training: what the host waits for, and passes that are recorded and replayed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Warned
from cluster.run.folder import LAYERS, VALIDATION
from cluster.training import components, step
from cluster.training.components import can_record
from cluster.training.finite_check import NotFinite
from cluster.training.passes import WARM_UP, CudaGraph, Graph, Passes
from cluster.training.step import ReplicaBatch, TrainStep
from model.alexnet import AlexNet
from model.architecture import Design
from model.norm import native
from model.optimizer import Sgd2012
from model.schedule import Rates
from tests.helpers.host_reads import HostReads
from tests.helpers.op_graph import OperationGraph
from tests.helpers.training_processes import REPOSITORY
from tests.helpers.training_runs import CONFIG, alone, cut_at, learned, rows, weights

# Four stretches of three steps with a rate of their own.
TWELVE = replace(CONFIG, steps=12, checkpoint_every=6, validate_every=6, statistics_every=4)


class UnsupportedGraph(OperationGraph):
    """Graph of a device that cannot record the work."""

    def capture(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        work()
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        except RuntimeError:
            raise RuntimeError("the capture is invalid") from None


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's operations do all the work: those are what an `OperationGraph` sees."""
    monkeypatch.setattr(native, "prepare_kernels", lambda x: False)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have `train` record its steps."""
    monkeypatch.setattr(components, "can_record", lambda config, mesh: True)
    monkeypatch.setattr(components, "CudaGraph", OperationGraph)
    monkeypatch.setattr(OperationGraph, "replays", 0)
    return


def assert_equal_runs(found: Path, wanted: Path) -> None:
    """Compare all that was learned, to the bit."""
    assert learned(found) == learned(wanted)
    assert learned(found, VALIDATION) == learned(wanted, VALIDATION)
    assert rows(found, LAYERS) == rows(wanted, LAYERS)
    ours, theirs = weights(found, 12), weights(wanted, 12)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("norm", ["lrn", "batch"])
def test_recorded_steps_learn_the_same_through_changes_of_rate_and_a_resume(
    norm, torch_kernels, tiny_data, tmp_path, request
):
    config = replace(TWELVE, design=replace(CONFIG.design, norm=norm))
    alone(config, tiny_data, tmp_path / "eager")
    request.getfixturevalue("recorded")
    alone(config, tiny_data, tmp_path / "graph")
    assert OperationGraph.replays == 2 * 12
    assert_equal_runs(tmp_path / "graph", tmp_path / "eager")
    cut_at(6, tmp_path / "eager", tmp_path / "again")
    alone(config, tiny_data, tmp_path / "again")
    assert learned(tmp_path / "again", first=7) == learned(tmp_path / "eager", first=7)
    ours, theirs = weights(tmp_path / "again", 12), weights(tmp_path / "eager", 12)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_step_that_cannot_be_recorded_goes_on_without(tiny_data, tmp_path, request, monkeypatch):
    config = replace(TWELVE, steps=5, design=replace(CONFIG.design, norm="batch"))
    alone(config, tiny_data, tmp_path / "eager")
    request.getfixturevalue("recorded")
    monkeypatch.setattr(components, "CudaGraph", UnsupportedGraph)
    told = alone(config, tiny_data, tmp_path / "graph")
    assert [event.text for event in told if isinstance(event, Warned)] == [
        "steps are launched one operation at a time, without a CUDA graph "
        "(RuntimeError: operation not permitted when stream is capturing)"
    ]
    assert learned(tmp_path / "graph") == learned(tmp_path / "eager")
    ours, theirs = weights(tmp_path / "graph", 5), weights(tmp_path / "eager", 5)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_loss_that_is_no_number_is_found_before_the_update_of_a_recorded_step(
    torch_kernels, tiny_data, tmp_path, request
):
    """The layer that broke can only be named as long as the weights are those that broke it."""
    config, messages = replace(TWELVE, lr=1e6, validate_every=0), []
    for name in ("eager", "graph"):
        if name == "graph":
            request.getfixturevalue("recorded")
        with pytest.raises(NotFinite) as caught:
            alone(config, tiny_data, tmp_path / name)
        messages.append(str(caught.value))
    assert OperationGraph.replays > 0
    assert messages[0] == messages[1]
    assert "is the first layer whose output is not finite" in messages[0]


def make_batch(images: int, device: str = "cpu") -> ReplicaBatch:
    generator = torch.Generator().manual_seed(images)
    return ReplicaBatch(
        (60 * torch.randn(images, 3, 224, 224, generator=generator)).to(device),
        torch.arange(images, device=device) % 4,
        torch.ones(images, device=device),
        torch.zeros(images, device=device),
        images,
    )


def make_step(
    graph: type[Graph] | None, warn: Callable[[str], None] = pytest.fail, device: str = "cpu"
) -> TrainStep:
    net = AlexNet(classes=4, design=Design(width=1 / 16)).to(device)
    optimizer = Sgd2012(net.named_parameters())
    return TrainStep(net, optimizer, torch.float32, graph=graph, warn=warn)


def test_a_batch_of_another_shape_ends_the_replays(torch_kernels):
    told: list[str] = []
    eager, graph = make_step(None), make_step(OperationGraph, told.append)
    for number, images in enumerate((2, 2, 2, 2, 2, 3, 2)):
        assert told == [] or number > 4
        found, wanted = (
            one(make_batch(images), 2 * number, Rates(0.01, 0.02)) for one in (graph, eager)
        )
        assert torch.equal(found, wanted), number
    (line,) = told
    assert "a batch has another shape than those before" in line


def test_the_loss_is_copied_before_the_backward_pass_and_read_before_the_update(monkeypatch):
    """The host then waits for the forward pass only, and the weights are those of the loss."""
    order: list[str] = []

    def note(owner: type, method: str, name: str) -> None:
        plain = getattr(owner, method)

        def noted(*args: object) -> object:
            order.append(name)
            return plain(*args)

        monkeypatch.setattr(owner, method, noted)

    note(Passes, "forward", "forward")
    note(step.HostCopy, "__init__", "copy")
    note(Passes, "backward", "backward")
    note(step.HostCopy, "read", "read")
    note(Sgd2012, "step", "update")
    make_step(None)(make_batch(2), 0, Rates(0.01, 0.02))
    assert order == ["forward", "copy", "backward", "read", "update"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="lrn"),
        pytest.param({"dtype": "bfloat16"}, id="bfloat16", marks=pytest.mark.slow),
        pytest.param({"norm": "batch"}, id="batch norm", marks=pytest.mark.slow),
    ],
)
def test_no_step_waits_for_a_device_but_for_two_copies_that_were_launched_early(
    change, tiny_data, tmp_path
):
    settings = CONFIG.to_settings() | {"validate_every": 0, "statistics_every": 0} | change
    config = Config.from_settings(settings | {"checkpoint_every": 100})
    counts = []
    for steps in (4, 12):
        with HostReads() as reads:
            alone(replace(config, steps=steps), tiny_data, tmp_path / str(steps))
        counts.append(reads.seen)
    few, many = counts
    # The loss before the update, and the row of the step before.
    assert many - few == {"tolist in model.timing.HostCopy.read": 2 * 8}


def test_reads_are_noticed():
    values = torch.tensor([1.0, 2.0])
    with HostReads() as reads:
        float(values[0])
        values.to("cpu")
        values[values > 1]
        values.to("cpu", non_blocking=True)
        values.to(torch.float64)
        torch.tensor([1.0], device="cpu")
    assert sum(reads.seen.values()) == 4
    assert set(reads.seen) == {
        f"{name} in {__name__}.test_reads_are_noticed"
        for name in ("__float__", "to", "__getitem__", "tensor")
    }


@pytest.mark.parametrize(
    ("change", "mesh", "may"),
    [
        ({}, {}, True),
        ({"cuda_graph": "off"}, {}, False),
        ({"microbatch": 4}, {}, False),
        ({"replicas": 2}, {"replicas": 2}, False),
        ({}, {"device": torch.device("cpu")}, False),
    ],
    ids=["whole", "switched off", "micro-batches", "replicas", "cpu"],
)
def test_steps_are_recorded_where_one_gpu_computes_all_of_a_batch_at_once(change, mesh, may):
    there = ProcessMesh(**({"device": torch.device("cuda")} | mesh))
    assert can_record(replace(CONFIG, **change), there) is may


def test_the_step_needs_torch_alone():
    """The benchmark on a GPU makes it on machines without DALI, Ray, and the rest."""
    others = (
        "nvidia", "ray", "tyro", "isal", "webdataset", "rich", "safetensors", "PIL", "scipy",
        "fsspec", "pyarrow", "jinja2", "simplejpeg",
    )  # fmt: skip
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import cluster.training.step"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_graphs_share_memory_and_a_stream_and_a_failed_capture_leaves_none_in_place(monkeypatch):
    current, calls = MagicMock(name="current"), list[Any]()

    class Capture:
        """Stand-in for `torch.cuda.graph`, whose end raises, too, when the work has failed."""

        def __init__(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> None:
            calls.append((graph, pool, stream, capture_error_mode))

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: object, *_: object) -> None:
            if kind:
                raise RuntimeError("the capture is invalid")

    cuda = {
        "CUDAGraph": object, "Stream": MagicMock, "stream": MagicMock(), "graph": Capture,
        "graph_pool_handle": object,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    set_stream = MagicMock()
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    first = CudaGraph()
    second = CudaGraph(first)
    done: list[int] = []
    first.warm_up(lambda: done.append(1))
    assert len(done) == WARM_UP
    torch.cuda.stream.assert_called_once_with(first._stream)  # type: ignore[attr-defined]
    current.wait_stream.assert_called_once_with(first._stream)
    assert first.capture(list) == []
    with pytest.raises(RuntimeError, match="invalid"):
        second.capture(lambda: [torch.ones(1)[3]])
    assert set_stream.call_args_list[-1].args == (current,)
    (one, other) = calls
    assert one == (first._graph, first._pool, first._stream, "thread_local")
    assert other == (second._graph, first._pool, first._stream, "thread_local")


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_learn_the_same():
    eager, graph = (make_step(kind, device="cuda") for kind in (None, CudaGraph))
    for number in range(12):
        rates = Rates(0.01 if number < 8 else 0.001, 0.02)
        found, wanted = (one(make_batch(8, "cuda"), 8 * number, rates) for one in (graph, eager))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, CudaGraph])
def test_a_step_on_a_gpu_never_waits_for_all_of_its_work(kind):
    train_step = make_step(kind, device="cuda")
    batch = make_batch(8, "cuda")
    train_step(batch, 0, Rates(0.01, 0.02))
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(batch, 800, Rates(0.01, 0.02))
    finally:
        torch.cuda.set_sync_debug_mode("default")
