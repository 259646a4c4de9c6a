"""Both columns in one process, each computed as a process of a pair computes it: in a thread.

A layer that reads both columns sums over its inputs in two parts in a pair, and in one part in a
network that holds both columns: the sums differ in their last bits. `ColumnThreads` takes the parts
of the pair, so that one process and a pair have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from model.alexnet import AlexNet
from model.exchange import Exchange

T = TypeVar("T")
Mailbox = SimpleQueue[Tensor | None]
"""Tensors for a column, in the order sent; None when the other column has failed."""


class ColumnFailed(RuntimeError):
    """The other column's thread has failed; its own error says why."""


class ThreadExchange(Exchange):
    """The link between two columns that are threads of one process: tensors pass uncopied.

    Args:
        index: column of this end, 0 or 1.
        mailboxes: one for each column, shared by both ends.
        wire: as in `Exchange`.
    """

    def __init__(
        self, index: int, mailboxes: tuple[Mailbox, Mailbox], wire: torch.dtype | None = None
    ) -> None:
        self._own, self._other = mailboxes[index], mailboxes[1 - index]
        self._prepare(index, wire)

    def _transfer(self, sent: Tensor) -> Callable[[], Tensor]:
        self._other.put(sent)

        def wait() -> Tensor:
            received = self._own.get()
            if received is None:
                raise ColumnFailed("the other column has failed")
            return received

        return wait

    def fail(self) -> None:
        """Let the other column fail when it next waits."""
        self._other.put(None)

    def clear(self) -> None:
        """Drop tensors that nobody waited for."""
        while not self._own.empty():
            self._own.get()


class ColumnThreads:
    """The two columns of a network, as two networks that share its parameters' memory.

        columns = ColumnThreads(net)
        logits, _ = columns.run(lambda column: column(images))

    The columns compute in the mode of the network and at its position. A gradient belongs to the
    parameter of a column, not to that of the network: its rows are that column's.

    Args:
        net: network with both columns.
        wire: as in `Exchange`.
    """

    def __init__(self, net: AlexNet, wire: torch.dtype | None = None) -> None:
        mailboxes: tuple[Mailbox, Mailbox] = (SimpleQueue(), SimpleQueue())
        self._links = [ThreadExchange(index, mailboxes, wire) for index in (0, 1)]
        self.net = net
        self.columns = tuple(net.create_column(link) for link in self._links)
        self.devices = {parameter.device for parameter in net.parameters()}
        self._threads = ThreadPoolExecutor(1, "column-b", self._enter_thread)

    def _enter_thread(self) -> None:
        for device in self.devices:  # the current GPU is each thread's own
            if device.type == "cuda":
                torch.cuda.set_device(device)

    def run(self, work: Callable[[AlexNet], T]) -> tuple[T, T]:
        """Do `work` on both columns at once, column b's in the thread; return both results.

        Raises:
            Exception: that of the column that failed first.
        """
        other = self._threads.submit(self._work, work, 1, torch.is_grad_enabled())
        try:
            own = self._work(work, 0, torch.is_grad_enabled())
        except ColumnFailed:
            other.result()  # raises what that column failed of
            raise
        finally:
            other.exception()
            for link in self._links:
                link.clear()
        return own, other.result()

    def _work(self, work: Callable[[AlexNet], T], index: int, has_grad: bool) -> T:
        column = self.columns[index]
        if column.training != self.net.training:
            column.train(self.net.training)
        try:
            # A backward pass stays in its thread, also on a GPU, where autograd has one thread for
            # all: it would wait for a tensor that it has to compute itself.
            with torch.set_grad_enabled(has_grad), torch.autograd.set_multithreading_enabled(False):
                return work(column)
        except BaseException:
            self._links[index].fail()
            raise

    def close(self) -> None:
        """End the thread."""
        self._threads.shutdown()
