"""Speed of a training step on one GPU with both columns, beside the limits of the GPU.

    python benchmarks/gpu/step.py [--out benchmarks/gpu/results] [--minutes 8]

The limits of the device (large matrix products, a large copy); local response normalization alone,
in each of its forms; steps in turn of our network, by the trainer's own step, and of the plain
PyTorch one, in fp32, tf32 and bf16; launches and operations of our lanes. Everything is written to
a JSON file and a table in OUT as soon as it is measured. README.md beside this file says how to
read them. Needs torch and nothing else. `--device cpu --width 0.0625 --batch 8` tries it out. Exits
with 1 if a lane of ours broke off.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from nets import Step, duet_step, eager_step, plain_alexnet  # noqa: E402
from parts.machine import facts  # noqa: E402
from parts.record import Record  # noqa: E402
from parts.step_profile import StepProfile  # noqa: E402
from parts.step_table import best, figure, goals, markdown  # noqa: E402

from cluster.training.passes import CudaGraph  # noqa: E402
from cluster.training.precision import prepare_device  # noqa: E402
from model.alexnet import AlexNet  # noqa: E402
from model.norm import describe_backend, local_response_norm, reference  # noqa: E402
from model.norm.response import NormKernel  # noqa: E402

MODES = ("fp32", "tf32", "bf16")
NORM_SHAPES = ((96, 55, 55), (256, 27, 27))
WARM_UP = 5
PROFILED = 5
"""Steps that are profiled, of each lane."""


FORMS = {"duet": ("graph", "fused", "compiled"), "plain": ("eager", "compiled")}
"""Ways in which a step is launched: replayed as CUDA graphs; one operation after the other, with
our kernels (fused) or torch's layers (eager); after `torch.compile`."""


@dataclass(frozen=True)
class Lane:
    """A network in one data type and one of its `FORMS`."""

    net: str
    mode: str
    form: str

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.net} {self.mode} {self.form}"


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    found.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    found.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    found.add_argument("--batch", type=int, default=128, help="images in a step")
    found.add_argument("--width", type=float, default=1.0, help="factor on all maps and units")
    found.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after these")
    found.add_argument("--rounds", type=int, default=5, help="turns of each lane")
    found.add_argument("--seconds", type=float, default=1.0, help="length of a turn, at least")
    found.add_argument("--matrix", type=int, default=8192, help="side of the matrices multiplied")
    found.add_argument(
        "--skip", default="", help="limits, norm, steps, profile or compiled, with commas between"
    )
    return found.parse_args(given)


class Bench:
    """One run; its results are on the disk after each measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Describe the machine, and name the files of the results."""
        self.options = options
        self.device = torch.device("cuda" if options.device == "gpu" else "cpu")
        self.cores = torch.get_num_threads()
        self.end = time.monotonic() + 60 * options.minutes
        self.skipped = options.skip.split(",")
        machine = facts(options.device) | {"norm": describe_backend(self.device)}
        command = shlex.join(["python", "benchmarks/gpu/step.py", *sys.argv[1:]])
        self.record = Record(options.out, machine, command, markdown, "step")
        self.found, self.put = self.record.found, self.record.put
        self.put("setup", {"batch": options.batch, "width": options.width})

    def seconds(self, work: Callable[[], object], at_least: float = 0.3) -> float:
        """Return the seconds of one call of `work`, the GPU's part included."""
        for _ in range(2):
            work()
        self.wait()
        count, start = 0, time.perf_counter()
        while True:
            work()
            count += 1
            if count % 4 == 0 or self.device.type == "cpu":
                self.wait()
                if (passed := time.perf_counter() - start) > at_least:
                    return passed / count

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def limits(self) -> None:
        """Measure large matrix products in each type, and a large copy."""
        side = self.options.matrix
        found = {}
        for mode in MODES:
            self.set_precision(mode)
            dtype = torch.bfloat16 if mode == "bf16" else torch.float32
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            found[f"{mode}_tflops"] = 2e-12 * side**3 / self.seconds(partial(torch.matmul, a, b))
        source = torch.ones(side * side, device=self.device)
        target = torch.empty_like(source)
        copied = self.seconds(partial(target.copy_, source))
        self.put("limits", found | {"copy_gb_s": 8e-9 * side * side / copied})

    def norm(self) -> None:
        """Measure LRN with its ReLU alone, forward and backward, in each of its forms."""
        forms: dict[str, Callable[..., torch.Tensor]] = {
            describe_backend(self.device): local_response_norm,
            "torch operations": lambda x, c, r: NormKernel.apply(x, reference.normalize, c, r),
            "torch.nn.LocalResponseNorm": plain_norm,
        }
        if "compiled" not in self.skipped:
            forms["torch.compile"] = torch.compile(reference.traceable_norm)
        rows: list[dict[str, Any]] = []
        for maps, height, width in NORM_SHAPES:
            shape = (self.options.batch, max(8, round(maps * self.options.width)), height, width)
            x = 20 * torch.randn(shape, device=self.device)
            exact = plain_norm(x[:4].double(), 2, True)
            x = x.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
            for name, form in forms.items():
                row: dict[str, Any] = {"form": name, "shape": list(shape)}
                try:
                    y = form(x, 2, True)
                    error = (y[:4].detach().double() - exact).abs() / (exact + 1)
                    row["error"] = float(error.max())
                    row["forward_ms"] = 1e3 * self.seconds(lambda: form(x, 2, True))  # noqa: B023
                    back = partial(torch.autograd.grad, y, x, torch.ones_like(y), retain_graph=True)
                    row["backward_ms"] = 1e3 * self.seconds(back)
                except Exception as error:
                    row["failed"] = format_error(error)
                self.put("norm", rows := [*rows, row])

    def lanes(self) -> list[Lane]:
        """Return all lanes, those that matter most first."""
        without = {"compiled"} & {*self.skipped}
        if self.device.type != "cuda":
            without |= {"graph", "tf32"}
        return [
            Lane(net, mode, form)
            for mode in reversed(MODES)
            for net, forms in FORMS.items()
            for form in forms
            if not {mode, form} & without
        ]

    def steps(self) -> None:
        """Measure all lanes in turn."""
        turns = {}
        images = 60 * torch.randn(self.options.batch, 3, 224, 224, device=self.device)
        labels = torch.randint(0, 1000, (self.options.batch,), device=self.device)
        rows: dict[str, dict[str, Any]] = {}
        for lane in self.lanes():
            if time.monotonic() > self.end:
                break
            row = rows[lane.name] = {"net": lane.net, "mode": lane.mode, "form": lane.form}
            try:
                turn, start = self.turn(lane, images, labels), time.perf_counter()
                for _ in range(WARM_UP):
                    turn()
                self.wait()
                row |= {"warm_up_s": time.perf_counter() - start, "img_s": []}
                turns[lane.name] = turn
            except Exception as error:
                row["failed"] = format_error(error)
            self.put("steps", rows)
        for number in range(self.options.rounds):
            if number and time.monotonic() > self.end:
                break
            for name in list(turns)[:: -1 if number % 2 else 1]:
                spent = self.seconds(turns[name], self.options.seconds)
                rows[name]["img_s"].append(self.options.batch / spent)
            self.put("steps", rows)
        self.put("goals", goals(self.found))

    def turn(self, lane: Lane, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
        """Return a function that takes one step of a lane."""
        torch.manual_seed(0)
        self.set_precision(lane.mode)
        compiles = lane.form == "compiled"
        step: Step
        if lane.net == "plain":
            plain = plain_alexnet(width=self.options.width).to(self.device)
            step = eager_step(torch.compile(plain) if compiles else plain)
        else:
            net = AlexNet(width=self.options.width).to(self.device)
            graph = CudaGraph if lane.form == "graph" else None
            step = duet_step(net, torch.compile(net) if compiles else None, graph)
            if self.device.type == "cuda":
                images = images.half()  # as the stream delivers them
        dtype = torch.bfloat16 if lane.mode == "bf16" else torch.float32
        numbers = itertools.count()

        def turn() -> None:
            self.set_precision(lane.mode)
            step(next(numbers), images, labels, dtype)

        return turn

    def set_precision(self, mode: str) -> None:
        """Choose the trainer's settings of torch, with tensor cores for float32, or without."""
        prepare_device(self.device, self.cores, tf32=mode != "fp32")

    def profile(self) -> None:
        """Profile some steps of our fastest lane of each form."""
        images = 60 * torch.randn(self.options.batch, 3, 224, 224, device=self.device)
        labels = torch.randint(0, 1000, (self.options.batch,), device=self.device)
        for form in FORMS["duet"]:
            lane = best(self.found.get("steps", {}), "duet", form)
            if lane is None:
                continue
            turn = self.turn(Lane(lane["net"], lane["mode"], form), images, labels)
            for _ in range(WARM_UP):
                turn()
            profiler = StepProfile(self.device)
            profiler.start()
            for _ in range(PROFILED):
                turn()
            profiler.stop()
            seconds = self.options.batch / statistics.median(lane["img_s"])
            row = {"lane": f"duet {lane['mode']} {form}"} | profiler.summarize(PROFILED, seconds)
            self.record.add("profile", row)


def plain_norm(x: torch.Tensor, columns: int, relu: bool) -> torch.Tensor:
    """Return the normalization by torch's own layer, [b, maps, h, w]."""
    norm = torch.nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
    x = x.relu() if relu else x
    return torch.cat([norm(own) for own in x.chunk(columns, dim=1)], dim=1)


def format_error(error: Exception) -> str:
    """Return an error as one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main() -> int:
    """Take the steps that are not skipped, and print the paths of the results."""
    options = parse_arguments()
    if options.device == "gpu" and not torch.cuda.is_available():
        sys.stderr.write("error: torch sees no GPU; --device cpu tries the script out\n")
        return 3
    bench = Bench(options)
    page = bench.record.path.with_suffix(".md")
    sys.stderr.write(f"results: {page}\n")
    for step in ("limits", "norm", "steps", "profile"):
        if step not in bench.skipped and time.monotonic() < bench.end:
            getattr(bench, step)()
            gc.collect()
    bench.put("finished", True)
    sys.stderr.write(page.read_text(encoding="utf-8"))
    print(f"figure: batch {options.batch}: {figure(bench.found)}")
    rows = bench.found.get("steps", {}).values()
    return 1 if any(row["net"] == "duet" and "failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
