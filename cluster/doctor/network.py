"""Checks of the network: host name, and a round trip between two processes as a pair makes it."""

from __future__ import annotations

import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from cluster.doctor.finding import Finding, fail, ok, warn
from pipeline.tools.errors import summarize_error
from pipeline.tools.files import read_text
from pipeline.tools.text import human_bytes

SECONDS = 30
"""Timeout of each of the two processes; the doctor waits twice as long for both."""
NUMBERS = 2**20
"""Number of float32 values that are sent."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def judge(gpus: int, cluster: bool) -> Iterator[Finding]:
    """Judge host name, gloo and, with two GPUs, NCCL.

    Args:
        gpus: number of GPUs of this machine.
        cluster: RAY_ADDRESS names a cluster.
    """
    names = [name for _, name in socket.if_nameindex()]
    chosen = {name: os.environ[name] for name in INTERFACE_VARIABLES if name in os.environ}
    default = find_default_interface(names)
    yield judge_host_name(platform.node(), cluster, chosen, names, default)
    yield try_round_trip("gloo")
    if gpus >= 2:
        yield try_round_trip("nccl")


def find_default_interface(names: Sequence[str], routes: Path = Path("/proc/net/route")) -> str:
    """Return the name of the interface with the default route; eth0 if it cannot be told."""
    if found := re.search(r"^(\S+)\s+00000000\s", read_text(routes), re.MULTILINE):
        return found[1]
    real = (name for name in names if not name.startswith(("lo", "docker", "veth", "br-")))
    return next(real, "eth0")


def judge_host_name(
    host: str, cluster: bool, chosen: dict[str, str], names: Sequence[str], default: str
) -> Finding:
    """Judge whether other machines can reach this one at the address that gloo and NCCL use.

    Args:
        host: name of this machine.
        cluster: the training uses other machines.
        chosen: the variables of `INTERFACE_VARIABLES` that are set, and their values.
        names: interfaces of this machine.
        default: the interface with the default route.
    """
    mend = f"export GLOO_SOCKET_IFNAME={default} NCCL_SOCKET_IFNAME={default}   # on every machine"
    for variable, value in chosen.items():
        if not _is_interface(variable, value, names):
            text = f"{variable}={value}, and there is no such interface here ({', '.join(names)})"
            return fail("host name", text, mend)
    if "GLOO_SOCKET_IFNAME" in chosen:
        return ok("host name", f"{host}; gloo goes by {chosen['GLOO_SOCKET_IFNAME']}")
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return warn("host name", f"{host} has no address; between machines gloo needs one", mend)
    if not address.startswith("127."):
        return ok("host name", f"{host} is {address}")
    if cluster:
        text = f"{host} is {address} to itself: workers on other machines would not find it"
        return warn("host name", text, mend)
    return ok("host name", f"{host} is {address}: good for this machine, not for a cluster")


def _is_interface(variable: str, value: str, names: Sequence[str]) -> bool:
    """Return whether the value of one of `INTERFACE_VARIABLES` names existing interfaces."""
    parts = value.split(",")
    if variable.startswith("GLOO"):
        return all(part in names for part in parts)
    # NCCL takes prefixes of names; `=` before whole names, `^` before those to exclude.
    return value.startswith("^") or any(
        name == part[1:] if part.startswith("=") else name.startswith(part)
        for part in parts
        for name in names
    )


def try_round_trip(backend: str) -> Finding:
    """Send numbers back and forth between two processes, and check what arrives."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory(prefix="duet-doctor-") as folder:
        context = mp.get_context("spawn")
        both = [context.Process(target=run_side, args=(rank, backend, folder)) for rank in (0, 1)]
        deadline = time.monotonic() + 2 * SECONDS
        try:
            for process in both:
                process.start()
            for process in both:
                process.join(max(0.0, deadline - time.monotonic()))
            timed_out = any(process.is_alive() for process in both)
        finally:
            for process in both:
                if process.is_alive():
                    process.kill()
                    process.join()
        result, error = (read_text(Path(folder, name)) for name in ("result", "error"))
        return judge_round_trip(backend, timed_out, result, error)


def judge_round_trip(backend: str, timed_out: bool, result: str, error: str) -> Finding:
    """Judge the result and the error message that two processes wrote."""
    if result and not timed_out and not error:
        return ok(backend, result)
    silence = f"no answer for {2 * SECONDS} s" if timed_out else "a process died without a message"
    mend = "GLOO_SOCKET_IFNAME=lo duet doctor   # if that works, mend this machine's "
    mend += "name in /etc/hosts"
    if backend == "nccl":
        mend = "NCCL_DEBUG=INFO duet doctor   # says why; with NCCL_P2P_DISABLE=1 or "
        mend += "NCCL_SHM_DISABLE=1 it may take another way"
    return fail(backend, error or silence, mend)


def run_side(rank: int, backend: str, folder: str) -> None:
    """Run one of the two processes; it writes `result` or `error` into the folder."""
    try:
        text = _measure(rank, backend, folder)
    except Exception as error:
        message = f"{type(error).__name__}: {summarize_error(error)}"
        Path(folder, "error").write_text(message, encoding="utf-8")
        raise SystemExit(1) from None
    if rank == 0:
        Path(folder, "result").write_text(text, encoding="utf-8")


def _measure(rank: int, backend: str, folder: str) -> str:
    """Check an all-reduce and swaps; return their latency and speed in words.

    Raises:
        RuntimeError: the values received are not those sent.
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
    own = ramp + rank
    gathered = link.gather_replicated(own)  # also warms the connection up
    total = torch.tensor([1.0 + rank], device=device)
    dist.all_reduce(total)
    if not torch.equal(gathered, torch.cat((ramp, ramp + 1), dim=1)) or total.item() != 3:
        raise RuntimeError("the values received are not those sent")
    start = time.perf_counter()
    for _ in range(20):
        dist.all_reduce(total)
    total.item()
    latency = (time.perf_counter() - start) / 20
    start = time.perf_counter()
    for _ in range(10):
        gathered = link.gather_replicated(own)
    gathered[0, 0].item()
    rate = 10 * own.nbytes / (time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    return f"two processes: {latency * 1e6:,.0f} us, {human_bytes(rate)}/s each way"
