"""The whole measurement: every stage, the stream, its bottleneck, and a verdict in words."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from pipeline.dataset.manifest import identity
from pipeline.options import ThroughputOptions
from pipeline.remote.dataset import is_streamed
from pipeline.stream.config import MAX_THREADS
from pipeline.stream.timing import WaitTimes
from pipeline.throughput import stages
from pipeline.throughput.clock import OTHERS, Rate, StageRow, make_row
from pipeline.throughput.hardware import describe_machine
from pipeline.throughput.model import (
    MEANING,
    Bound,
    Costs,
    Remedy,
    StreamState,
    find_knee,
    list_bounds,
    list_remedies,
    predict_rate,
    sweep_threads,
)
from pipeline.throughput.report import ThroughputReport
from pipeline.throughput.stages import Parts, Setting, StageRates, open_parts
from pipeline.throughput.stream_rate import FetchRate, StreamRate, measure_fetching, measure_stream
from pipeline.tools.progress import Progress
from pipeline.tools.units import available_memory

ENOUGH = 1.1
"""Stream over trainer, in images per second, above which the trainer never waits (AU >= 90 %)."""


def write_verdict(
    *, state: str, img_s: float, bounds: Sequence[Bound], stages: Sequence[StageRow],
    remedies: Sequence[Remedy], needed: float | None,
) -> str:  # fmt: skip
    """Return a paragraph: the bottleneck of the stream, the next one, and the best remedy."""
    first, second = bounds[0], bounds[1]
    text = [
        f"{state} this stream gives {img_s:,.0f} img/s. It is bound by "
        f"{MEANING[first.name]} ({first.img_s:,.0f} img/s: {first.detail or 'measured'})"
        + _describe_largest(first, stages)
        + ".",
        f"The next bound is {MEANING[second.name]} at {second.img_s:,.0f} img/s, "
        f"{second.img_s / first.img_s:.2f} times the first: more than that, lifting the first "
        "alone cannot gain.",
    ]
    if needed:
        share = img_s / needed
        text.append(
            f"A trainer that takes {needed:,.0f} img/s gets {share:.2f} times that, "
            + ("enough." if share >= ENOUGH else "just enough." if share >= 1 else
               f"and would stand still {1 - share:.0%} of the time.")
        )  # fmt: skip
    text.append(_describe_help([one for one in remedies if one.is_worth]))
    return " ".join(text)


def _describe_help(worth: Sequence[Remedy]) -> str:
    """Say which change helps most; what rests on unsteady measurements is no promise."""
    if best := next((one for one in worth if one.sure), None):
        return (f"What helps most: {best.name}, {best.change}: predicted {best.img_s:,.0f} img/s, "
                f"{best.gain:.2f} times as much.")  # fmt: skip
    if worth:
        names = ", ".join(f"{one.name} ({one.change})" for one in worth)
        return (f"What would help cannot be told: the rates were not steady enough. It may be "
                f"{names}; measure again when less runs here, or try it with --tune.")  # fmt: skip
    return "None of the settings would change that by more than 3 %; more cores would."


def _describe_largest(bound: Bound, stages: Sequence[StageRow]) -> str:
    decode = next((row.share for row in stages if row.name == "decode"), None)
    if bound.name in ("the pixels", "the processors") and decode:
        return (f"; decoding alone reaches {decode:.0%} of what the bare decoder does "
                "on this machine")  # fmt: skip
    if bound.parts:
        name, seconds = max(bound.parts.items(), key=lambda part: part[1])
        return f"; most of it is {name}, {seconds / sum(bound.parts.values()):.0%}"
    return ""


def list_warnings(rows: Sequence[StageRow]) -> list[str]:
    """Return a line for each reason to doubt the figures: unsteady rates, other processes."""
    found = []
    if unsteady := [row for row in rows if not row.steady]:
        names = ", ".join(f"{row.name} (±{row.spread:.0%})" for row in unsteady)
        found.append(f"not steady: {names}")
    if busy := [row for row in rows if row.others > OTHERS]:
        most = max(row.others for row in busy)
        found.append(
            f"other programs used up to {most:.0%} of this machine while "
            f"{', '.join(row.name for row in busy)} {'was' if len(busy) == 1 else 'were'} measured"
        )
    return found


POINTS = 400
"""Most points of the chart of the queue."""


def examine(
    setting: Setting, needed: float | None = None, seconds: float = ThroughputOptions.seconds,
    extra: Sequence[StageRow] = (),
) -> ThroughputReport:  # fmt: skip
    """Measure the stream of a setting, stage by stage and as a whole.

    Args:
        setting: settings of the stream.
        needed: images per second that the trainer takes, if known.
        seconds: measuring time of each stage.
        extra: rows measured elsewhere, for the same report.

    Raises:
        DuetError: as `Stream` does.
    """
    with open_parts(setting) as parts, Progress("examining", total=6, unit="parts") as progress:
        fetched = measure_fetching(setting, 2 * seconds) if is_streamed(setting.data) else None
        progress.advance(1)
        batches = max(1, min(len(parts.shard_reader) // setting.batch_size, 160))
        alone = stages.measure_stages(parts, seconds, batches)
        progress.advance(1)
        most = max(setting.cores, setting.threads)  # more is for --tune, which measures it
        counts = [count for count in list_thread_counts(setting) if count <= most]
        costs = sweep_threads(parts, alone, counts, seconds)
        progress.advance(1)
        parts.touch(round(predict_rate(costs) * 4 * seconds))
        found = measure_stream(setting, 2 * seconds)
        progress.advance(1)
        now = find_state(parts, alone, costs, found, fetched)
        helping = list_remedies(now, seconds)
        progress.advance(2)
    return _make_report(now, found, helping, needed, fetched, extra)


def list_thread_counts(setting: Setting) -> list[int]:
    """Return the thread counts to measure, in ascending order."""
    have = setting.cores
    counts = {1, setting.threads, max(1, have // 4), max(1, have // 2), have, have * 3 // 2}
    return sorted({min(count, MAX_THREADS) for count in counts})


def find_state(
    parts: Parts, alone: StageRates, costs: Costs, found: StreamRate, fetched: FetchRate | None
) -> StreamState:
    """Return where the data set is read from most of the time, and the rate of the stream then."""
    fits = sum(shard.bytes for shard in parts.shard_reader.shards) < available_memory()
    cold, slow, read = alone.cold, costs, alone.warm
    state = "From the page cache"
    if fetched is not None:
        store = fetched.together / parts.bytes_each
        slow = replace(costs, store=store, fetch_cpu=fetched.cpu / store)
        state = "In its first epoch, from the store,"
    elif not fits and cold is not None:
        slow = replace(costs, reader=cold.seconds, reader_cpu=min(1.0, cold.cpu))
        read, state = cold, "From the disk (it is larger than memory)"
    gives = found.rate.median * predict_rate(slow) / predict_rate(costs)
    return StreamState(parts=parts, alone=alone, costs=slow, reading=read, img_s=gives, fits=fits,
                       state=state, rate=found.rate)  # fmt: skip


def _make_report(
    now: StreamState, found: StreamRate, helping: Sequence[Remedy], needed: float | None,
    fetched: FetchRate | None, extra: Sequence[StageRow],
) -> ThroughputReport:  # fmt: skip
    parts = now.parts
    setting, each = parts.setting, parts.bytes_each
    rows = (*now.alone.stages, *extra)
    if fetched is not None:
        rows = (_fetch_row(fetched, each), *rows)
    decode = next((one.limit_img_s for one in rows if one.name == "decode"), None)
    total = make_row("the whole stream", found.rate, each, limit=decode,
                     against="the bare decoder" if decode else "")  # fmt: skip
    scale = now.img_s / predict_rate(now.costs)
    lowest = [replace(one, img_s=one.img_s * scale) for one in list_bounds(now.costs)]
    span = found.batches[-1].at if found.batches else 1.0
    thin = max(1, len(found.batches) // POINTS)
    counts = now.costs.pixels
    return ThroughputReport(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "pipeline.throughput", *sys.argv[1:]]),
        machine=describe_machine(setting.device == "gpu"),
        data={
            "where": setting.data, "pictures": len(parts.shard_reader), "encoding": parts.encoding,
            "bytes": sum(shard.bytes for shard in parts.shard_reader.shards), "fits": now.fits,
            "sha256": identity(parts.dataset.folder),
        },
        setting=asdict(setting),
        stages=rows,
        whole=total,
        waits={name: sum(getattr(one.waited, name) for one in found.batches) / span
               for name in vars(WaitTimes())},
        read_full=found.read_full, read_empty=found.read_empty,
        queue=tuple((one.at, one.read, int(one.decoded)) for one in found.batches[::thin]),
        sweep={
            count: (counts[count].median, predict_rate(replace(now.costs, threads=count)))
            for count in sorted(counts)
        },
        knee=find_knee(now.costs),
        bounds=tuple((one.name, one.img_s, one.detail) for one in lowest),
        state=now.state, img_s=now.img_s, model=1 / scale,
        remedies=tuple(helping),
        verdict=write_verdict(state=now.state, img_s=now.img_s, bounds=lowest, stages=rows,
                              remedies=helping, needed=needed),
        needed=needed,
        warnings=tuple(list_warnings([*rows, total])),
    )  # fmt: skip


def _fetch_row(fetched: FetchRate, each: float) -> StageRow:
    rate = Rate((fetched.together / each,), fetched.cpu, fetched.others)
    note = f"several at a time, checked; one alone: {fetched.alone / 1e6:,.0f} MB/s"
    return make_row("fetch from the store", rate, each, note=f"{fetched.shards} shards, {note}")
