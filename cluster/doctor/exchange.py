"""A real round trip between two processes, as the columns of a pair make it."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from cluster.doctor.finding import Finding, fail, ok, warn

SECONDS = 60
"""For which a round trip is waited."""
NUMBERS = 2**20
"""float32 numbers that are sent."""


def judge(gpus: int) -> Iterator[Finding]:
    """Yield how gloo, and with two GPUs NCCL, gets on."""
    yield round_trip("gloo")
    yield interface(socket.gethostname(), "GLOO_SOCKET_IFNAME" in os.environ)
    if gpus >= 2:
        yield round_trip("nccl")


def interface(name: str, chosen: bool) -> Finding:
    """Look whether this host's name leads to an address that other machines can use."""
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return warn(
            "host name", f"{name} has no address; gloo and NCCL between machines need one",
            "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0, or mend /etc/hosts",
        )  # fmt: skip
    if address.startswith("127.") and not chosen:
        return warn(
            "host name", f"{name} is {address}; other machines cannot reach that",
            "on a cluster: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0",
        )  # fmt: skip
    return ok("host name", f"{name} is {address}")


def round_trip(backend: str) -> Finding:
    """Send numbers there and back between two processes, and look at what has come."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(prefix="duet-doctor-") as folder:
        context = mp.get_context("spawn")
        both = [context.Process(target=_side, args=(rank, backend, folder)) for rank in (0, 1)]
        for process in both:
            process.start()
        deadline = time.monotonic() + SECONDS + 30
        for process in both:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [process for process in both if process.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        result = Path(folder) / "result"
        if stuck or any(process.exitcode for process in both) or not result.exists():
            why = Path(folder) / "why"
            said = why.read_text(encoding="utf-8") if why.exists() else "no answer"
            variable = (
                f"{backend.upper()}_DEBUG=INFO" if backend == "nccl" else "GLOO_SOCKET_IFNAME=lo"
            )
            return fail(backend, said, f"export {variable}   # and look again")
        return ok(backend, result.read_text(encoding="utf-8"))


def _side(rank: int, backend: str, folder: str) -> None:
    """One of the two processes."""
    import torch
    import torch.distributed as dist

    from model.exchange import Exchange

    try:
        dist.init_process_group(
            backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2,
            timeout=timedelta(seconds=SECONDS),
        )  # fmt: skip
        device = torch.device(f"cuda:{rank}" if backend == "nccl" else "cpu")
        link = Exchange()
        mine = torch.full((64, NUMBERS // 64), float(rank), device=device)
        gathered = link.gather(mine)  # also warms the connection up
        right = gathered.chunk(2, 1)[0].eq(0).all() and gathered.chunk(2, 1)[1].eq(1).all()
        small = torch.zeros(1, device=device)
        dist.all_reduce(small)
        small.item()
        start = time.perf_counter()
        for _ in range(20):
            dist.all_reduce(small)
        small.item()
        latency = (time.perf_counter() - start) / 20
        start = time.perf_counter()
        for _ in range(5):
            link.gather(mine).sum().item()
        rate = 5 * mine.nbytes / (time.perf_counter() - start)
        if not right:
            raise RuntimeError("what came is not what was sent")
        if rank == 0:
            text = f"two processes: {latency * 1e6:,.0f} us, {rate / 1e9:.2f} GB/s each way"
            Path(folder, "result").write_text(text, encoding="utf-8")
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        Path(folder, "why").write_text(f"{type(error).__name__}: {lines[0]}", encoding="utf-8")
        raise SystemExit(1) from error
