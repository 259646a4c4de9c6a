"""C kernels for a CPU: compiled once for this very processor, cached, and called on tensors.

The library is compiled by the system's C compiler into the user's cache folder
(`$XDG_CACHE_HOME/duet` or `~/.cache/duet`), under a name that is a hash of source, compiler, flags
and processor; every later process loads it from there. Without such a folder each process compiles
for itself, which takes some three seconds.

Without a compiler, or with one that fails, `prepare_kernels` returns False, and torch's own
operations do the work. DUET_KERNELS=torch in the environment forces that.
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
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.norm.reference import (
    PAPER,
    SPATIAL_SCALE,
    SPATIAL_SIZE,
    Response,
    count_windows,
    is_channels_last,
)

SOURCES = ("kernels.c", "kernels.inc")
# No exceptions and no errno, or loops with roots would not become vectors; results stay the same.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
# GCC avoids full vectors by default; with them the kernels take a third less time.
FLAGS_X86 = ("-mprefer-vector-width=512",)
COMPILE_SECONDS = 300  # it takes 3, but many processes may start on few cores
MOST_WINDOW = 4
"""Largest pooling window of the kernels, as in kernels.c."""
COLORS = 3
"""Channels of the images that the kernels take, as in kernels.c."""

# The functions of the library, each with one of these suffixes, and their arguments.
_SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
_LONG, _INT, _DOUBLE, _POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
_KERNELS = {
    "norm": (*[_POINTER] * 3, *[_LONG] * 6, _DOUBLE, _DOUBLE, _INT, _INT),
    "pool": (*[_POINTER] * 3, *[_LONG] * 7, _DOUBLE, _DOUBLE, _INT, _INT, _INT),
    "spatial": (*[_POINTER] * 3, *[_LONG] * 4, _DOUBLE, _INT),
    "pad": (*[_POINTER] * 2, *[_LONG] * 5, _INT),
}


class KernelsUnavailable(Exception):
    """There are no kernels; the message says why in a few words."""


def prepare_kernels(x: Tensor) -> bool:
    """Compile or load the kernels, at the first call only; False if they cannot work on x."""
    return x.device.type == "cpu" and x.dtype in _SUFFIXES and _load_kernels()[0] is not None


def describe() -> str:
    """The compiler of the kernels in use; or torch's operations, and the reason for them."""
    return _load_kernels()[1]


def normalize(
    x: Tensor, gradient: Tensor | None, columns: int, relu: bool, response: Response = PAPER
) -> Tensor:
    """Response-normalize x; with `gradient`, return the gradient of x instead.

    Args:
        x: bfloat16, float32 or float64 [b, columns * maps, h, w], dense in either memory format.
        gradient: gradient of the output, in the shape, dtype and memory format of x; or None.
        columns: number of columns whose maps x holds.
        relu: whether max(x, 0) is normalized instead of x.
        response: constants; `Response.has_kernels` must hold.
    """
    y = torch.empty_like(x)
    images, maps, height, width = x.shape
    map_step, pixel_step = (1, maps) if is_channels_last(x) else (height * width, 1)
    sizes = (images, height * width, columns, maps // columns, map_step, pixel_step)
    _call("norm", x, gradient, y, *sizes, response.k, response.scale, relu)
    return y


def pool(
    x: Tensor,
    gradient: Tensor | None,
    columns: int,
    relu: bool,
    norm: bool,
    window: int,
    stride: int,
    response: Response = PAPER,
) -> Tensor:
    """Max-pool x; with `gradient`, return the gradient of x instead.

    Args:
        x: bfloat16, float32 or float64 [b, columns * maps, h, w], channels last.
        gradient: gradient of the output, [b, columns * maps, pooled height, pooled width], in the
            dtype and memory format of x; or None.
        columns: number of columns whose maps x holds.
        relu: whether max(x, 0) is taken instead of x.
        norm: whether x is normalized before the pooling.
        window: at most MOST_WINDOW, h and w.
        stride: at most `window`.
        response: as in `normalize`.
    """
    images, maps, *sides = x.shape
    y = torch.empty_like(x)
    if gradient is None:
        pooled = [count_windows(side, window, stride) for side in sides]
        y = x.new_empty((images, *pooled, maps)).permute(0, 3, 1, 2)
    sizes = (images, *sides, columns, maps // columns, window, stride)
    _call("pool", x, gradient, y, *sizes, response.k, response.scale, relu, norm)
    return y


def normalize_spatial(x: Tensor, gradient: Tensor | None) -> Tensor:
    """Normalize x over neighboring pixels; with `gradient`, return the gradient of x instead.

    Args:
        x: bfloat16, float32 or float64 [b, maps, h, w], dense in either memory format.
        gradient: gradient of the output, in the shape, dtype and memory format of x; or None.
    """
    y = torch.empty_like(x)
    images, maps, height, width = x.shape
    if not is_channels_last(x):  # each map is an image of its own
        images, maps = images * maps, 1
    _call("spatial", x, gradient, y, images, height, width, maps, SPATIAL_SCALE / SPATIAL_SIZE**2)
    return y


def pad_images(images: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Convert images to another size and dtype, channels last, in one pass over memory.

    Zeros are added, or pixels cut off, on the right and at the bottom. Contiguous float32 images of
    three colors, which the pipeline makes, are done by the compiled kernel on a CPU: a third of the
    time of torch's operations on one core, bit for bit the same.

    Args:
        images: float [b, c, h, w], any strides.
        height: height of the result in pixels.
        width: width of the result in pixels.
        dtype: dtype of the result.

    Returns:
        [b, c, height, width].
    """
    b, c, h, w = images.shape
    x = images.new_empty((b, height, width, c), dtype=dtype)
    needs_torch = torch.compiler.is_compiling() or (
        images.requires_grad and torch.is_grad_enabled()
    )
    fits = c == COLORS and h <= height and w <= width and images.is_contiguous()
    known = images.dtype == torch.float32 and dtype in _SUFFIXES
    if fits and known and not needs_torch and prepare_kernels(images):
        kernel = getattr(_load_kernels()[0], f"pad_{_SUFFIXES[dtype]}")
        kernel(images.data_ptr(), x.data_ptr(), b, h, w, height, width, torch.get_num_threads())
    else:
        x[:, h:] = 0
        x[:, :h, w:] = 0
        x[:, :h, :w] = images.permute(0, 2, 3, 1)[:, :height, :width]
    return x.permute(0, 3, 1, 2)


def _call(name: str, x: Tensor, gradient: Tensor | None, y: Tensor, *settings: float) -> None:
    library = _load_kernels()[0]
    failed: int = getattr(library, f"{name}_{_SUFFIXES[x.dtype]}")(
        x.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        y.data_ptr(),
        *settings,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the working space of the normalization")


@lru_cache(maxsize=1)
def _load_kernels() -> tuple[ctypes.CDLL | None, str]:
    """Compile or load the library: it and its description, or None and the reason."""
    try:
        if os.environ.get("DUET_KERNELS") == "torch":
            raise KernelsUnavailable("DUET_KERNELS=torch")
        command, version = _find_compiler()
        library = _load_library(command, version)
    except (KernelsUnavailable, OSError, subprocess.SubprocessError) as error:
        return None, f"torch operations, as there are no compiled kernels: {error}"
    for name, arguments in _KERNELS.items():
        for suffix in _SUFFIXES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, ctypes.c_int
    return library, f"kernels compiled by {version}"


def _find_compiler() -> tuple[list[str], str]:
    """The compiler's command, and the first line that it prints as its version.

    Raises:
        KernelsUnavailable: there is none.
        OSError, subprocess.SubprocessError: it does not run.
    """
    wanted = os.environ.get("CC")
    for command in [shlex.split(wanted)] if wanted else [["gcc"], ["cc"], ["clang"]]:
        if command and shutil.which(command[0]):
            done = _run([*command, "--version"], 20)
            done.check_returncode()
            return command, done.stdout.splitlines()[0]
    raise KernelsUnavailable(f"no C compiler ({wanted or 'gcc, cc, clang'})")


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
    )


def _find_openmp() -> str:
    """Path of the OpenMP library that torch runs its threads with.

    The kernels have to use the same one: a second library would start threads of its own, which
    keep the processor busy while they wait, and double the number of threads.
    """
    names = re.findall(
        r"/\S*/lib(?:gomp|iomp5|omp)[-.][^/\s]*", Path("/proc/self/maps").read_text()
    )
    if not names:
        raise KernelsUnavailable("torch was built without OpenMP")
    return ([name for name in names if "/torch" in name] or names)[0]


def _load_library(command: list[str], version: str) -> ctypes.CDLL:
    """Load the library from the cache, or compile it.

    Raises:
        KernelsUnavailable: the compiler fails, or torch has no OpenMP.
        OSError, subprocess.SubprocessError: anything else that prevents compiling.
    """
    openmp = _find_openmp()
    flags = [*FLAGS, *(FLAGS_X86 if platform.machine() == "x86_64" else ())]
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    parts += [part.encode() for part in (*command, version, *flags, openmp, _describe_processor())]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24] + ".so"
    folder = _find_cache()
    if folder is not None and (folder / name).is_file():
        with suppress(OSError):  # damaged: compiled again below
            return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(prefix="duet-") as work:
        library = _compile(command, flags, openmp, Path(work))
        if folder is not None and _store(library, folder / name):
            library = folder / name
        return ctypes.CDLL(str(library))


def _compile(command: list[str], flags: list[str], openmp: str, folder: Path) -> Path:
    objects, library = folder / "kernels.o", folder / "kernels.so"
    source = Path(__file__).parent / SOURCES[0]
    for arguments in (
        [*flags, "-fPIC", "-fopenmp", "-c", str(source), "-o", str(objects)],
        ["-shared", "-Wl,--no-undefined", str(objects), openmp, "-lm", "-o", str(library)],
    ):
        done = _run([*command, *arguments], COMPILE_SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it failed"]
            raise KernelsUnavailable(f"{shlex.join(command)} says: {lines[0][:200]}")
    return library


def _store(library: Path, path: Path) -> bool:
    """Copy a library to its place in the cache; False if that fails.

    Other processes may do the same at the same time: only whole files appear, and the last stays.
    """
    partial = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            file.write(library.read_bytes())
            file.flush()
            os.fsync(file.fileno())  # a file cut off by a power failure would crash its user
        partial.replace(path)
    except OSError:  # no room
        partial.unlink(missing_ok=True)
        return False
    return True


def _describe_processor() -> str:
    """The facts that `-march=native` depends on: machines may share a home folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    found = {line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted}
    return "\n".join([platform.machine(), *sorted(found)])


def _find_cache() -> Path | None:
    """The user's cache folder; None if there is none that only the user can write to."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "duet"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_private and os.access(folder, os.W_OK) else None
