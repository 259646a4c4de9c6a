"""Kernels in C for this very processor: compiled once by its C compiler, kept, and loaded.

What was compiled lies in the user's cache folder (`$XDG_CACHE_HOME/duet` or `~/.cache/duet`), named
by a hash of source, compiler, flags and processor, and is read again by every later process. Where
there is no such folder, each process compiles for itself: some three seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("kernels.c", "kernels.inc", "pictures.inc", "spatial.inc")
# No exceptions and no errno, or loops with roots would not become vectors; results stay the same.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
# GCC shies away from full vectors by default; a third off the time of the kernels.
FLAGS_X86 = ("-mprefer-vector-width=512",)
COMPILE_SECONDS = 300  # it takes 3, but many processes may start on few cores


class Unavailable(Exception):
    """Why there are no kernels, in a few words."""


def kernels() -> tuple[ctypes.CDLL, str]:
    """Return the library and what compiled it.

    Raises:
        Unavailable: no compiler, one that fails, or a torch without OpenMP.
        OSError, subprocess.SubprocessError: whatever else keeps it from being compiled.
    """
    command, said = _compiler()
    return _loaded(command, said), said


def _compiler() -> tuple[list[str], str]:
    """The command, and the first line of what it says of itself."""
    wanted = os.environ.get("CC")
    for command in [shlex.split(wanted)] if wanted else [["gcc"], ["cc"], ["clang"]]:
        if command and shutil.which(command[0]):
            done = _run([*command, "--version"], 20)
            done.check_returncode()
            return command, done.stdout.splitlines()[0]
    raise Unavailable(f"no C compiler ({wanted or 'gcc, cc, clang'})")


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
    )


def _openmp() -> str:
    """The OpenMP library that torch runs its threads with.

    The kernels have to use the same: a second one would bring threads of its own, which keep the
    processor busy while they wait, and double the number of threads.
    """
    names = re.findall(
        r"/\S*/lib(?:gomp|iomp5|omp)[-.][^/\s]*", Path("/proc/self/maps").read_text()
    )
    near = [name for name in names if "/torch" in name]
    if not names:
        raise Unavailable("torch was built without OpenMP")
    return (near or names)[0]


def _loaded(command: list[str], said: str) -> ctypes.CDLL:
    openmp = _openmp()
    flags = [*FLAGS, *(FLAGS_X86 if platform.machine() == "x86_64" else ())]
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    parts += [part.encode() for part in (*command, said, *flags, openmp, _processor())]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24] + ".so"
    folder = _cache()
    if folder is not None and (folder / name).is_file():
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:  # damaged: made anew below
            pass
    with tempfile.TemporaryDirectory(prefix="duet-") as work:
        made = _compiled(command, flags, openmp, Path(work))
        kept = folder is not None and _kept(made, folder / name)
        return ctypes.CDLL(str(folder / name if folder is not None and kept else made))


def _kept(made: Path, path: Path) -> bool:
    """Copy what was made to where the next process looks for it; whether that worked.

    Other processes may do the same at the same time: whole files only, and the last one stays.
    """
    partial = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            file.write(made.read_bytes())
            file.flush()
            os.fsync(file.fileno())  # a file cut off by a power failure would crash its user
        partial.replace(path)
    except OSError:  # no room
        partial.unlink(missing_ok=True)
        return False
    return True


def _compiled(command: list[str], flags: list[str], openmp: str, folder: Path) -> Path:
    objects, library = folder / "kernels.o", folder / "kernels.so"
    source = Path(__file__).parent / SOURCES[0]
    for arguments in (
        [*flags, "-fPIC", "-fopenmp", "-c", str(source), "-o", str(objects)],
        ["-shared", "-Wl,--no-undefined", str(objects), openmp, "-lm", "-o", str(library)],
    ):
        done = _run([*command, *arguments], COMPILE_SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it failed"]
            raise Unavailable(f"{shlex.join(command)} says: {lines[0][:200]}")
    return library


def _processor() -> str:
    """What `-march=native` depends on: home folders may be shared between unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    found = {line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted}
    return "\n".join([platform.machine(), *sorted(found)])


def _cache() -> Path | None:
    """The user's own cache folder; None if there is none that only the user can write to."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "duet"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None
