"""A real round trip between two processes, as the columns of a pair make it."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from cluster.doctor.finding import Finding, fail, first_line, ok, warn

SECONDS = 30
"""For which one process waits for the other, and again for which both are waited for."""
NUMBERS = 2**20
"""float32 numbers that are sent."""
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def judge(gpus: int, cluster: bool) -> Iterator[Finding]:
    """Yield how gloo, and with two GPUs NCCL, gets on; `cluster`: RAY_ADDRESS names one."""
    names = [name for _, name in socket.if_nameindex()]
    chosen = {name: os.environ[name] for name in CHOICES if name in os.environ}
    yield interface(platform.node(), cluster, chosen, names, default_interface(names))
    yield round_trip("gloo")
    if gpus >= 2:
        yield round_trip("nccl")


def default_interface(names: Sequence[str], routes: Path = Path("/proc/net/route")) -> str:
    """Name the interface that leads to other machines, or eth0 where there is no way to tell."""
    try:
        rows = [line.split() for line in routes.read_text(encoding="utf-8").splitlines()[1:]]
    except OSError:
        rows = []
    for row in rows:
        if len(row) > 1 and row[1] == "00000000":
            return row[0]
    real = [name for name in names if not name.startswith(("lo", "docker", "veth", "br-"))]
    return real[0] if real else "eth0"


def interface(
    host: str, cluster: bool, chosen: dict[str, str], names: Sequence[str], best: str
) -> Finding:
    """Judge whether other machines find this one by what gloo and NCCL take for its address.

    Args:
        host: name of this machine.
        cluster: there are other machines.
        chosen: the variables of `CHOICES` that are set.
        names: interfaces of this machine.
        best: the one that leads to other machines.
    """
    mend = f"export GLOO_SOCKET_IFNAME={best} NCCL_SOCKET_IFNAME={best}   # on every machine"
    for variable, value in chosen.items():
        if not _names_one(variable, value, names):
            return fail(
                "host name", f"{variable}={value}, and there is no such interface here "
                f"({', '.join(names)})", mend,
            )  # fmt: skip
    if "GLOO_SOCKET_IFNAME" in chosen:
        return ok("host name", f"{host}; gloo goes by {chosen['GLOO_SOCKET_IFNAME']}")
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return warn("host name", f"{host} has no address; between machines gloo needs one", mend)
    if not address.startswith("127."):
        return ok("host name", f"{host} is {address}")
    if cluster:
        told = f"{host} is {address} to itself: workers on other machines would not find it"
        return warn("host name", told, mend)
    return ok("host name", f"{host} is {address}: good for this machine, not for a cluster")


def _names_one(variable: str, value: str, names: Sequence[str]) -> bool:
    """Whether the value of a variable of `CHOICES` names interfaces that are there."""
    parts = value.split(",")
    if variable.startswith("GLOO"):
        return all(part in names for part in parts)
    # NCCL's are beginnings of names, after `=` whole names, after `^` those not to take.
    return value.startswith("^") or any(
        name == part[1:] if part.startswith("=") else name.startswith(part)
        for part in parts
        for name in names
    )


def round_trip(backend: str) -> Finding:
    """Send numbers there and back between two processes, and look at what has come."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(prefix="duet-doctor-") as folder:
        context = mp.get_context("spawn")
        both = [context.Process(target=side, args=(rank, backend, folder)) for rank in (0, 1)]
        deadline = time.monotonic() + 2 * SECONDS
        try:
            for process in both:
                process.start()
            for process in both:
                process.join(max(0.0, deadline - time.monotonic()))
            stuck = any(process.is_alive() for process in both)
        finally:
            for process in both:
                if process.is_alive():
                    process.kill()
                    process.join()
        return verdict(backend, stuck, _word(folder, "result"), _word(folder, "why"))


def verdict(backend: str, stuck: bool, result: str, why: str) -> Finding:
    """Judge what two processes have left."""
    if result and not stuck and not why:
        return ok(backend, result)
    said = why or (f"no answer for {2 * SECONDS} s" if stuck else "a process died without a word")
    if backend == "nccl":
        return fail(
            backend, said, "NCCL_DEBUG=INFO python -m cluster.doctor   # says why; with "
            "NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 it may take another way",
        )  # fmt: skip
    return fail(backend, said, "GLOO_SOCKET_IFNAME=lo python -m cluster.doctor   # if that works, "
                "mend this machine's name in /etc/hosts")  # fmt: skip


def _word(folder: str, name: str) -> str:
    path = Path(folder, name)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def side(rank: int, backend: str, folder: str) -> None:
    """One of the two processes."""
    try:
        text = _measured(rank, backend, folder)
    except Exception as error:
        Path(folder, "why").write_text(
            f"{type(error).__name__}: {first_line(error)}", encoding="utf-8"
        )
        raise SystemExit(1) from None
    if rank == 0:
        Path(folder, "result").write_text(text, encoding="utf-8")


def _measured(rank: int, backend: str, folder: str) -> str:
    """Check sums and swaps; return how fast they were, in words.

    Raises:
        RuntimeError: what came is not what was sent.
    """
    import torch
    import torch.distributed as dist

    from model.exchange import Exchange

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    torch.set_num_threads(1)
    link = Exchange()
    ramp = torch.arange(NUMBERS, dtype=torch.float32, device=device).reshape(64, -1)
    mine = ramp + rank
    gathered = link.gather(mine)  # also warms the connection up
    total = torch.tensor([1.0 + rank], device=device)
    dist.all_reduce(total)
    if not torch.equal(gathered, torch.cat((ramp, ramp + 1), dim=1)) or total.item() != 3:
        raise RuntimeError("what came is not what was sent")
    start = time.perf_counter()
    for _ in range(20):
        dist.all_reduce(total)
    total.item()
    latency = (time.perf_counter() - start) / 20
    start = time.perf_counter()
    for _ in range(10):
        gathered = link.gather(mine)
    gathered[0, 0].item()
    rate = 10 * mine.nbytes / (time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    return f"two processes: {latency * 1e6:,.0f} us, {rate / 1e9:.2f} GB/s each way"
