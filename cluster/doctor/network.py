"""Checks of the network: interface, host name, and a round trip as a pair of workers makes it."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.launch.interfaces import GLOO, NCCL, find_interface, is_interface, list_addresses
from cluster.launch.session import read_auto_address, split_address
from pipeline.tools.errors import summarize_error
from pipeline.tools.files import read_text
from pipeline.tools.text import human_bytes

SECONDS = 30
"""Timeout of each of the two processes; the doctor waits twice as long for both."""
NUMBERS = 2**20
"""Number of float32 values that are sent."""


def judge(gpus: int, head: str) -> Iterator[Finding]:
    """Judge interface, host name, gloo and, with two GPUs, NCCL.

    Args:
        gpus: number of GPUs of this machine.
        head: RAY_ADDRESS; empty: a training uses this machine only.
    """
    addresses = list_addresses()
    chosen = {name: os.environ[name] for name in (GLOO, NCCL) if os.environ.get(name)}
    yield judge_interface(find_own_address(head, addresses) if head else "", chosen, addresses)
    yield judge_host_name(platform.node(), bool(head))
    yield try_round_trip("gloo")
    if gpus >= 2:
        yield try_round_trip("nccl")


def find_own_address(head: str, addresses: Mapping[str, list[str]]) -> str:
    """Return the address of this machine from which it reaches a cluster's head; "" if unknown.

    Args:
        head: RAY_ADDRESS.
        addresses: result of `list_addresses`.
    """
    host, port = split_address(read_auto_address()[0] if head == "auto" else head)
    if find_interface(host, addresses):
        return host
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing: the kernel chooses the way
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def judge_interface(
    own: str, chosen: Mapping[str, str], addresses: Mapping[str, list[str]]
) -> Finding:
    """Judge by which interface gloo and NCCL will connect a worker on this machine.

    Args:
        own: address by which a cluster knows this machine; empty: no cluster, or not known.
        chosen: the variables of gloo and NCCL that are set, and their values.
        addresses: result of `list_addresses`.
    """
    mend = f"export {GLOO}=NAME {NCCL}=NAME   # before `ray start`; here are {', '.join(addresses)}"
    for variable, value in chosen.items():
        if not is_interface(variable, value, addresses):
            return fail("interface", f"{variable}={value}, and there is no such interface", mend)
    if chosen:
        return ok("interface", " ".join(f"{name}={value}" for name, value in chosen.items()))
    if interface := find_interface(own, addresses):
        return ok("interface", f"{interface}, which has {own}: the way to the cluster's head")
    if own:
        return warn("interface", f"{own} is the address of none here: gloo would guess", mend)
    return ok("interface", "lo: workers of one machine meet there")


def judge_host_name(host: str, cluster: bool) -> Finding:
    """Judge whether this machine's own name leads other programs than the workers astray.

    Args:
        host: name of this machine.
        cluster: the training uses other machines.
    """
    mend = "give it this machine's own address in /etc/hosts; the workers do without"
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return warn("host name", f"{host} has no address", mend, unless=not cluster)
    if cluster and address.startswith("127."):
        text = f"{host} is {address} to itself: whoever tells it to another machine misleads that"
        return warn("host name", text, mend)
    return ok("host name", f"{host} is {address}")


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
