"""Hosts on one machine: namespaces of network, mounts and processes, joined by a bridge.

    with Network(3) as network:                # 10.77.0.1, 10.77.0.2 and 10.77.0.3, 1 Gbit/s each
        network[0].start("ray", "start", ...)
        network[2].cut()                       # its processes live on, and nobody hears them

No name of them is visible outside, and they end with the process that made them, however that ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

HOLDER = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody else reaps the orphans of a host
print(flush=True)
sys.stdin.read()
"""
"""Process that keeps namespaces until its starter ends: then its standard input does, too."""
RATE = "1gbit"
USER = [] if os.geteuid() == 0 else ["--map-root-user"]


def find_obstacle() -> str:
    """Return why this machine cannot have such hosts; "" if it can."""
    if missing := [name for name in ("unshare", "nsenter", "ip", "tc") if not shutil.which(name)]:
        return f"needs {' and '.join(missing)} (util-linux and iproute2)"
    try:
        with Network(1) as network:
            network[0].run("true")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"this machine allows no network namespaces ({said.strip()})"
    return ""


class Network:
    """A switch, and hosts joined to it; a context manager.

    Args:
        count: number of hosts; the addresses are 10.77.0.1 and so on.
        names: for each host the address that its own name has in its /etc/hosts; the last one
            is that of all further hosts.
    """

    def __init__(self, count: int, names: tuple[str, ...] = ("127.0.0.1",)) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="duet-net-"))
        self._holders: list[subprocess.Popen[bytes]] = []
        self.hosts: list[Host] = []
        try:
            self._pid = self._hold([*USER, "--net"])
            self.configure("ip link add br0 type bridge", "ip link set br0 up")
            for number in range(1, count + 1):
                self.hosts.append(self._add(number, names[min(number, len(names)) - 1]))
        except BaseException:
            self.close()
            raise

    def _add(self, number: int, name: str) -> Host:
        pid = self._hold(
            ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"], self.enter()
        )
        host = Host(self, pid, number)
        self.configure(
            f"ip link add {host.port} type veth peer name {host.interface} netns {pid}",
            f"ip link set {host.port} master br0 up",
            f"tc qdisc add dev {host.port} root tbf rate {RATE} burst 256kb latency 50ms",
        )
        table = self._folder / f"hosts{number}"
        table.write_text(f"127.0.0.1 localhost\n{name} {os.uname().nodename}\n", encoding="utf-8")
        for line in (
            f"mount --bind {table} /etc/hosts",
            "ip link set lo up",
            f"ip addr add {host.address}/24 dev {host.interface}",
            f"ip link set {host.interface} up",
            f"tc qdisc add dev {host.interface} root tbf rate {RATE} burst 256kb latency 50ms",
        ):
            host.run(*line.split())
        return host

    def _hold(self, namespaces: list[str], head: list[str] | None = None) -> int:
        """Start a process with new namespaces; return the id of the one that is inside."""
        holder = subprocess.Popen(
            [*(head or []), "unshare", *namespaces, sys.executable, "-ISc", HOLDER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._holders.append(holder)
        assert holder.stdout is not None
        assert holder.stderr is not None
        if not holder.stdout.readline():
            raise OSError(holder.stderr.read().decode())
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        return int(children[0]) if children else holder.pid

    def enter(self) -> list[str]:
        """Return the head of a command that runs in the switch."""
        user = ["--user", "--preserve-credentials"] if USER else []
        return ["nsenter", "--target", str(self._pid), *user, "--net"]

    def configure(self, *lines: str) -> None:
        """Run commands in the switch."""
        for line in lines:
            run([*self.enter(), *line.split()])

    def close(self) -> None:
        """End every host, with all processes of it, and the switch."""
        for holder in reversed(self._holders):
            for pipe in (holder.stdin, holder.stdout, holder.stderr):
                if pipe is not None:
                    pipe.close()
            holder.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __getitem__(self, place: int) -> Host:
        return self.hosts[place]

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()


class Host:
    """A host: its processes see only its own interfaces, processes and /etc/hosts.

    All hosts have this machine's name and files.
    """

    def __init__(self, network: Network, pid: int, number: int) -> None:
        self._network, self._pid = network, pid
        self.address = f"10.77.0.{number}"
        self.port = f"port{number}"
        """Name of its end of the cable at the switch."""
        self.interface = f"net{number}"
        """Name of its own end: another one on each host."""

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on this host."""
        user = ["--user", "--preserve-credentials"] if USER else []
        spaces = ["--net", "--mount", "--pid", f"--wd={Path.cwd()}"]
        return ["nsenter", "--target", str(self._pid), *user, *spaces, "--", *words]

    def run(self, *words: str) -> str:
        """Run a command on this host; return what it says."""
        return run(self.command(*words))

    def start(
        self, *words: str, environment: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        """Start a command on this host."""
        return subprocess.Popen(self.command(*words), env=environment, text=True, **more)

    def cut(self) -> None:
        """Take this host off the switch; its own end of the cable looks well."""
        self._network.configure(f"ip link set {self.port} nomaster")

    def join(self) -> None:
        """Bring this host back to the switch."""
        self._network.configure(f"ip link set {self.port} master br0")

    def isolate(self, isolated: bool = True) -> None:
        """Have this host reach no other isolated host, but all the rest."""
        word = "on" if isolated else "off"
        self._network.configure(f"ip link set {self.port} type bridge_slave isolated {word}")

    def limit(self, rate: str = RATE) -> None:
        """Have no more than `rate` (in the words of tc: 20mbit) go in and out."""
        settings = f"root tbf rate {rate} burst 256kb latency 50ms"
        self._network.configure(f"tc qdisc change dev {self.port} {settings}")
        self.run(*f"tc qdisc change dev {self.interface} {settings}".split())


def run(command: list[str]) -> str:
    """Run a command; return its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
