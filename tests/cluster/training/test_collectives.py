"""Operations of torch.distributed: all ranks of a group call them in one order, or NCCL would hang.

Two replicas of two columns train, validate, take statistics and save, in four processes.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.mesh import create_mesh
from cluster.training.loop import train
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import CONFIG

SEATS = ((0, 1), (2, 3))
GROUPS = {"pair": SEATS, "images": SEATS, "peers": ((0, 2), (1, 3)), "world": ((0, 1, 2, 3),)}
"""Ranks that share a group, by its role."""
SETTINGS = replace(
    CONFIG, replicas=2, steps=2, validate_every=2, statistics_every=1, checkpoint_every=1
)
Operation = tuple[str, str, Any]
"""Role of the group, name, and shapes: of a swap [sent, received]."""


def is_operation(name: str) -> bool:
    """Return whether a function of torch.distributed makes ranks of a group wait for each other."""
    function = getattr(dist, name)
    if name.startswith(("_", "get_", "new_")) or type(function) is not FunctionType:
        return False
    # P2POp wants isend and irecv themselves; here batch_isend_irecv takes them.
    return name not in ("isend", "irecv", "destroy_process_group") and (
        "group" in inspect.signature(function).parameters or name == "batch_isend_irecv"
    )


def list_shapes(name: str, arguments: dict[str, Any], column: int) -> Any:
    if name == "batch_isend_irecv":
        by_kind = {op.op: list(op.tensor.shape) for op in arguments["p2p_op_list"]}
        assert len(by_kind) == len(arguments["p2p_op_list"]) == 2
        sent, received = by_kind[dist.isend], by_kind[dist.irecv]
        return [sent, received] if column == 0 else [received, sent]  # what the peer calls it
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return [list(tensor.shape) for tensor in tensors]


def record(
    function: Callable[..., Any], roles: dict[Any, str], column: int, into: list[Operation]
) -> Callable[..., Any]:
    """Wrap a function of torch.distributed so that it appends each of its calls to `into`."""
    signature = inspect.signature(function)

    @wraps(function)
    def called(*words: Any, **named: Any) -> Any:
        arguments = signature.bind(*words, **named).arguments
        group = arguments.get("group")
        if "p2p_op_list" in arguments:
            group = arguments["p2p_op_list"][0].group
        shapes = list_shapes(function.__name__, arguments, column)
        into.append((roles[group], function.__name__, shapes))
        return function(*words, **named)

    return called


def train_and_record(rank: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=4)
    mesh = create_mesh(SEATS, torch.device("cpu"), 1)
    roles = {mesh.pair: "pair", mesh.image_group: "images", mesh.peers: "peers", None: "world"}
    found: list[Operation] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(is_operation, dir(dist)):
            patch.setattr(dist, name, record(getattr(dist, name), roles, mesh.columns[0], found))
        train(SETTINGS, str(data), folder / "run", mesh, lambda event: None)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def operations(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Operation]]:
    """Operations of each rank, in the order of their calls."""
    folder = tmp_path_factory.mktemp("collectives")
    (folder / "run").mkdir()
    run_ranks(train_and_record, (folder, tiny_data), 4)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def test_all_ranks_call_in_one_order_whatever_the_group(operations):
    """Else two communicators of NCCL can wait for each other."""
    first, *others = ([one[:2] for one in found] for found in operations)
    assert all(other == first for other in others)


@pytest.mark.parametrize("role", GROUPS)
def test_all_ranks_of_a_group_agree_in_the_shapes(operations, role):
    for ranks in GROUPS[role]:
        first, *others = ([one for one in operations[rank] if one[0] == role] for rank in ranks)
        assert all(other == first for other in others)


def test_every_kind_of_operation_was_seen(operations):
    """A swap for each layer that reads both columns, forward and backward, and so on."""
    counts = Counter((role, name) for role, name, _ in operations[0])
    assert counts["pair", "batch_isend_irecv"] >= 8 * SETTINGS.steps
    assert counts["images", "batch_isend_irecv"] >= SETTINGS.steps
    assert counts["peers", "all_reduce"] >= 2 * SETTINGS.steps
    assert counts["world", "all_reduce"] >= SETTINGS.steps
    assert counts["world", "all_gather_object"] >= SETTINGS.steps  # statistics
