"""The CPU's kernels, called by the addresses of tensors.

No compiler, or one that fails, is no error: `takes` says no and torch's own operations do the work.
Set DUET_KERNELS=torch to do without.

Kernels in C for this very processor: compiled once by its C compiler, kept, and loaded.

What was compiled lies in the user's cache folder (`$XDG_CACHE_HOME/duet` or `~/.cache/duet`), named
by a hash of source, compiler, flags and processor, and is read again by every later process. Where
there is no such folder, each process compiles for itself: some three seconds.

Images made ready for the first convolution, with the compiled kernels where they fit.
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
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.norm import native
from model.norm.reference import (
    LRN_ALPHA,
    LRN_K,
    LRN_SIZE,
    SPATIAL_SCALE,
    SPATIAL_SIZE,
    is_channels_last,
)

SOURCES = ("kernels.c", "kernels.inc")
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


MOST_WINDOW = 4
"""Largest pooling window of the kernels, as in kernels.c."""
COLOURS = 3
"""Of the images that the kernels take, as in kernels.c."""
_SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
_LONG, _INT, _DOUBLE, _POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
_NORM = (*[_POINTER] * 3, *[_LONG] * 6, _DOUBLE, _DOUBLE, _INT, _INT)
_POOL = (*[_POINTER] * 3, *[_LONG] * 7, _DOUBLE, _DOUBLE, _INT, _INT, _INT)

_SPATIAL = (*[_POINTER] * 3, *[_LONG] * 4, _DOUBLE, _INT)
_PICTURES = (*[_POINTER] * 2, *[_LONG] * 5, _INT)
_KERNELS = (("norm", _NORM), ("pool", _POOL), ("spatial", _SPATIAL), ("pictures", _PICTURES))


def takes(x: Tensor) -> bool:
    """Whether `norm` can work on x; compiles the kernels when it is first asked."""
    return x.device.type == "cpu" and x.dtype in _SUFFIXES and _library()[0] is not None


def pools(x: Tensor, window: int) -> bool:
    """Whether `pool` can work on x."""
    return window <= MOST_WINDOW and is_channels_last(x) and takes(x)


def takes_images(x: Tensor, height: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `pictures` can work on x."""
    colours, h, w = x.shape[1:]
    fits = colours == COLOURS and h <= height and w <= width and x.is_contiguous()
    return fits and x.dtype == torch.float32 and dtype in _SUFFIXES and takes(x)


def described() -> str:
    """Say whether the kernels are in use, or why not."""
    return _library()[1]


def norm(x: Tensor, above: Tensor | None, columns: int, relu: bool) -> Tensor:
    """Return the normalised x, or with `above`, the gradient of that, the gradient of x.

    Args:
        x: bfloat16, float32 or float64 [b, columns * maps, h, w], dense in either format.
        above: of the same shape, dtype and memory format.
        columns: whose maps x holds.
        relu: whether max(x, 0) is meant.
    """
    y = torch.empty_like(x)
    images, maps, height, width = x.shape
    map_step, pixel_step = (1, maps) if is_channels_last(x) else (height * width, 1)
    sizes = (images, height * width, columns, maps // columns, map_step, pixel_step)
    _call("norm", x, above, y, *sizes, LRN_K, LRN_ALPHA / LRN_SIZE, relu)
    return y


def pool(
    x: Tensor,
    above: Tensor | None,
    columns: int,
    relu: bool,
    norm: bool,
    window: int,
    stride: int,
) -> Tensor:
    """Return the pooled x, or with `above`, the gradient of that, the gradient of x.

    Args:
        x: bfloat16, float32 or float64 [b, columns * maps, h, w], channels last.
        above: [b, columns * maps, pooled height, pooled width], same dtype and format.
        columns: whose maps x holds.
        relu: whether max(x, 0) is meant.
        norm: whether x is normalised before.
        window: at most MOST_WINDOW, h and w.
        stride: at most `window`.
    """
    images, maps, *sides = x.shape
    y = torch.empty_like(x)
    if above is None:
        pooled = [-(-(side - window) // stride) + 1 for side in sides]
        y = x.new_empty((images, *pooled, maps)).permute(0, 3, 1, 2)
    sizes = (images, *sides, columns, maps // columns, window, stride)
    _call("pool", x, above, y, *sizes, LRN_K, LRN_ALPHA / LRN_SIZE, relu, norm)
    return y


def spatial(x: Tensor, above: Tensor | None) -> Tensor:
    """Return x normalised over the pixels around, or with `above`, the gradient of that, that of x.

    Args:
        x: bfloat16, float32 or float64 [b, maps, h, w], dense in either format.
        above: of the same shape, dtype and memory format.
    """
    y = torch.empty_like(x)
    images, maps, height, width = x.shape
    if not is_channels_last(x):  # each map is an image of its own
        images, maps = images * maps, 1
    _call("spatial", x, above, y, images, height, width, maps, SPATIAL_SCALE / SPATIAL_SIZE**2)
    return y


def pictures(x: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return x with zeros on its right and at its bottom, channels last.

    Args:
        x: float32 [b, COLOURS, h, w], contiguous.
        height: of the result, at least h.
        width: of the result, at least w.
        dtype: of the result: bfloat16, float32 or float64.
    """
    images, colours, *sides = x.shape
    y = x.new_empty((images, height, width, colours), dtype=dtype)
    sizes = (images, *sides, height, width, torch.get_num_threads())
    getattr(_library()[0], f"pictures_{_SUFFIXES[dtype]}")(x.data_ptr(), y.data_ptr(), *sizes)
    return y.permute(0, 3, 1, 2)


def _call(name: str, x: Tensor, above: Tensor | None, y: Tensor, *settings: float) -> None:
    library = _library()[0]
    failed: int = getattr(library, f"{name}_{_SUFFIXES[x.dtype]}")(
        x.data_ptr(),
        None if above is None else above.data_ptr(),
        y.data_ptr(),
        *settings,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the working space of the normalisation")


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, and a description; or None and the reason."""
    try:
        if os.environ.get("DUET_KERNELS") == "torch":
            raise Unavailable("DUET_KERNELS=torch")
        library, compiler = kernels()
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        return None, f"torch operations, as there are no compiled kernels: {error}"
    for name, arguments in _KERNELS:
        for suffix in _SUFFIXES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, ctypes.c_int
    return library, f"kernels compiled by {compiler}"


def padded_images(pictures: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Images of another size and dtype, channels last, in one pass over memory.

    They are filled up with zeros, or cut off, on the right and at the bottom. What a pipeline
    makes, float32 with three colours and contiguous, is done by a compiled kernel on a CPU: a third
    of the time of torch's operations on one core, bit for bit the same.

    Args:
        images: float [b, c, h, w], any strides.
        height: of the result, in pixels.
        width: of the result, in pixels.
        dtype: of the result.

    Returns:
        [b, c, height, width].
    """
    differentiable = pictures.requires_grad and torch.is_grad_enabled()
    apart = differentiable or torch.compiler.is_compiling()
    if not apart and native.takes_images(pictures, height, width, dtype):
        return native.pictures(pictures, height, width, dtype)
    b, c, h, w = pictures.shape
    x = pictures.new_empty((b, height, width, c), dtype=dtype)
    x[:, h:] = 0
    x[:, :h, w:] = 0
    x[:, :h, :w] = pictures.permute(0, 2, 3, 1)[:, :height, :width]
    return x.permute(0, 3, 1, 2)
