"""Trains both columns, or resumes the run in RUN.

    python -m cluster.train CONFIG --data DATA --run RUN [--steps N] [flags override the file]

Starts a Ray on this machine, reachable from this machine only, unless RAY_ADDRESS names one
(`ray job submit` sets it). Files in RUN: see `cluster.run.folder`.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.checkpoint.format import choose_checkpoint, read_newest_table
from cluster.checkpoint.loader import identify_run, resolve_init
from cluster.checkpoint.storage import claim_store, find_last_step, open_storage
from cluster.cli.options import TrainOptions
from cluster.config import (
    DESIGN_TYPES,
    LENGTH,
    TYPES,
    Config,
    fit_images,
    load_network,
    load_settings,
)
from cluster.launch.session import is_attached, ray_session, refuse_relative
from cluster.run.console import RunConsole
from cluster.run.folder import (
    CONFIG,
    QUARANTINE,
    find_commit,
    lock_run,
    read_run_id,
    write_run_config,
)
from cluster.run.jsonl import count_rows
from cluster.run.sync import open_mirror
from cluster.run.trackers import require_trackers
from model.architecture import Design, build_stages
from model.layer_table import parse_layers
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, find_root, identity
from pipeline.dataset.record import ADDRESS_KEY
from pipeline.dataset.segments import (
    Segment,
    Segments,
    append_version,
    count_epochs,
    parse_segments,
)
from pipeline.dataset.versions import LATEST
from pipeline.remote.dataset import format_address, locate_dataset, open_dataset
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.remote.local import Dataset
from pipeline.stream.mixture import fit_config
from pipeline.stream.operators import require_dali
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.arguments import format_command, parse_options
from pipeline.tools.errors import DataError, DuetError, Interrupted, UsageError, run
from pipeline.tools.text import clean, hide_credentials

Trainer = Callable[[Config, str, Path, RunConsole], None]


# Read without the checks: a value that cannot work gets a one-line message, not tyro's box.
@dataclass(frozen=True, kw_only=True)
class _UncheckedDesign(Design):
    __doc__ = Design.__doc__

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _UncheckedConfig(Config):
    __doc__ = Config.__doc__
    design: Annotated[_UncheckedDesign, tyro.conf.OmitArgPrefixes] = field(
        default_factory=_UncheckedDesign
    )
    """The network."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _UncheckedOptions(TrainOptions):
    __doc__ = TrainOptions.__doc__
    settings: Annotated[_UncheckedConfig, tyro.conf.OmitArgPrefixes]


def parse_command(argv: Sequence[str]) -> TrainOptions:
    """Read the command line and the config file it names.

    Raises:
        UsageError: the file is missing or wrong, or a setting is; one line.
        SystemExit: code 0 after --help.
    """
    user = list(argv)
    first = _parse(user)
    table = load_settings(first.config)
    if first.layers is not None:
        other = {*DESIGN_TYPES, "milestones"}  # results of CONFIG's network, which is another
        table = {key: value for key, value in table.items() if key not in other}
        table |= load_network(first.layers)
    if first.tuning is not None:
        table |= load_settings(first.tuning)
    given = {word.split("=")[0] for word in user}
    if given & {f"--{name}" for name in LENGTH}:  # the file's other length must not win
        table = {key: value for key, value in table.items() if key not in LENGTH}
    raw = _parse(user, replace(first, settings=_fill_settings(table)))
    try:
        settings = Config.from_settings(raw.settings.to_settings())
    except ValueError as error:
        files = raw.config if raw.layers is None else f"{raw.config}, {raw.layers}"
        raise UsageError(f"{error} ({files} and the flags given)") from error
    return replace(raw, settings=settings, words=tuple(user))


def _parse(words: list[str], default: TrainOptions | None = None) -> TrainOptions:
    return parse_options(_UncheckedOptions, words, "python -m cluster.train", default)


def _fill_settings(table: dict[str, Any]) -> _UncheckedConfig:
    """Return the settings of a file, unchecked: the defaults of the flags."""
    # A number of hundreds of digits is infinite as a text, and an error as a whole number.
    table = {key: float(str(one)) if TYPES[key] is float else one for key, one in table.items()}
    design = {key: table.pop(key) for key in list(table) if key in DESIGN_TYPES}
    if design.get("layers"):
        design["layers"] = parse_layers(design["layers"])
    return _UncheckedConfig(design=_UncheckedDesign(**design), **table)


def main(argv: list[str] | None = None, trainer: Trainer | None = None) -> int:
    """Run the command.

    Args:
        argv: words after the command's name.
        trainer: trains once all is checked; default `train_with_ray`.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    command = parse_command(sys.argv[1:] if argv is None else argv)
    _check_paths(command)
    command = replace(command, settings=resolve_paths(command.settings))
    config, folder = command.settings, command.run.resolve()
    command = replace(command, data=command.data or find_data(command))
    dataset, segments = choose_segments(command)
    manifest = Manifest.load(dataset.folder)
    config = fit_images(config, manifest.side, command.data)
    command = replace(command, settings=config)
    with closing(dataset):
        check_data(command, manifest, dataset)
    if not is_remote(command.data):
        command = replace(command, data=str(find_root(local_path(command.data)).resolve()))
    with lock_run(folder), RunConsole() as screen:
        if command.measure:
            from cluster.launch.measurement import measure_with_ray

            with start_ray(config, screen) as read_output:
                measure_with_ray(config, command.data, folder, screen, read_output)
        else:
            train_run(command, segments, manifest, screen, trainer or train_with_ray)
    return 0


def _check_paths(command: TrainOptions) -> None:
    """Refuse paths that a submitted job would not find, or would lose with its copy of the code."""
    settings = command.settings
    if command.data:
        refuse_relative("DATA", command.data, missing=True)
    refuse_relative("--store" if settings.store else "--run", settings.store or command.run)
    if settings.init:
        refuse_relative("--init", settings.init, missing=True)


def find_data(command: TrainOptions) -> str:
    """Return the data set of the run that is resumed, as RUN or the copy of it in its store has it.

    Raises:
        UsageError: there is no run yet, or its data set is not known or not where it was.
        StoreError: a store does not answer.
    """
    config = command.settings
    if (command.run / CONFIG).is_file():
        return locate_dataset(command.run, **config.cached)[0]
    with tempfile.TemporaryDirectory(prefix="duet-run-") as scratch:
        mirror = open_mirror(Path(scratch), config.store)
        if mirror is None or not mirror.fetch(CONFIG):
            raise UsageError(f"{command.run} holds no run yet; give its data set by --data")
        return locate_dataset(command.run, record=Path(scratch), **config.cached)[0]


def choose_segments(command: TrainOptions) -> tuple[Dataset, Segments]:
    """Open the version of the data set that the run goes on with, and return all that it reads.

    A new run begins with the newest version, or the one that is named; one with a checkpoint keeps
    its own, and with `latest` goes on with a newer one at the next border of an epoch.

    Raises:
        UsageError: no data set, no such version, or a newer one of other classes or images.
        StoreError: a store does not answer.
    """
    wanted = command.settings.version
    table = _read_checkpoint(command)
    if table is None:
        return _open_version(command, wanted)
    first = str(table.get("data_sha256", ""))
    segments = parse_segments(rows) if (rows := table.get("segments")) else ()
    own = segments[-1].version if segments else first
    try:
        dataset, whole = _open_version(command, own or None)
    except UsageError:  # another data set: the settings of the run are compared below
        return _open_version(command, wanted)
    segments = segments or whole
    if wanted is None:
        return dataset, segments
    newer, (there,) = _open_version(command, wanted)
    version, old = there.version, Manifest.load(dataset.folder)
    if wanted != LATEST and version != own:
        number = Manifest.load(newer.folder).number
        raise UsageError(
            f"{command.run} reads version {old.number} of {command.data}, not {number}; give "
            "--data-version latest to go on with the newest, or another --run"
        )
    if version == segments[-1].version:
        newer.close()
        return dataset, segments
    _refuse_unlike(command, old, Manifest.load(newer.folder))
    dataset.close()
    return newer, append_version(segments, int(table["position"]), version, there.samples)


def _read_checkpoint(command: TrainOptions) -> dict[str, Any] | None:
    """Return the table of the newest checkpoint of a run; None if there is none that is known."""
    with suppress(OSError, DuetError):  # whoever resumes from it says more
        return read_newest_table(open_storage(command.run.resolve(), command.settings.store))
    return None


def _open_version(
    command: TrainOptions, version: int | str | None
) -> tuple[Dataset, tuple[Segment]]:
    """Open a version, and return it with the one segment of a run that reads it alone."""
    dataset = open_dataset(command.data, version=version, **command.settings.cached)
    samples = Manifest.load(dataset.folder).split("train", dataset.folder).samples
    return dataset, (Segment(identity(dataset.folder), samples),)


def _refuse_unlike(command: TrainOptions, old: Manifest, new: Manifest) -> None:
    """Refuse a newer version that the network of the run cannot go on with.

    Raises:
        UsageError: its classes, or the size of its images, are others.
    """
    for what, mine, others in (
        ("classes", old.classes, new.classes), ("images", old.side, new.side)
    ):  # fmt: skip
        if mine != others:
            raise UsageError(
                f"version {new.number} of {command.data} has other {what} than version "
                f"{old.number}, which {command.run} reads; leave --data-version latest out, or "
                "begin another --run"
            )


def resolve_paths(config: Config) -> Config:
    """Return the config with absolute paths: other processes read RUN/config.toml, too."""
    cache, store = config.cache, config.store
    if cache:
        cache = str(Path(cache).resolve())
    if store and not is_remote(store):
        store = str(local_path(store).resolve())
    try:
        return replace(config, cache=cache, store=store)
    except ValueError as error:  # of the working folder
        raise UsageError(str(error)) from error


def train_run(
    command: TrainOptions,
    segments: Segments,
    manifest: Manifest,
    screen: RunConsole,
    trainer: Trainer,
) -> None:
    """Train the run in RUN to its end, unless it is finished.

    Args:
        command: checked command, with absolute paths in the settings and of the data set.
        segments: versions of the data set that the run reads.
        manifest: manifest of the last of them.
        screen: prints lines and events.
        trainer: trains.

    Raises:
        DuetError: the run in RUN has other settings, or the training failed.
        Interrupted: the user ended it.
    """
    config, folder = command.settings, command.run.resolve()
    name, _ = identify_run(folder, config, segments[0].version, segments)
    with claim_store(folder, config.store, name, screen.say):
        ready = prepare_run(command, segments, manifest, screen, name)
        if ready is None:
            return
        try:
            trainer(ready, command.data, folder, screen)
        except KeyboardInterrupt as error:
            step = find_last_step(folder, config.store)
            screen.say(f"stopped; the same command resumes from step {step}")
            raise Interrupted from error
        finally:
            if count := count_rows(folder / QUARANTINE):
                images = "image was" if count == 1 else "images were"
                screen.say(
                    f"{count:,} damaged or withdrawn {images} replaced by others; "
                    f"{command.run / QUARANTINE} lists them"
                )


def prepare_run(
    command: TrainOptions, segments: Segments, manifest: Manifest, screen: RunConsole, name: str
) -> Config | None:
    """Bring RUN to the state of its store, and write its settings.

    Args:
        command, segments, manifest, screen: arguments of `train_run`.
        name: name of the run, for which its store is claimed.

    Returns:
        The settings to train with; None if the run is finished.

    Raises:
        DuetError: the run in RUN has other settings.
    """
    config, folder = command.settings, command.run.resolve()
    step, total = find_last_step(folder, config.store), config.total_steps(segments)
    mirror = open_mirror(folder, config.store)
    # Without a checkpoint the rows in the store may be another run's.
    if mirror and (step or not read_run_id(folder)) and (fetched := mirror.restore()):
        screen.say(f"fetched from {hide_credentials(config.store)}: {', '.join(fetched)}")
    name, config = identify_run(folder, config, segments[0].version, segments, name)
    if config.init and not step:
        config, said = resolve_init(config, len(manifest.classes), screen.show)
        screen.say(said)
    origin = {
        ADDRESS_KEY: format_address(command.data),
        "config": clean(str(command.config)),
        "command": format_command("python -m cluster.train", command.words),
        "commit": find_commit(),
    }
    write_run_config(folder, config, segments[0].version, segments, step, name, origin)
    if step >= total and has_sound_checkpoint(folder, config.store, total, screen):
        screen.say(f"{command.run} is finished: step {step} of {total}; nothing to do")
        return None
    screen.say(summarize(command, manifest, segments, total))
    return config


def check_data(command: TrainOptions, manifest: Manifest, dataset: Dataset) -> None:
    """Check the data set and settings, which the workers would refuse half a minute later.

    Raises:
        UsageError: there are no classes or no validation images, some are too small, or the network
            cannot be.
        DataError: a file of the data set is missing or damaged.
        SetupError: a package is missing.
    """
    if not manifest.classes:
        raise UsageError(
            f"data set {command.data} has no classes to train for: it was built with --no-labels; "
            "build it from images with labels"
        )
    if command.settings.validate_every and "val" not in manifest.splits:
        raise UsageError(
            f"data set {command.data} has no split 'val'; build it with --val or --holdout, "
            "or train with --validate-every 0"
        )
    for split in ("train", "val") if command.settings.validate_every else ("train",):
        fit_config(command.settings.stream, ShardReader(dataset, split))
    open_storage(command.run, command.settings.store)
    require_trackers(command.settings)
    if not is_attached():
        require_dali()
    Statistics.load(dataset.folder, manifest)
    try:
        build_stages(len(manifest.classes), command.settings.design)
    except ValueError as error:
        raise UsageError(f"{error} ({command.config} and the flags given)") from error


def has_sound_checkpoint(folder: Path, store: str, total: int, screen: RunConsole) -> bool:
    """Return whether the last checkpoint of a run that looks finished is undamaged."""
    try:
        return choose_checkpoint(folder, store, screen.show).mark.step >= total
    except DataError:
        return False  # the workers report it


def summarize(command: TrainOptions, manifest: Manifest, segments: Segments, total: int) -> str:
    """Describe the run in two lines."""
    config, images = command.settings, segments[-1].samples
    epochs = float(count_epochs(segments, total * config.batch_size))
    about = ""
    if len(segments) > 1:
        about = f" of version {manifest.number} from epoch {segments[-1].epoch} on"
    return (
        f"{command.config} -> {command.run}\n"
        f"{images:,} images{about}, {len(manifest.classes)} classes; "
        f"width {config.design.width:g}, batch {config.batch_size}, "
        f"{total:,} steps = {epochs:.1f} epochs"
    )


def train_with_ray(config: Config, data: str, folder: Path, screen: RunConsole) -> None:
    """Train on a Ray of this command's own, or on the one that RAY_ADDRESS names.

    Raises:
        DuetError: the run failed.
    """
    from cluster.launch.controller import Controller

    with start_ray(config, screen) as read_output:
        Controller(config, data, folder, screen, read_output).train()


@contextmanager
def start_ray(config: Config, screen: RunConsole) -> Iterator[Callable[[], str]]:
    """Start or attach to a Ray for the workers; yields a function that returns its stdout.

    Raises:
        NoRoom: there is no RAY_ADDRESS, and this machine has no room for the workers.
        SetupError: Ray cannot be started or reached, or torch cannot use this machine's GPUs.
    """
    from cluster.launch.gpus import count_gpus
    from cluster.launch.placement import check_this_machine

    workers, gpus = 1, None
    if is_attached():
        screen.wait("attaching to Ray and starting the workers")
    else:
        gpus = count_gpus(config.device)
        workers, warning = check_this_machine(config, gpus)
        if warning:
            screen.say(f"warning: {warning}")
        screen.wait("starting Ray and the workers")
    output = io.StringIO()
    with redirect_stdout(output), ray_session(workers, gpus):
        yield output.getvalue


if __name__ == "__main__":
    run(main)
