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
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.checkpoint.format import choose_checkpoint
from cluster.checkpoint.loader import identify_run, resolve_init
from cluster.checkpoint.storage import claim_store, find_last_step, open_storage
from cluster.cli.options import TrainOptions
from cluster.config import DESIGN_TYPES, LENGTH, TYPES, Config, fit_images, load_settings
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
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, identity
from pipeline.dataset.record import ADDRESS_KEY
from pipeline.remote.dataset import format_address, locate_dataset, open_dataset
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.remote.local import Dataset
from pipeline.stream.mixture import fit_config
from pipeline.stream.operators import require_dali
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.arguments import format_command, parse_options
from pipeline.tools.errors import DataError, Interrupted, UsageError, run
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
    if first.tuning is not None:
        table |= load_settings(first.tuning)
    given = {word.split("=")[0] for word in user}
    if given & {f"--{name}" for name in LENGTH}:  # the file's other length must not win
        table = {key: value for key, value in table.items() if key not in LENGTH}
    raw = _parse(user, replace(first, settings=_fill_settings(table)))
    try:
        settings = Config.from_settings(raw.settings.to_settings())
    except ValueError as error:
        raise UsageError(f"{error} ({raw.config} and the flags given)") from error
    return replace(raw, settings=settings, words=tuple(user))


def _parse(words: list[str], default: TrainOptions | None = None) -> TrainOptions:
    return parse_options(_UncheckedOptions, words, "python -m cluster.train", default)


def _fill_settings(table: dict[str, Any]) -> _UncheckedConfig:
    """Return the settings of a file, unchecked: the defaults of the flags."""
    # A number of hundreds of digits is infinite as a text, and an error as a whole number.
    table = {key: float(str(one)) if TYPES[key] is float else one for key, one in table.items()}
    design = {key: table.pop(key) for key in list(table) if key in DESIGN_TYPES}
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
    dataset = open_dataset(command.data, **config.cached)
    manifest = Manifest.load(dataset.folder)
    manifest.split("train", dataset.folder)
    config = fit_images(config, manifest.side, command.data)
    command = replace(command, settings=config)
    with closing(dataset):
        check_data(command, manifest, dataset)
    if not is_remote(command.data):
        command = replace(command, data=str(dataset.folder.resolve()))
    with lock_run(folder), RunConsole() as screen:
        if command.measure:
            from cluster.launch.measurement import measure_with_ray

            with start_ray(config, screen) as read_output:
                measure_with_ray(config, command.data, folder, screen, read_output)
        else:
            data_sha256 = identity(dataset.folder)
            train_run(command, data_sha256, manifest, screen, trainer or train_with_ray)
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
    data_sha256: str,
    manifest: Manifest,
    screen: RunConsole,
    trainer: Trainer,
) -> None:
    """Train the run in RUN to its end, unless it is finished.

    Args:
        command: checked command, with absolute paths in the settings and of the data set.
        data_sha256: identity of the data set.
        manifest: manifest of the data set.
        screen: prints lines and events.
        trainer: trains.

    Raises:
        DuetError: the run in RUN has other settings, or the training failed.
        Interrupted: the user ended it.
    """
    config, folder = command.settings, command.run.resolve()
    samples = manifest.splits["train"].samples
    name, _ = identify_run(folder, config, data_sha256, samples)
    with claim_store(folder, config.store, name, screen.say):
        ready = prepare_run(command, data_sha256, manifest, screen, name)
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
                    f"{count:,} damaged {images} replaced by others; "
                    f"{command.run / QUARANTINE} lists them"
                )


def prepare_run(
    command: TrainOptions, data_sha256: str, manifest: Manifest, screen: RunConsole, name: str
) -> Config | None:
    """Bring RUN to the state of its store, and write its settings.

    Args:
        command, data_sha256, manifest, screen: arguments of `train_run`.
        name: name of the run, for which its store is claimed.

    Returns:
        The settings to train with; None if the run is finished.

    Raises:
        DuetError: the run in RUN has other settings.
    """
    config, folder = command.settings, command.run.resolve()
    samples = manifest.splits["train"].samples
    step, total = find_last_step(folder, config.store), config.total_steps(samples)
    mirror = open_mirror(folder, config.store)
    # Without a checkpoint the rows in the store may be another run's.
    if mirror and (step or not read_run_id(folder)) and (fetched := mirror.restore()):
        screen.say(f"fetched from {hide_credentials(config.store)}: {', '.join(fetched)}")
    name, config = identify_run(folder, config, data_sha256, samples, name)
    if config.init and not step:
        config, said = resolve_init(config, len(manifest.classes), screen.show)
        screen.say(said)
    origin = {
        ADDRESS_KEY: format_address(command.data),
        "config": clean(str(command.config)),
        "command": format_command("python -m cluster.train", command.words),
        "commit": find_commit(),
    }
    write_run_config(folder, config, data_sha256, samples, step, name, origin)
    if step >= total and has_sound_checkpoint(folder, config.store, total, screen):
        screen.say(f"{command.run} is finished: step {step} of {total}; nothing to do")
        return None
    screen.say(summarize(command, manifest, total))
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


def summarize(command: TrainOptions, manifest: Manifest, total: int) -> str:
    """Describe the run in two lines."""
    config = command.settings
    images = manifest.splits["train"].samples
    return (
        f"{command.config} -> {command.run}\n"
        f"{images:,} images, {len(manifest.classes)} classes; width {config.design.width:g}, "
        f"batch {config.batch_size}, "
        f"{total:,} steps = {total * config.batch_size / images:.1f} epochs"
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
