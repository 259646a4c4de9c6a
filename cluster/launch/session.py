"""Ray session of a command: attaches to RAY_ADDRESS, or starts a Ray on loopback."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline.remote.filesystem import is_remote
from pipeline.tools.errors import SetupError, UsageError, handle_end, summarize_error
from pipeline.tools.files import NoLocks, read_text, try_lock, unlock
from pipeline.tools.processes import defer_signals
from pipeline.tools.units import cpu_count

PREFIX, LOCK = "duet-", "session.lock"
LONGEST = 26
"""Most characters of the folder above Ray's: the paths of its sockets may have 107."""
STARTING = 60.0
"""Seconds after which a session's folder without a holder is one that was left behind."""
CONNECT_SECONDS = 5
"""Timeout of a connection to a port."""
HEAD_SECONDS = 60.0
"""Seconds in which a head must answer."""
ASK_EVERY = 1.0
"""Seconds between questions to a head that does not answer."""
SAY_SECONDS = 10.0
"""Seconds between lines about a head that does not answer."""
GCS_PORT = 6379
REPOSITORY = Path(__file__).resolve().parents[2]
# Keeps Ray's own lines off the terminal.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # delay until a dead worker is replaced
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that is set in a submitted job, which brings its code itself."""
OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for loopback only
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # a process for each core, of which one is needed
}


def refuse_relative(name: str, path: str | Path, *, missing: bool = False) -> None:
    """Refuse a relative folder in a submitted job: it would lie in the job's copy of the code.

    Args:
        name: of the argument.
        path: folder or address.
        missing: refuse it only if nothing is there.

    Raises:
        UsageError: `path` is relative, and this is a job.
    """
    text = str(path)
    if IN_JOB not in os.environ or is_remote(text) or text.lower().startswith("file://"):
        return
    if Path(text).is_absolute() or (missing and Path(text).exists()):
        return
    raise UsageError(
        f"{name} {text} is relative, and a job runs in a temporary copy of the working folder; "
        "give an absolute path on storage that all nodes share, or an address"
    )


@contextmanager
def ray_session(workers: int, gpus: int | None = None) -> Iterator[None]:
    """Attach to the Ray that RAY_ADDRESS names, or start one and stop it after the block.

    Args:
        workers: processes of the run; a Ray started here has room for them on any machine.
        gpus: GPUs that a Ray started here offers; None: all that it finds.

    Raises:
        SetupError: Ray cannot be started or reached.
    """
    attached = is_attached()
    if attached and (found := examine_address(os.environ["RAY_ADDRESS"])):
        raise SetupError(f"RAY_ADDRESS: {found[0]}; {found[1]}")
    for name, value in (QUIET if attached else QUIET | OWN).items():
        os.environ.setdefault(name, value)
    import ray

    if attached:
        ask_head(os.environ["RAY_ADDRESS"])
    with nullcontext() if attached else make_session_folder() as scratch:
        try:
            # A terminal that goes sends SIGHUP to all: Ray's processes must live until the end.
            with defer_signals(signal.SIGHUP):
                _start(ray, scratch, workers, gpus)
            guard_token()
            # Raises KeyboardInterrupt; replaces Ray's handler, which aborts.
            handle_end(signal.default_int_handler)
            yield
        finally:
            ray.shutdown()


def is_attached() -> bool:
    """Return whether RAY_ADDRESS names a Ray, rather than this command starting its own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def examine_address(address: str) -> tuple[str, str] | None:
    """Ask whether a process listens at RAY_ADDRESS; Ray itself would try for minutes, in silence.

    Returns:
        What is wrong with it, and what mends that; None if nothing is.
    """
    if address.startswith(("http://", "https://")):
        mend = f"export RAY_API_SERVER_ADDRESS={address}; unset RAY_ADDRESS"
        return f"{address} is a job server's address", mend
    if address.startswith("ray://"):
        text = f"{address} is for Ray's client, which Ray Train does not support"
        return text, "ray job submit, or RAY_ADDRESS=HEAD:6379 on the head"
    named = address
    if address == "auto":
        address, path = read_auto_address()
        named = f"auto, which is {address} in {path},"
    if address in ("", "local"):
        return None
    host, port = split_address(address)
    if not port:
        return f"{named} has no port", f"export RAY_ADDRESS={host}:{GCS_PORT}"
    if error := try_connection(address):
        mend = "ray start --head --dashboard-host 127.0.0.1   # on the head; then export "
        mend += f"RAY_ADDRESS=HEAD:{GCS_PORT}; or unset RAY_ADDRESS"
        return f"{named} does not answer ({error})", mend
    return None


def read_auto_address() -> tuple[str, Path]:
    """Return the address that the last `ray start` of this machine has left, and its file."""
    path = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    return read_text(path), path


def ask_head(address: str) -> None:
    """Wait for an answer of the head at RAY_ADDRESS; Ray would wait much longer, and not say why.

    Raises:
        SetupError: it refuses the token, or what listens there does not answer as a head does.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    where = read_auto_address()[0] if address == "auto" else address
    if where in ("", "local"):
        return
    start = said = time.monotonic()
    with init_grpc_channel(where) as channel:
        ask = NodeInfoGcsServiceStub(channel).GetClusterId
        while True:
            try:
                ask(GetClusterIdRequest(), timeout=CONNECT_SECONDS)
                return
            except grpc.RpcError as error:
                code, now = error.code(), time.monotonic()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise SetupError(f"RAY_ADDRESS: the Ray at {where} {describe_refusal()}")
            if now - start > HEAD_SECONDS:
                words = code.name.lower().replace("_", " ")
                raise SetupError(
                    f"RAY_ADDRESS: {where} takes connections, but no Ray has answered there for "
                    f"{now - start:,.0f} s ({words}): frozen, or another program; "
                    "ray status   # on the head; or unset RAY_ADDRESS"
                )
            if now - said > SAY_SECONDS:
                said = now
                sys.stderr.write(f"no answer of the Ray at {where} for {now - start:,.0f} s\n")
            time.sleep(ASK_EVERY)


def describe_refusal(environment: Mapping[str, str] = os.environ) -> str:
    """Return why a cluster does not take the token of this process, and what mends it."""
    path = environment.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    copy = f"copy the head's ~/.ray/auth_token to {path} here, mode 600"
    if environment.get("RAY_AUTH_MODE") != "token":
        return f"wants a token, and none is sent; export RAY_AUTH_MODE=token, and {copy}"
    if environment.get("RAY_AUTH_TOKEN"):
        return f"refuses the token of RAY_AUTH_TOKEN: it is another one; unset it, and {copy}"
    if not Path(path).expanduser().exists():
        return f"wants a token, and there is no {path}; {copy}"
    return f"refuses the token of {path}: it is another one; {copy}"


def try_connection(address: str) -> str:
    """Connect to HOST:PORT; return the error message, empty if that works."""
    try:
        socket.create_connection(split_address(address), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return getattr(error, "strerror", None) or summarize_error(error)
    return ""


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT; the port of anything else is 0."""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else (address, 0)


def suggest_mend(why: str) -> str:
    """Return a remedy for a process that could not join the cluster."""
    low = why.lower()
    if "version mismatch" in low:
        install = "pip install -c constraints.txt 'ray[default,train]'"
        return f"the same Python on both sides, and {install}"
    # "Failed to connect" is all that Ray says of a token that is not the cluster's.
    signs = ("failed to connect", "token", "authenticat", "unauthorized")
    if any(sign in low for sign in signs):
        return (
            "export RAY_AUTH_MODE=token; the head's ~/.ray/auth_token belongs here, too, mode 600; "
            "`ray status` on the head says whether it is well"
        )
    return "ray status   # on the head; or unset RAY_ADDRESS"


@contextmanager
def make_session_folder() -> Iterator[Path]:
    """Create a private folder for Ray's files during the block; remove those of dead processes.

    Raises:
        SetupError: there is no place for it whose path is short enough.
    """
    wanted = tempfile.gettempdir()
    for place in (wanted, "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", "")):
        if place and len(place) <= LONGEST and os.access(place, os.W_OK | os.X_OK):
            sweep_sessions(Path(place))
            folder, lock = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)), None
            try:
                with suppress(NoLocks):
                    lock = try_lock(folder / LOCK)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if lock is not None:
                    unlock(lock)
            return
    raise SetupError(
        f"TMPDIR {wanted} has more than {LONGEST} characters, too many for the paths of Ray's "
        "sockets, and /tmp cannot be written; set TMPDIR to a shorter one"
    )


def sweep_sessions(place: Path) -> None:
    """Remove the folders of this user's sessions that were killed: their locks are free."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError, NoLocks):
            about, lock = folder.lstat(), folder / LOCK
            # A folder that was just made has no lock yet, or one that is about to be taken.
            is_old = time.time() - lock.stat().st_mtime > STARTING
            is_own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
            if is_own and is_old and (held := try_lock(lock)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                unlock(held)


def guard_token() -> None:
    """Make the token of this user's clusters private; Ray writes it readable for all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    with suppress(OSError):  # there is none, or it belongs to another user
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _start(ray: Any, scratch: Path | None, workers: int, gpus: int | None = None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if scratch is not None:
        # Inherited by every process of this Ray, so that workers can import this repository.
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        options |= {
            "address": "local",
            "num_cpus": max(workers, cpu_count()),
            "num_gpus": gpus,
            "include_dashboard": False,
            "_temp_dir": str(scratch / "r"),  # Ray opens it to all users: the one above is private
        }
    else:
        if IN_JOB not in os.environ:
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises a bare one when its processes start too slowly
        why = summarize_error(error)
        if scratch is not None:
            text = f"no Ray on this machine ({why}); try again when less runs here"
            raise SetupError(text) from error
        where = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}"  # something answers there
        raise SetupError(f"{where} does not take us ({why}); {suggest_mend(str(error))}") from error
