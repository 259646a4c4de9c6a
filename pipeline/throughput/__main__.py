"""Find the bottleneck of the stream, each stage's distance from its limit, and what would help.

    python -m pipeline.throughput DATA [--device cpu|gpu] [--img-s N] [--tune] [--compare OLD.json]
    python -m pipeline.throughput DATA --rate [--reader stream|native]
    python -m pipeline.throughput --plan --gpus N --img-s N --store s3 [--measured FILE.json]

The first form measures every stage alone against the limits of this machine, then the stream,
names its bottleneck and the gain of each change, and writes throughput.json and throughput.html.
`--rate` measures the stream alone, or DALI's own reader as the yardstick.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.console
import tyro
from rich.text import Text

from pipeline.remote.filesystem import is_remote
from pipeline.stream.config import Device, Shuffle, StreamConfig
from pipeline.stream.operators import require_dali
from pipeline.throughput.capacity import StoreKind, plan_capacity, print_plan
from pipeline.throughput.diagnosis import SECONDS, examine
from pipeline.throughput.report import (
    compare_reports,
    find_other_origin,
    has_regressed,
    list_differences,
    load_report,
    print_report,
    round_floats,
    write_page,
)
from pipeline.throughput.stages import Setting
from pipeline.throughput.stream_rate import measure_rate
from pipeline.throughput.tune import TuningTrial, tune, write_tuning
from pipeline.tools.arguments import parse_options, require_range
from pipeline.tools.errors import DuetError, SetupError, UsageError, run
from pipeline.tools.terminal import Terminal
from pipeline.tools.units import cpu_count, parse_size

NAME = "throughput.json"
MOST_IMAGES, MOST_GPUS = 10**12, 10**6
"""Most images of an epoch, and GPUs of a job, that a plan is made for."""


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """Measure the stream of a data set on this machine."""

    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """Data set: a folder, or an address such as s3://bucket/folder."""
    device: Device = "cpu"
    """Device that decodes and holds the images."""
    split: str = "train"
    """Split to read."""
    shuffle: Shuffle | None = None
    """Order of the stream; default: full, or block for a data set in a store."""
    window: int = StreamConfig.window
    """Shards in a window of the block shuffle."""
    cache: str | None = None
    """Folder for the shards of a remote data set; default: duet in the user's cache folder."""
    cache_size: str = "100GB"
    """Most bytes in the cache."""
    batch_size: int = StreamConfig.batch_size
    """Images in a batch."""
    threads: int = cpu_count()
    """Host threads that decode."""
    prefetch: int = StreamConfig.prefetch
    """Batches in flight."""
    hw_decoder_load: float = StreamConfig.hw_decoder_load
    """Share of a batch that the JPEG engines of a GPU decode."""
    img_s: float | None = None
    """Images per second that the trainer takes; with --plan: that the whole job takes."""
    seconds: float = SECONDS
    """Least measuring time of each stage, in seconds."""
    out: Path = Path()
    """Folder for throughput.json, throughput.html and tuning.toml."""
    compare: Path | None = None
    """An earlier throughput.json; exit code 1 if the stream is slower now, beyond noise."""
    tune: bool = False
    """Search threads, prefetch depth (and decoder load) by measuring; writes tuning.toml."""
    rate: bool = False
    """Measure the stream's rate only."""
    reader: Literal["stream", "native"] = "stream"
    """Reader: `native` is DALI's own for WebDataset shards; only with --rate."""
    ledger: Path | None = None
    """Folder for a ledger, to measure the cost of writing one; only with --rate."""
    windows: int = 5
    """Windows of time, of whose rates the median is the result; only with --rate."""
    batches: int = 40
    """Batches in each window; only with --rate."""
    plan: bool = False
    """Compute what a job needs, from a measured report."""
    measured: Path | None = None
    """Measured report; default: throughput.json here, if there is one that is of this machine and
    of DATA; only with --plan."""
    gpus: int = 2
    """GPUs of the job; only with --plan."""
    gpus_per_node: int = 8
    """GPUs of a node; only with --plan."""
    store: StoreKind = "disk"
    """Store of the data set; only with --plan."""
    images: Annotated[int, tyro.conf.arg(aliases=["--pictures"])] = 0
    """Images in an epoch; default: as measured, or ImageNet's; only with --plan."""
    json: bool = False
    """Print one JSON object on stdout."""

    def check(self) -> None:
        """Raise UsageError for arguments that cannot work."""
        for name in ("batch_size", "threads", "prefetch", "windows", "batches", "window", "gpus",
                     "gpus_per_node"):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        require_range("images", self.images, 0, MOST_IMAGES)
        require_range("gpus", self.gpus, 1, MOST_GPUS)
        if self.img_s is not None and not 0 < self.img_s < float("inf"):
            raise UsageError(f"--img-s is {self.img_s}; it must be above 0")
        if not 0 < self.seconds < 3600:
            raise UsageError(f"--seconds is {self.seconds}; it must be above 0")
        self._check_form()
        if self.plan and self.img_s is None:
            raise UsageError("--plan needs --img-s: the images a second that the job takes")
        if self.data is None and not self.plan:
            raise UsageError("name a data set: python -m pipeline.throughput DATA")
        if self.reader == "native" and not self.rate:
            raise UsageError("--reader native goes with --rate: it has no stages to measure")
        if not self.out.is_dir():
            raise UsageError(f"--out {self.out} is no folder; make it, or name another")
        if not os.access(self.out, os.W_OK):
            raise UsageError(f"--out {self.out} cannot be written to; name another folder")

    def _check_form(self) -> None:
        """Refuse flags of two forms of the command, of which one would have no effect."""
        forms = [f"--{name}" for name in ("plan", "rate", "tune") if getattr(self, name)]
        if len(forms) > 1:
            raise UsageError(f"{' and '.join(forms)} exclude each other; give one of them")
        if self.compare is not None and forms:
            raise UsageError(f"--compare goes with a whole report, not with {forms[0]}")
        for name, form in (("measured", "--plan"), ("ledger", "--rate")):
            if getattr(self, name) is not None and form not in forms:
                raise UsageError(f"--{name} goes with {form} only; give both, or neither")

    @property
    def setting(self) -> Setting:
        """The stream that is measured."""
        data = self.data or ""
        try:
            return Setting(
                data=data, split=self.split, device=self.device, window=self.window,
                shuffle=self.shuffle or ("block" if is_remote(data) else "full"),
                batch_size=self.batch_size, threads=self.threads, prefetch=self.prefetch,
                hw_decoder_load=self.hw_decoder_load, cache=self.cache,
                cache_size=parse_size(self.cache_size),
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(f"{error}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(ThroughputOptions, argv, "python -m pipeline.throughput", __doc__)
    options.check()
    console = Terminal(sys.stderr)
    if not options.plan:
        require_dali()
    try:
        if options.plan:
            _plan(options, console)
        elif options.rate:
            _measure_rate(options)
        elif options.tune:
            _tune(options, console)
        else:
            _examine(options, console)
    except OSError as error:  # errors of a data set or a store are DuetErrors
        raise SetupError(
            f"{error.filename or options.out}: {error.strerror}; make room, or name another --out"
        ) from error
    return 0


def _measure_rate(options: ThroughputOptions) -> None:
    setting, reader = options.setting, options.reader
    rates = measure_rate(setting, reader=reader, windows=options.windows, batches=options.batches,
                         ledger=options.ledger)  # fmt: skip
    median, low, high = statistics.median(rates), min(rates), max(rates)
    if options.json:
        facts = {
            "reader": reader, "device": setting.device, "threads": setting.threads,
            "batch_size": setting.batch_size, "img_s": round(median, 1),
            "windows": [round(rate, 1) for rate in rates],
        }  # fmt: skip
        sys.stdout.write(json.dumps(facts) + "\n")
    sys.stderr.write(
        f"{reader} reader, {setting.device}, {setting.threads} threads, batch "
        f"{setting.batch_size}: {median:,.0f} img/s (windows {low:,.0f} to {high:,.0f})\n"
    )


def _examine(options: ThroughputOptions, console: rich.console.Console) -> None:
    old = load_report(options.compare) if options.compare else None
    report = examine(options.setting, options.img_s, options.seconds)
    table = report.to_table()
    print_report(report, console)
    differences = compare_reports(old, table) if old else []
    for text in list_differences(old, table) if old else []:
        console.print(Text.assemble(("not the same:", "yellow"), f" {text}"))
    for one in differences:
        console.print(f"{one.name}: {one.before:,.0f} -> {one.after:,.0f} img/s, "
                      f"{one.ratio:.2f}x: {one.verdict} (noise ±{one.noise:.0%})")  # fmt: skip
    report.save(options.out / NAME)
    write_page(options.out / "throughput.html", table)
    written = f"written: {options.out / NAME}, {options.out / 'throughput.html'}"
    console.print(written)
    if options.json:
        found = [dataclasses.asdict(one) | {"verdict": one.verdict} for one in differences]
        sys.stdout.write(json.dumps(table | {"changes": round_floats(found)}) + "\n")
    if has_regressed(differences):
        last = differences[-1]
        raise DuetError(
            f"the stream is slower than in {options.compare}: {last.before:,.0f} -> "
            f"{last.after:,.0f} img/s ({last.ratio:.2f}x, noise ±{last.noise:.0%})"
        )


def _tune(options: ThroughputOptions, console: rich.console.Console) -> None:
    def print_trial(trial: TuningTrial) -> None:
        what = ", ".join(f"{name} {value}" for name, value in trial.change.items())
        better = ": better" if trial.is_better else ""
        console.print(f"{what}: {trial.img_s.median:,.0f} img/s, {trial.ratio:.3f} times "
                      f"{trial.best.median:,.0f}{better}")  # fmt: skip

    tuned = tune(options.setting, print_trial)
    path = options.out / "tuning.toml"
    write_tuning(path, options.setting, tuned)
    change = ", ".join(f"{name} = {value}" for name, value in tuned.change.items())
    console.print(
        (f"{change}: {tuned.gain:.2f} times the default" if change else "the default is best")
        + f"; {len(tuned.trials)} trials in {tuned.seconds:.0f} s; written: {path}; "
        f"python -m cluster.train ... --tuning {path}",
        markup=False,
    )
    if options.json:
        facts: dict[str, Any] = {
            "tuning": tuned.change, "gain": tuned.gain, "seconds": tuned.seconds,
            "trials": [{"change": one.change, "img_s": one.img_s.median, "ratio": one.ratio,
                        "better": one.is_better} for one in tuned.trials],
        }  # fmt: skip
        sys.stdout.write(json.dumps(round_floats(facts)) + "\n")


def _plan(options: ThroughputOptions, console: rich.console.Console) -> None:
    assert options.img_s is not None
    path = options.measured or (Path(NAME) if Path(NAME).is_file() else None)
    report = load_report(path) if path else None
    if report and not options.measured and (origin := find_other_origin(report, options.data)):
        raise UsageError(
            f"{path} in this folder is of {origin}; use it all the same by --measured {path}, or "
            "measure anew: python -m pipeline.throughput DATA"
        )
    if options.data is not None and report is None:
        examined = examine(options.setting, seconds=options.seconds)
        examined.save(options.out / NAME)
        report = examined.to_table()
    answer = plan_capacity(
        report, gpus=options.gpus, img_s=options.img_s, store=options.store,
        gpus_per_node=options.gpus_per_node, images=options.images,
    )  # fmt: skip
    if path and report:
        text = f"from {path}: {report['data']['where']} on {report['machine']['processor']}"
        console.print(text)
    print_plan(answer, console)
    if options.json:
        sys.stdout.write(json.dumps(round_floats(dataclasses.asdict(answer))) + "\n")


if __name__ == "__main__":
    run(main)
