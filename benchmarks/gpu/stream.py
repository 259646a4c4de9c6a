"""Speed of the stream on a GPU, by setting, and a check of its pixels.

    python benchmarks/gpu/stream.py DATA [--raw RAWDATA] [--minutes 8]

Facts of the machine; pixels against the CPU's and against themselves; damaged images; a sweep
over threads, `hw_decoder_load`, batch and prefetch; ours and DALI's reader in turn; what exact
pixels cost; the parts alone; raw images. Everything is written to a JSON file and a table in OUT
as soon as it is measured, so that a run that is cut off keeps what it has. README.md beside this
file says how to read them. Exits with 1 if pixels are not what they should be, or
damage stops a stream.
"""

from __future__ import annotations

import faulthandler
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from parts import clock, copies, damage, lanes, machine, pixels, search, table
from parts.lanes import Lane, Setting
from parts.options import MIXED, Options, select_steps
from parts.record import Record

from pipeline.stream.config import Device
from pipeline.tools.errors import DuetError, run

EXACT = (0.0, 1.0)
"""Loads with which the batch does not decide where an image is decoded."""
HOST_SHARES = (0.25, 0.5, 0.75, 1.0)
OURS, NATIVE, RAW = 30_000, 0.95, 80_000
"""Goals on one H200 with 16 cores: img/s, of the native reader's, img/s of raw images."""
SHARES = {"sweep": 0.5, "turns": 0.62, "exact": 0.7, "bare": 0.8, "raw": 0.89, "raw turns": 0.96}
"""Part of the time that has gone when a step begins nothing new."""
GRACE = 120
"""Seconds beyond the time after which a process that hangs is ended."""


class Bench:
    """One run: each method is a step, and records its results."""

    def __init__(self, options: Options, record: Record, folder: Path) -> None:
        """Take the options and an empty folder for data sets made on the way."""
        self._options, self._record, self._folder = options, record, folder
        self._device: Device = options.device
        self._budget = clock.Budget(options.minutes)
        self._gauge = machine.Gauge() if self._device == "gpu" else None
        self._data = copies.repeat_data(options.data, folder / "data", options.samples)
        self._cores = record.found["machine"]["cores"]
        self.best = Setting(
            threads=options.threads or self._cores,
            load=options.load if self._gauge else 0.0,  # there are no engines on a CPU
            prefetch=options.prefetch,
            batch=options.batch,
        )
        self.goals: list[dict[str, Any]] = []

    def take(self, step: str) -> None:
        """Take a step; an error is recorded, so that the other steps follow."""
        try:
            getattr(self, step)()
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._say(f"{step}: {text}")
            self._judge(f"step {step} went to its end", False, text)
            clock.free_memory()

    def pixels(self) -> None:
        """Compare pixels with the CPU's and with themselves."""
        self._check("jpeg", self._data, (*EXACT, MIXED) if self._gauge else (self.best.load,))

    def damage(self) -> None:
        """Try damaged images."""
        loads = [*EXACT, MIXED] if self._gauge else [0.0]
        rows = damage.try_damage(self._options.data, self._device, loads)
        self._record.put("damage", rows)
        for load in loads:
            mine = [row for row in rows if row["load"] == load]
            went_on = sum(row.get("way") == "stream" and "error" not in row for row in mine)
            found = f"{went_on} of {len(damage.EDITS)}; exit code {mine[-1]['exit_code']}"
            name = f"streams go on past damaged images, load {load:g}"
            self._say(f"damage: {name}: {found}")
            self._judge(name, went_on == len(damage.EDITS), found)

    def sweep(self) -> None:
        """Search for the best setting."""
        axes = search.list_axes(self._device, self._cores)
        self.best = self._climb("sweep", self._data, self.best, axes)

    def turns(self) -> None:
        """Measure ours and the native reader in turn, with the best setting."""
        ours, native = self._in_turn("turns", self._data, self.best)
        self._goal(f"at least {OURS:,} img/s", clock.median(ours), OURS)
        self._goal(f"at least {NATIVE} of DALI's reader", clock.ratio(ours, native), NATIVE)

    def exact(self) -> None:
        """Measure the cost of pixels that do not depend on the batch."""
        if self._gauge is None:
            return
        names = {f"load {load:g}": load for load in (self.best.load, MIXED, *EXACT)}
        lane = partial(lanes.ours, self._data, self._device)
        several: dict[str, tuple[Lane, Setting]] = {
            name: (lane, replace(self.best, load=load)) for name, load in names.items()
        }
        self._together("exact", several, 3)

    def bare(self) -> None:
        """Measure the parts alone."""
        data, device = self._data, self._device
        loads = sorted({self.best.load, *EXACT}) if self._gauge else [self.best.load]
        parts: list[tuple[str, Lane, float]] = [
            ("feed alone", partial(lanes.feed_alone, data), self.best.load),
            ("graph from memory", partial(lanes.recipe, data, device), self.best.load),
        ]
        for load in loads:
            parts.append(("decode crop", partial(lanes.decode_alone, data, device, False), load))
            parts.append(("decode whole", partial(lanes.decode_alone, data, device, True), load))
        for share in HOST_SHARES:
            lane = partial(lanes.split, data, device, share)
            parts.append((f"graph, {share:.0%} on the host", lane, self.best.load))
        parts.append(
            ("nvImageCodec alone, whole", partial(lanes.codec, data, device), self.best.load)
        )
        if self._gauge:
            parts.append(("stream on the CPU", partial(lanes.ours, data, "cpu"), loads[0]))
        self._alone("bare", parts, self.best)

    def raw(self) -> None:
        """Measure pixels, sweep, turns and parts with raw images."""
        given = self._options.raw or copies.make_raw(self._options.data, self._folder / "raw-small")
        data = copies.repeat_data(given, self._folder / "raw", self._options.samples)
        if "pixels" not in self._options.skip:
            self._check("raw", data, (self.best.load,))
        axes = dict(search.list_axes(self._device, self._cores))
        axes.pop("load", None)
        best = self._climb("raw sweep", data, self.best, axes)
        ours, _ = self._in_turn("raw turns", data, best)
        self._goal(f"at least {RAW:,} img/s of raw images", clock.median(ours), RAW)
        graph = partial(lanes.recipe, data, self._device)
        feed = partial(lanes.feed_alone, data)
        self._alone(
            "raw parts",
            [("feed alone", feed, best.load), ("graph from memory", graph, best.load)],
            best,
        )

    def _check(self, encoding: str, data: Path, loads: tuple[float, ...]) -> None:
        samples = self._options.checked
        setting = replace(self.best, batch=max(1, min(self.best.batch, samples // 2)))
        host = pixels.read_pixels(data, "cpu", setting, samples)
        for load in loads:
            rows = pixels.compare(data, self._device, replace(setting, load=load), samples, host)
            for row in rows:
                self._record.add("pixels", {"set": encoding} | row)
            exact = not any(row["differing"] for row in rows[1:])
            to_cpu = (
                rows[0]["differing"] == 0 if encoding == "raw" else pixels.is_within_bounds(rows[0])
            )
            self._say(
                f"{encoding} pixels, load {load:g}: mean {rows[0]['mean']}, most "
                f"{rows[0]['max']} from the CPU; the same every time: {'yes' if exact else 'NO'}"
            )
            self._judge(
                f"{encoding} pixels, load {load:g}: those of the CPU", to_cpu, _apart(rows[:1])
            )
            if load in EXACT or encoding == "raw" or not self._gauge:
                name = f"{encoding} pixels, load {load:g}: the same every time"
                self._judge(name, exact, _apart(rows[1:]))

    def _judge(self, name: str, met: bool, found: str) -> None:
        self.goals.append({"goal": name, "found": found, "met": met, "check": True})
        self._record.put("goals", self.goals)

    def _goal(self, name: str, found: float, wanted: float) -> None:
        if self._gauge:
            text = f"{found:,.0f}" if wanted > 1 else f"{found:.3f}"
            self._say(f"goal: {name}; found {text}")
            self.goals.append({"goal": name, "found": text, "met": found >= wanted})
            self._record.put("goals", self.goals)

    def _climb(self, step: str, data: Path, start: Setting, axes: search.Axes) -> Setting:
        def rate(setting: Setting) -> float:
            lane = partial(lanes.ours, data, self._device)
            row = clock.measure_once(lane, setting, self._options.seconds, self._gauge)
            self._row(step, "ours", row)
            return float(row.get("img_s", 0))

        return search.climb(start, axes, rate, self._more(step.split()[0]))

    def _in_turn(self, step: str, data: Path, setting: Setting) -> tuple[Any, Any]:
        several: dict[str, tuple[Lane, Setting]] = {
            "ours": (partial(lanes.ours, data, self._device), setting),
            "native": (partial(lanes.native, data, self._device), setting),
        }
        found = self._together(step, several, self._options.rounds)
        return found["ours"], found["native"]

    def _together(self, step: str, several: dict[str, tuple[Lane, Setting]], rounds: int) -> Any:
        seconds = self._options.seconds
        found = clock.measure_turns(several, rounds, seconds, self._gauge, self._more(step))
        self._record.put(step, found)
        for name, rows in found.items():
            self._say(f"{step}: {name} {clock.median(rows):,.0f} img/s, {len(rows)} rounds")
        return found

    def _alone(self, step: str, parts: list[tuple[str, Lane, float]], setting: Setting) -> None:
        more = self._more(step)
        for name, lane, load in parts:
            if not more():
                self._say(f"{step}: no time left for {name} and what follows")
                return
            at = replace(setting, load=load)
            self._row(step, name, clock.measure_once(lane, at, self._options.seconds, self._gauge))

    def _row(self, step: str, lane: str, row: dict[str, Any]) -> None:
        self._record.add(step, {"lane": lane} | row)
        rate = f"{row['img_s']:>9,.0f} img/s" if "img_s" in row else row["error"]
        self._say(
            f"{step}: {lane}, threads {row['threads']}, load {row['load']:g}, batch "
            f"{row['batch']}, prefetch {row['prefetch']}: {rate}, cores {row.get('cores')}"
        )

    def _more(self, step: str) -> Callable[[], bool]:
        return self._budget.until(SHARES.get(step, 1.0))

    def _say(self, text: str) -> None:
        sys.stderr.write(text + "\n")


def _apart(rows: list[dict[str, Any]]) -> str:
    mean, most = (max(row[name] for row in rows) for name in ("mean", "max"))
    return f"mean {mean:g}, most {most:g} grey levels"


def main() -> None:
    """Take the steps, and print the paths of the results."""
    options = tyro.cli(Options, prog="python benchmarks/gpu/stream.py", description=__doc__)
    steps = select_steps(options)
    # Lanes that only decode have no use for flips and means.
    warnings.filterwarnings("ignore", "The external source node")
    faulthandler.dump_traceback_later(options.minutes * 60 + GRACE, exit=True)
    command = shlex.join(["python", "benchmarks/gpu/stream.py", *sys.argv[1:]])
    record = Record(options.out, machine.facts(options.device), command, table.markdown)
    sys.stderr.write(f"results: {record.path.with_suffix('.md')}\n")
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        bench = Bench(options, record, Path(folder))
        for step in steps:
            bench.take(step)
    record.put("finished", True)
    faulthandler.cancel_dump_traceback_later()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if wrong := [goal["goal"] for goal in bench.goals if goal.get("check") and not goal["met"]]:
        raise DuetError(f"not so: {'; '.join(wrong)}; see {record.path}")


if __name__ == "__main__":
    run(main)
