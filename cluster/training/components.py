"""Components of a training in one process: network, optimizer, stream, log, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoint.loader import list_layers, load_init
from cluster.checkpoint.memory import Memory
from cluster.checkpoint.writer import CheckpointManager
from cluster.config import Config
from cluster.config.milestones import CLASSES
from cluster.mesh import ProcessMesh
from cluster.run.events import Publish, Tell, Warned
from cluster.run.folder import LEDGER, QUARANTINE, UNKNOWN, Mark, RunIdentity
from cluster.run.metrics import MetricsLog
from cluster.run.sync import open_mirror
from cluster.run.trackers import open_trackers
from cluster.training.gradients import GradientAverage, GradientTree
from cluster.training.learning_rate import RateControl, RateSettings
from cluster.training.pair_batches import PairBatches
from cluster.training.passes import CudaGraph
from cluster.training.precision import compute_dtype, count_threads
from cluster.training.step import TrainStep
from model.alexnet import AlexNet
from model.column_threads import ColumnThreads
from model.exchange import Exchange
from model.optimizer import Sgd2012
from model.schedule import parse_layer_rates
from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, identity
from pipeline.dataset.segments import Segment, Segments
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.text import hide_credentials

WIRES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Setting `exchange_dtype` -> argument `wire` of `Exchange`."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """All components of a training, in the newest state, of a checkpoint or of memory."""

    config: Config
    data: str
    segments: Segments
    """Versions of the data set that the run reads."""
    run: Path
    mesh: ProcessMesh
    net: AlexNet
    """The columns of this process."""
    optimizer: Sgd2012
    train_step: TrainStep
    """Computes and updates with the three above."""
    rates: RateControl
    feed: PairBatches
    """The remaining batches of the run."""
    log: MetricsLog
    checkpoints: CheckpointManager
    memory: Memory
    mark: Mark
    """Step and position of the checkpoint to resume from."""
    total: int
    """Steps of the whole run."""


@contextmanager
def prepare_training(
    config: Config, data: str, run: Path, mesh: ProcessMesh, tell: Tell,
    publish: Sequence[Publish], identity: RunIdentity = UNKNOWN, memory: Memory | None = None,
) -> Iterator[Training]:  # fmt: skip
    """Create the components of a training, and close them after the block.

    Args:
        config, data, run, mesh, tell, publish, identity, memory: arguments of `loop.train`.

    Raises:
        DataError, SetupError: from the data set or the checkpoints.
    """
    segments, about = read_origin(config, data, identity)
    if identity.run:
        about["run"] = identity.run
    total = config.total_steps(segments)
    net = create_columns(config, len(about["classes"]), mesh)
    optimizer = create_optimizer(config, net)
    checkpoints = CheckpointManager(
        run, mesh, about, tell,
        keep=config.keep, keep_best=config.keep_best, store=config.store,
    )  # fmt: skip
    mark = checkpoints.resume(net, optimizer, memory)
    if config.init and not mark.step:
        load_init(config.init, net, mesh, tell, config.init_layers)
    recipe = RateSettings(config=config, samples=segments, total=total)
    rates = RateControl(recipe, run, mesh, tell, mark.step)
    with ExitStack() as parts:
        stream = parts.enter_context(
            open_stream(config, data, run, mesh, segments, position=mark.position)
        )
        feed = parts.enter_context(PairBatches(stream, mesh, batches=total - mark.step))
        step = create_step(config, net, optimizer, mesh, lambda line: tell(Warned(line)))
        train_step = parts.enter_context(step)
        parts.enter_context(closing(checkpoints))
        if mesh.is_leader:
            trackers = open_trackers(config, run, identity.run, mark.step, tell)
            publish = [*publish, *parts.enter_context(trackers)]
        memory = memory or Memory()
        log = parts.enter_context(
            MetricsLog(run, mesh, tell, segments, mark.step, publish, keep=memory.keep_row)
        )
        log.reducing = train_step.waits
        if len(about["classes"]) == CLASSES:
            log.expect(config.milestones, mark.position)
        # Rows are on disk, and in the store, before a checkpoint of their step counts.
        checkpoints.before = log.sync
        if mesh.device.type == "cpu":  # a GPU computes on after a failure, with what did not come
            memory.hold(identity.run, net, optimizer, mark, is_ended=checkpoints.is_ended)
        if mesh.is_leader and (mirror := open_mirror(run, config.store)):
            mirror.begin()
            checkpoints.alongside = mirror.push
        yield Training(
            config=config, data=data, segments=segments, run=run, mesh=mesh, net=net,
            optimizer=optimizer, train_step=train_step, rates=rates, feed=feed, log=log,
            checkpoints=checkpoints, memory=memory, mark=mark, total=total,
        )  # fmt: skip


def read_origin(
    config: Config, data: str, run: RunIdentity = UNKNOWN
) -> tuple[Segments, dict[str, Any]]:
    """Return the segments of a run, and the origin that its checkpoints record.

    Args:
        config: settings of the run.
        data: folder or address of the data set.
        run: run, and the versions that it reads; without them, the one that the settings name.

    Raises:
        DataError: the data set has no such version.
    """
    version = run.segments[-1].version if run.segments else run.data_sha256 or config.version
    folder = fetch_version(config, data, version)
    manifest = Manifest.load(folder)
    samples = manifest.split("train", folder).samples
    segments = run.segments or (Segment(identity(folder), samples),)
    if len(segments) > 1:
        folder = fetch_version(config, data, segments[0].version)  # whose mean is subtracted
    about = {
        "config": config.to_settings(),
        "data_sha256": segments[0].version,
        "classes": manifest.classes,
        "channel_mean": Statistics.load(folder, Manifest.load(folder)).channel_mean.tolist(),
    }
    if len(segments) > 1:
        about["segments"] = [list(segment) for segment in segments]
    return segments, about


def fetch_version(config: Config, data: str, version: int | str | None) -> Path:
    """Return a local folder with the metadata of a version of a data set.

    Raises:
        DataError: an identity that the data set does not have (any more).
        UsageError: another version that it does not have.
    """
    try:
        return fetch_metadata(data, version=version, **config.cached)
    except UsageError:
        if isinstance(version, str):
            refuse_other_data(data, version, identity(fetch_metadata(data, **config.cached)))
        raise


def create_columns(config: Config, classes: int, mesh: ProcessMesh) -> AlexNet:
    """Create the columns of the network that this process holds, with their initial weights."""
    return AlexNet(
        columns=mesh.columns if mesh.pair else None,
        classes=classes,
        design=config.design,
        exchange=Exchange(mesh.pair, find_wire(config)) if mesh.pair else None,
        seed=config.seed,
    ).to(mesh.device)


def create_optimizer(config: Config, net: AlexNet) -> Sgd2012:
    """Create the optimizer of the columns of this process."""
    return Sgd2012(
        net.named_parameters(),
        config.momentum,
        config.weight_decay,
        columns=len(net.columns) if config.exact or config.lars else 1,
        trust=config.lars,
        decays=parse_layer_rates(config.layer_decays, list_layers(net), "layer_decays"),
    )


@contextmanager
def create_step(
    config: Config, net: AlexNet, optimizer: Sgd2012, mesh: ProcessMesh,
    warn: Callable[[str], object] = lambda line: None,
) -> Iterator[TrainStep]:  # fmt: skip
    """Create the step of a training, and close it after the block."""
    with ExitStack() as parts:
        columns = None
        if config.exact and len(net.columns) == 2:
            columns = parts.enter_context(closing(ColumnThreads(net, find_wire(config))))
        average = (
            GradientTree(net, mesh, columns=columns.columns if columns else ())
            if config.exact
            else GradientAverage(net, mesh)
        )
        yield TrainStep(
            net, optimizer, compute_dtype(config.dtype, mesh.device),
            microbatch=config.microbatch_size(mesh.replicas), mesh=mesh,
            average=parts.enter_context(average), columns=columns,
            graph=CudaGraph if can_record(config, mesh) else None, warn=warn,
        )  # fmt: skip


def find_wire(config: Config) -> torch.dtype | None:
    """Return the dtype that float32 is rounded to between the columns; None: it is not."""
    return WIRES[config.exchange_dtype]


def can_record(config: Config, mesh: ProcessMesh) -> bool:
    """Return whether steps may be recorded as CUDA graphs: all of a step is on one GPU, at once."""
    whole = mesh.world_size == 1 and config.microbatch_size(1) >= config.batch_size
    is_on = config.cuda_graph == "auto" and not config.exact
    return is_on and mesh.device.type == "cuda" and whole


def refuse_other_data(data: str, expected: str, found: str) -> None:
    """Refuse a data set that was put in the place of the run's.

    Raises:
        DataError: the identities differ, and the expected is no version of it.
    """
    if expected and found != expected:
        raise DataError(
            f"data set {hide_credentials(data)} was replaced by another while the run read it "
            f"(manifest: {expected[:12]} -> {found[:12]}); bring the first back, or train on the "
            "new one with another --run"
        )


def open_stream(
    config: Config,
    data: str,
    run: Path,
    mesh: ProcessMesh,
    segments: Segments = (),
    **settings: Any,
) -> Stream:
    """Open this process's slice of the training images.

    Args:
        config: settings of the run.
        data: folder or address of the data set.
        run: run folder.
        mesh: rank, columns and device of this process.
        segments: versions of the data set that are read; empty: the newest.
        settings: fields of `StreamConfig` that differ from those of the training.

    Raises:
        DataError: it is another data set by now.
    """
    for segment in segments:
        fetch_version(config, data, segment.version)
    training = replace(
        config.stream,
        rank=mesh.rank,
        world_size=mesh.world_size,
        device="gpu" if mesh.device.type == "cuda" else "cpu",
        threads=config.threads or mesh.cores,
        quarantine=run / QUARANTINE,
        ledger=run / LEDGER if config.ledger else None,
        version=segments or None,
    )
    return Stream.from_config(data, replace(training, **settings))


def describe_workers(config: Config, mesh: ProcessMesh) -> str:
    """Describe the workers in words, for example "2 workers (a column each, 1 thread), cpu"."""
    if mesh.pair:
        each = "a column each"
    else:
        each = "both columns" if config.design.columns == 2 else "the one column"
        each += " each" if mesh.replicas > 1 else ""
    device = mesh.device.type if mesh.device.type == "cpu" else torch.cuda.get_device_name()
    many = "workers" if mesh.world_size > 1 else "worker"
    count = count_threads(config, mesh)
    threads = f"{count} thread{'s' if count > 1 else ''}{' a column' if config.exact else ''}"
    return (
        f"{mesh.world_size} {many} ({each}, {threads}), {device}, "
        f"{compute_dtype(config.dtype, mesh.device)}"
    ).replace("torch.", "")
