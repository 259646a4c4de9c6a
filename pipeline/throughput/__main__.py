"""Find the bottleneck of the stream, each stage's distance from its limit, and what would help.

    python -m pipeline.throughput DATA [--device cpu|gpu] [--img-s N] [--tune] [--compare OLD.json]
    python -m pipeline.throughput DATA --rate [--reader stream|native]
    python -m pipeline.throughput [DATA] --loader MODULE:FUNCTION [--img-s N]
    python -m pipeline.throughput --plan --gpus N --img-s N --store-kind s3 [--measured FILE.json]

The first form measures every stage alone against the limits of this machine, then the stream,
names its bottleneck and the gain of each change, and writes throughput.json and throughput.html.
`--rate` measures the stream alone, or DALI's own reader as the yardstick; `--loader` any iterable
of batches.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import rich.console
from rich.text import Text

from pipeline.dataset.versions import parse_version
from pipeline.options import ThroughputOptions
from pipeline.remote.dataset import is_streamed
from pipeline.stream.operators import require_dali
from pipeline.throughput.capacity import plan_capacity, print_plan
from pipeline.throughput.diagnosis import examine
from pipeline.throughput.foreign_loader import examine_loader, print_loader_report
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
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import DuetError, SetupError, UsageError, run
from pipeline.tools.terminal import Terminal
from pipeline.tools.units import parse_size

NAME = "throughput.json"


def make_setting(options: ThroughputOptions) -> Setting:
    """Return the stream that is measured.

    Raises:
        UsageError: a setting is out of range.
    """
    data = options.data or ""
    try:
        return Setting(
            data=data, version=parse_version(options.data_version, "--data-version"),
            split=options.split, device=options.device, window=options.window,
            shuffle=options.shuffle or ("block" if is_streamed(data) else "full"),
            batch_size=options.batch_size, threads=options.threads, prefetch=options.prefetch,
            hw_decoder_load=options.hw_decoder_load, cache=options.cache,
            cache_size=parse_size(options.cache_size),
        ).fit_crop()  # fmt: skip
    except ValueError as error:
        raise UsageError(f"{error}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(ThroughputOptions, argv, "python -m pipeline.throughput")
    options.check()
    console = Terminal(sys.stderr)
    if options.data or not (options.plan or options.loader):
        require_dali()
    try:
        if options.plan:
            _plan(options, console)
        elif options.loader:
            _measure_loader(options, options.loader, console)
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
    setting, reader = make_setting(options), options.reader
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


def _measure_loader(options: ThroughputOptions, name: str, console: rich.console.Console) -> None:
    setting = make_setting(options) if options.data else None
    report = examine_loader(name, setting, options.img_s, options.seconds)
    print_loader_report(report, console)
    if options.json:
        sys.stdout.write(json.dumps(round_floats(report.to_table())) + "\n")


def _examine(options: ThroughputOptions, console: rich.console.Console) -> None:
    old = load_report(options.compare) if options.compare else None
    report = examine(make_setting(options), options.img_s, options.seconds)
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

    tuned = tune(make_setting(options), print_trial)
    path = options.out / "tuning.toml"
    write_tuning(path, make_setting(options), tuned)
    change = ", ".join(f"{name} = {value}" for name, value in tuned.change.items())
    console.print(
        (f"{change}: {tuned.gain:.2f} times the default" if change else "the default is best")
        + f"; {len(tuned.trials)} trials in {tuned.seconds:.0f} s; written: {path}; "
        f"duet train ... --tuning {path}",
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
            "measure anew: duet throughput DATA"
        )
    if options.data is not None and report is None:
        examined = examine(make_setting(options), seconds=options.seconds)
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
