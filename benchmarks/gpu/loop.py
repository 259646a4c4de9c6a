"""The real training loop on one GPU, without Ray: losses and their bits, speed, launches.

    python benchmarks/gpu/loop.py DATA [--out benchmarks/gpu/results] [--steps 400]

`cluster.training.loop.train` with both columns: a short run twice, the second time stopped and
resumed in the middle; then, on JPEGs and on raw images, the stream alone, the step alone, the loop
with both, and a profile of some of its steps. Everything is written to a JSON file and a page of
tables in OUT as soon as it is measured; README.md beside this file says how to read them.
`--device cpu --width 0.03125 --batch 4 --steps 8 --samples 48` tries it out. Exits with 1 if a
loss is no number, a step is missing, or bits differ on a CPU.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from nets import duet_step  # noqa: E402
from parts import clock, copies, lanes, machine  # noqa: E402
from parts.loop_table import goals, markdown  # noqa: E402
from parts.record import Record  # noqa: E402
from parts.step_profile import ProfiledSteps  # noqa: E402

from cluster.config import Config  # noqa: E402
from cluster.mesh import ProcessMesh  # noqa: E402
from cluster.run.events import Event, Warned  # noqa: E402
from cluster.run.folder import METRICS  # noqa: E402
from cluster.training.loop import train  # noqa: E402
from cluster.training.passes import CudaGraph  # noqa: E402
from cluster.training.precision import compute_dtype, prepare_device  # noqa: E402
from model.alexnet import AlexNet  # noqa: E402
from model.architecture import Design  # noqa: E402
from pipeline.stream.config import Device  # noqa: E402
from pipeline.stream.transfer import select_gpu  # noqa: E402
from pipeline.tools.errors import DuetError, UsageError, run  # noqa: E402
from pipeline.tools.units import cpu_count  # noqa: E402

SHORT = 40
"""Steps of the runs whose bits are compared; the second one stops after half of them."""
FIELDS = ("img_s", "seconds", "data_wait", "compute", "stall")
"""Fields of RUN/metrics.jsonl of which the medians are taken."""
WARM_UP = 0.25
"""Part of the steps before those that count."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Run and profile the training loop on a GPU."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of a data set of JPEGs; some hundred images will do."""
    out: Path = Path(__file__).parent / "results"
    """Folder for the results."""
    device: Device = "gpu"
    """`cpu` tries the script out."""
    batch: int = 128
    """Images in a step."""
    width: float = 1.0
    """Factor on all maps and units."""
    steps: int = 400
    """Steps that are timed; some more are profiled."""
    profiled: int = 20
    """Steps that are profiled."""
    samples: int = 20_000
    """Fewest samples: a smaller set is repeated, by links to its shards, until it has as many."""
    seconds: float = 2.0
    """Seconds in which the stream alone, and the step alone, are timed."""
    threads: int = cpu_count()
    """Host threads of the stream."""
    skip: str = ""
    """Parts to leave out, with commas between: bits, jpeg, raw."""


class LoopBench:
    """One run; its results are on the disk after each measurement."""

    def __init__(self, options: LoopOptions, record: Record, folder: Path) -> None:
        """Take the options, and an empty folder for data sets and runs."""
        self._options, self._record, self._folder = options, record, folder
        self._device = torch.device("cuda" if options.device == "gpu" else "cpu")
        self._mesh = ProcessMesh(device=self._device, cores=options.threads)
        self._runs = itertools.count()
        self._warnings: list[str] = []

    def bits(self) -> None:
        """Train twice, the second time with a break, and compare losses and weights."""
        options = self._options
        whole, parted = self._make_run(), self._make_run()
        every = {"checkpoint_every": SHORT // 2}
        self._train(options.data, whole, SHORT, **every)
        self._train(options.data, parted, SHORT // 2, **every)
        self._train(options.data, parted, SHORT, **every)
        a, b = (read_column(one, "loss") for one in (whole, parted))
        differing = [n + 1 for n, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
        halves = [
            read_weights(whole, step) == read_weights(parted, step) for step in (SHORT // 2, SHORT)
        ]
        found = {
            "steps": SHORT,
            "first_loss": a[0],
            "last_loss": a[-1],
            "second_run": halves[0] and not any(step <= SHORT // 2 for step in differing),
            "resumed": halves[1] and not differing,
            "first_differing_step": differing[0] if differing else None,
            "largest_difference": max(abs(x - y) for x, y in zip(a, b, strict=True)),
        }
        self._record.put("bits", found)
        words = {True: "yes", False: f"NO, from step {found['first_differing_step'] or SHORT}"}
        say(
            f"losses {a[0]:.4f} -> {a[-1]:.4f} in {SHORT} steps; the same bits in a second run: "
            f"{words[found['second_run']]}; after a resume: {words[found['resumed']]}"
        )
        if not all(map(math.isfinite, a + b)):
            raise DuetError("a loss is no number")
        if self._device.type == "cpu" and not (found["second_run"] and found["resumed"]):
            raise DuetError("bits differ on a CPU")

    def jpeg(self) -> None:
        """Measure stream, step, and loop on JPEGs."""
        self._measure("jpeg", self._options.data)

    def raw(self) -> None:
        """Measure stream, step, and loop on raw images, made of DATA."""
        self._measure("raw", copies.make_raw(self._options.data, self._folder / "raw-images"))

    def _measure(self, name: str, given: Path) -> None:
        options = self._options
        data = copies.repeat_data(given, self._folder / f"{name}-data", options.samples)
        setting = lanes.Setting(
            threads=options.threads, load=Config().stream.hw_decoder_load,
            prefetch=Config().stream.prefetch, batch=options.batch,
        )  # fmt: skip
        gauge = machine.Gauge() if self._device.type == "cuda" else None
        alone = clock.measure_once(
            partial(lanes.ours, data, options.device), setting, options.seconds, gauge
        )
        found: dict[str, Any] = {"stream": alone.get("img_s"), "step": self._time_step()}
        if "error" in alone:
            found["stream_failed"] = alone["error"]
        self._record.put(name, found)
        path = self._make_run()
        profiler = ProfiledSteps(self._device, options.steps, options.profiled)
        start = time.perf_counter()
        # It is stopped before the last step, which would be the profiler's.
        self._train(data, path, options.steps + options.profiled + 1, is_stopping=profiler)
        found["whole_s"] = round(time.perf_counter() - start, 1)
        rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        counted = rows[int(WARM_UP * options.steps) : options.steps]
        if len(counted) != options.steps - int(WARM_UP * options.steps):
            raise DuetError(f"{name}: steps are missing in {METRICS}")
        images = options.batch * len(counted)
        found |= {
            "loop": round(images / sum(row["seconds"] for row in counted), 1),
            "medians": {
                field: statistics.median(row[field] for row in counted) for field in FIELDS
            },
            "profile": profiler.summarize(
                options.profiled, statistics.median(row["seconds"] for row in counted)
            ),
            "warnings": [*dict.fromkeys(self._warnings)],
        }
        if self._device.type == "cuda":
            found["torch_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._record.put(name, found)
        self._record.put("goals", goals(self._record.found))
        say(f"{name}: {describe(found)}")

    def _time_step(self) -> float:
        """Return img/s of the trainer's step alone, on images that are there."""
        options = self._options
        prepare_device(self._device, options.threads)
        net = AlexNet(width=options.width).to(self._device)
        step = duet_step(net, graph=CudaGraph if self._device.type == "cuda" else None)
        images = 60 * torch.randn(options.batch, 3, 224, 224, device=self._device)
        if self._device.type == "cuda":
            images = images.half()  # as the stream delivers them
        labels = torch.randint(0, 1000, (options.batch,), device=self._device)
        dtype = compute_dtype("auto", self._device)
        count, least = 0, 6
        while True:
            if count == least - 1:
                wait_for(self._device)
                start = time.perf_counter()
            step(count, images, labels, dtype)
            count += 1
            if count >= 2 * least and time.perf_counter() - start > options.seconds:
                wait_for(self._device)
                passed = time.perf_counter() - start
                return round((count - least + 1) * options.batch / passed, 1)

    def _train(
        self, data: Path, path: Path, steps: int, *,
        is_stopping: Callable[[], bool] = lambda: False, checkpoint_every: int = 10**9,
    ) -> None:  # fmt: skip
        options = self._options
        config = Config(
            design=Design(width=options.width),
            batch_size=options.batch,
            steps=steps,
            lr_drops=1,  # so that the rates do not depend on the length, which the resume changes
            bias_drops=1,
            validate_every=0,
            statistics_every=0,
            checkpoint_every=checkpoint_every,
            keep=2,
        )
        train(config, str(data), path, self._mesh, self._note, is_stopping=is_stopping)
        clock.free_memory()

    def _note(self, event: Event) -> None:
        if isinstance(event, Warned):
            self._warnings.append(event.text)
            say(f"warning: {event.text}")

    def _make_run(self) -> Path:
        path = self._folder / f"run-{next(self._runs)}"
        path.mkdir()
        return path


def read_column(path: Path, field: str) -> list[float]:
    """Return a field of every row of a run."""
    return [json.loads(line)[field] for line in (path / METRICS).read_text().splitlines()]


def read_weights(path: Path, step: int) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint: weights and velocities."""
    text = (path / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").read_text()
    files: dict[str, str] = json.loads(text)["files"]
    return files


def describe(found: dict[str, Any]) -> str:
    """Return what was found of one kind of images, in a line."""
    profile = found["profile"]
    text = f"loop {found['loop']:,.0f} img/s"
    if found["stream"]:
        text += f", {found['loop'] / min(found['stream'], found['step']):.3f} of the slower of "
        text += f"stream {found['stream']:,.0f} and step {found['step']:,.0f}"
    if "gpu_busy" in profile:
        text += f", GPU busy {profile['gpu_busy']:.1%}"
    return f"{text}, {profile['launches']:.0f} launches a step"


def wait_for(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def say(text: str) -> None:
    """Print a result as a line that `first.sh` puts into its table."""
    print(f"figure: {text}", flush=True)


def choose_parts(skip: str) -> Sequence[str]:
    """Return the parts to take.

    Raises:
        UsageError: there is no such part.
    """
    skipped = [name.strip() for name in skip.split(",") if name.strip()]
    parts = ("bits", "jpeg", "raw")
    if unknown := [name for name in skipped if name not in parts]:
        raise UsageError(f"--skip {unknown[0]}: no such part; there are {', '.join(parts)}")
    return [name for name in parts if name not in skipped]


def main() -> None:
    """Take the parts that are not skipped."""
    options = tyro.cli(LoopOptions, prog="python benchmarks/gpu/loop.py", description=__doc__)
    parts = choose_parts(options.skip)
    select_gpu(options.device)
    command = shlex.join(["python", "benchmarks/gpu/loop.py", *sys.argv[1:]])
    record = Record(options.out, machine.facts(options.device), command, markdown, "loop")
    record.put("setup", {"batch": options.batch, "width": options.width, "steps": options.steps})
    with tempfile.TemporaryDirectory(prefix="loop-") as folder:
        bench = LoopBench(options, record, Path(folder))
        for part in parts:
            getattr(bench, part)()
    record.put("finished", True)
    sys.stderr.write(record.path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
