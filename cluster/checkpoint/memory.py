"""State of a training in the memory of the workers that outlive another: no step is made twice.

Replicas hold the same weights and velocities. When one is lost, another hands them to its
successor, with the position and the rows of the last step, and the checkpoint on the disk, some
steps older, is not needed. Nothing is copied while training goes well.

    memory.hold(...)            when a training begins
    memory.keep_row(...)        for each row that is written, also in processes that write none
    memory.keep(mark, ...)      after each update, and again when the step has ended
    memory.offer(run)           after a failure: step, position, hash of each column
    choose_offer(offers, ...)   the newest state of which every column is there
    restore_rows(run, offer)    rows that a lost leader has not written
    receive_columns(...)        to the processes that lack it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from isal import isal_zlib

from cluster.run.folder import METRICS, VALIDATION, Mark
from cluster.run.jsonl import append_row, cut_rows
from pipeline.tools.errors import DataError
from pipeline.tools.jsonl import Row

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.mesh import ProcessMesh
    from model.alexnet import AlexNet
    from model.optimizer import Sgd2012

State = dict[str, "Tensor"]
"""Tensors of columns by the keys of `format.collect_state`."""


@dataclass(frozen=True)
class Offer:
    """State that a process has in memory."""

    mark: Mark
    hashes: dict[int, int]
    """CRC-32 of the state of each column that it holds."""
    rows: Mapping[str, Row]
    """Rows of the step by the name of their file."""
    is_ended: bool
    """False if the step may still have to validate, to review the rates, and to be saved."""


class Memory:
    """State of a process after its last step; outlives the training that made it.

    It holds tensors, and nothing that would keep a process group from being closed: the others
    notice a failure by that.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        """Last row by the name of its file."""
        self._run, self._mark, self._is_ended, self._updates = "", Mark(), False, 0
        self._state: State = {}
        self._optimizer: Sgd2012 | None = None

    def hold(
        self, run: str, net: AlexNet, optimizer: Sgd2012, mark: Mark, *, is_ended: bool
    ) -> None:
        """Hold the state of a training that has been loaded.

        Args:
            run: name of the run.
            net, optimizer: have weights and velocities.
            mark: step of the state.
            is_ended: argument of `keep`.
        """
        self._run, self._optimizer = run, optimizer
        both = (("weights", net.values()), ("velocity", optimizer.velocities))
        self._state = {
            f"{prefix}/{key}": view
            for prefix, tensors in both
            for key, view in net.view_columns(tensors)
        }
        self._rows.clear()
        self.keep(mark, is_ended=is_ended)

    def keep_row(self, file: str, row: Row) -> None:
        """Keep the last row of a file of RUN, whether this process writes it or not."""
        self._rows[file] = row

    def keep(self, mark: Mark, *, is_ended: bool) -> None:
        """Note that the weights are those after a step.

        Args:
            mark: the step.
            is_ended: whether it has also validated, reviewed the rates, and begun to be saved,
                where it is due.
        """
        if self._optimizer is not None:
            self._mark, self._is_ended, self._updates = mark, is_ended, self._optimizer.updates

    def collect(self) -> State:
        """Return the tensors that are held, not copies."""
        return self._state

    def offer(self, run: str) -> Offer | None:
        """Return what other processes may have; None: nothing, or an update was broken off."""
        if self._optimizer is None or not self._mark.step or self._run != run:
            return None
        if self._updates != self._optimizer.updates:
            return None
        columns = sorted({find_column(key) for key in self._state})
        hashes = {column: hash_state(select_column(self._state, column)) for column in columns}
        rows = {name: row for name, row in self._rows.items() if row["step"] == self._mark.step}
        return Offer(self._mark, hashes, rows, self._is_ended)


def find_column(key: str) -> int:
    """Return the column of a tensor by its key, as in "weights/b.conv1.weight"."""
    return "ab".index(key.split("/")[1][0])


def select_column(state: Mapping[str, Tensor], column: int) -> State:
    """Return the tensors of a column, in the order of their keys."""
    return {key: state[key] for key in sorted(state) if find_column(key) == column}


def hash_state(state: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the bytes of tensors on the host."""
    value = 0
    for tensor in state.values():
        dense = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        value = isal_zlib.crc32(dense.numpy(), value)
    return value


def choose_offer(
    offers: Sequence[Offer | None], columns: Iterable[int], written: int, saved: int
) -> tuple[Offer | None, str]:
    """Choose the newest state that some processes hold together.

    Args:
        offers: of each process.
        columns: columns of the network.
        written: step of the last row in metrics.jsonl.
        saved: step of the newest checkpoint.

    Returns:
        An offer of that state with all of its rows (None: the checkpoint is to be taken), and why
        not; "" if there is nothing to say.
    """
    there = [offer for offer in offers if offer is not None]
    if not there:
        return None, ""
    why = ""
    for step in sorted({offer.mark.step for offer in there}, reverse=True):
        same = [offer for offer in there if offer.mark.step == step]
        if step < saved:
            return None, why or f"that of step {step} is older"
        held = [{o.hashes[one] for o in same if one in o.hashes} for one in columns]
        if not all(held):
            continue  # of another replica that was further, or behind
        if any(len(hashes) > 1 for hashes in held):
            why = why or f"workers differ in that of step {step}"
        elif written < step - any(METRICS in offer.rows for offer in same):
            why = why or f"the row of step {written + 1} is missing"
        else:
            rows = {name: row for offer in same for name, row in offer.rows.items()}
            is_ended = step == saved or any(offer.is_ended for offer in same)
            return replace(same[0], rows=rows, is_ended=is_ended), ""
    return None, why


def restore_rows(run: Path, offer: Offer) -> None:
    """Have the files of RUN end with the rows of a state in memory; no `Rows` has them open.

    A validation of a step that has not ended is made again.

    Raises:
        OSError: they cannot be written.
    """
    if not offer.is_ended:
        cut_rows(run / VALIDATION, offer.mark.step - 1, lambda _: None)
    for name, row in offer.rows.items():
        if offer.is_ended or name != VALIDATION:
            append_row(run / name, offer.mark.step, row)


def receive_columns(
    offers: Sequence[Offer | None], mark: Mark, own: State, mesh: ProcessMesh, wanted: State
) -> State:
    """Return this process's columns of a state; a collective call.

    Args:
        offers: of each process, in job order.
        mark: step of the state.
        own: what this process holds; {} if it has made no offer.
        mesh: mesh of this process.
        wanted: tensors of the network to fill, for keys, shapes and dtypes.

    Raises:
        DataError: what has arrived is not what was sent.
    """
    needs = mesh.gather(sorted({find_column(key) for key in wanted}))
    found: State = {}
    trouble = ""
    for column in sorted({column for needed in needs for column in needed}):
        holds = [o is not None and o.mark == mark and column in o.hashes for o in offers]
        source = holds.index(True)
        expected = offers[source].hashes[column]  # type: ignore[union-attr]
        for place, needed in enumerate(needs):
            if holds[place] or column not in needed:
                continue
            if mesh.rank == source:
                for tensor in select_column(own, column).values():
                    dist.send(tensor.detach().contiguous(), mesh.order[place])
            elif mesh.rank == place:
                state = _receive(select_column(wanted, column), mesh.order[source])
                if hash_state(state) != expected:  # the sender still sends what follows
                    trouble = f"column {'ab'[column]} of step {mark.step} arrived damaged"
                found |= state
        if holds[mesh.rank] and column in needs[mesh.rank]:
            found |= select_column(own, column)
    if trouble:
        raise DataError(trouble)
    return found


def _receive(wanted: State, source: int) -> State:
    """Return tensors like some others, received from a rank of torch.distributed."""
    state = {key: torch.empty_like(tensor).contiguous() for key, tensor in wanted.items()}
    for tensor in state.values():
        dist.recv(tensor, source)
    return state
