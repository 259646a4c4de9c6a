"""Loads checkpoints: the newest one of a run that is resumed, or weights to start from (`init`).

`init` names another run, whose newest sound checkpoint is taken, or one checkpoint; every layer but
the last is loaded from it. The driver resolves it once, checks that the network fits, and writes
the checkpoint's address into RUN/config.toml, so restarts before the first own checkpoint use the
same one. Later starts resume from RUN's own checkpoints and ignore `init`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.checkpoint.format import (
    UNSOUND,
    Checkpoint,
    choose_from_storage,
    collect_state,
    column_file,
    describe_stranger,
    fetch_files,
    find_sound,
    load_checkpoint,
    load_columns,
    read_error,
    read_newest_table,
    read_table,
)
from cluster.checkpoint.storage import (
    CheckpointStorage,
    LocalStorage,
    RemoteStorage,
    open_named,
    open_storage,
    parse_step,
)
from cluster.config import (
    TYPES,
    Config,
    is_of_type,
    read_run_config,
    translate_values,
)
from cluster.run.events import Tell, Warned
from cluster.run.folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    Mark,
    find_conflicts,
    find_data_conflicts,
    make_run_id,
    read_last_step,
    read_run_id,
)
from cluster.run.jsonl import read_tail
from pipeline.dataset.segments import Segments
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.remote.target import open_store
from pipeline.tools.errors import DataError, DuetError, SetupError, UsageError, summarize_error
from pipeline.tools.text import hide_credentials

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.checkpoint.memory import Memory, Offer
    from cluster.mesh import ProcessMesh
    from model.alexnet import AlexNet
    from model.optimizer import Sgd2012

UNUSED = "the state in the memory of the other workers is not used"
NEW = "conv6"
"""Name of the layer that may be new, besides the last."""
Errors = dict[str, float | None]
"""Top-1 validation error (0..1) by name of the checkpoint; None without a validation."""


@dataclass
class FoundState:
    """Newest state of a run, and the checkpoints that the leader has found."""

    names: list[str] = field(default_factory=list)
    """Names of all complete checkpoints, newest first."""
    newest: str = ""
    """Name of the newest sound one; "" if there is none."""
    mark: Mark = field(default_factory=Mark)
    """Step and position of the state."""
    errors: Errors = field(default_factory=dict)
    """Errors of all checkpoints."""
    trouble: str = ""
    """Reason that they cannot be read; "" if they can."""
    is_in_memory: bool = False
    """True if the state of `mark`, a newer one, is in the memory of some workers."""
    is_ended: bool = True
    """False if the step of `mark` may still have to validate, and so on (`Offer.is_ended`)."""

    @property
    def saved(self) -> int:
        """Step of the checkpoint that a failure would go back to; 0: none."""
        name = self.newest or next(iter(self.names), "")
        return parse_step(name) if name else 0


def identify_run(
    run: Path, config: Config, data_sha256: str, samples: int | Segments, own: str = ""
) -> tuple[str, Config]:
    """Return the name of the run in RUN, and `config` with its `init` pinned (see `pin_init`).

    The name is the one in RUN/config.toml, or in the checkpoints that an empty RUN resumes, or new.
    Where RUN does not say with which settings its checkpoints were made, or a store may hold those
    of another run, the settings in the newest checkpoint are compared, too.

    Args:
        run: run folder.
        config: settings of this command.
        data_sha256: identity of the data set.
        samples: number of its training images, or the segments of the run.
        own: name of a new run, if it has one already.

    Raises:
        UsageError: the checkpoints are of another run, or were made with other settings or data.
        OSError, DuetError: they cannot be reached.
    """
    storage, path = open_storage(run, config.store), run / CONFIG
    own, table = read_run_id(run) or own, read_newest_table(storage)
    if table is None:
        return own or make_run_id(run), pin_init(config, run)
    other = "another --store" if config.store else "another --run"
    if words := describe_stranger(table["run"], own):
        raise UsageError(
            f"{storage.address} holds checkpoints {words} in {run}; name {other}, or the --run "
            f"of {table['run']}"
        )
    try:
        old = parse_settings(table["config"])
        config = pin_init(config, run, old.init)
        differ = find_conflicts(old, config, samples)
    except ValueError as error:  # of another version
        config = pin_init(config, run)
        differ = [] if path.is_file() else [f"unknown here: {error}"]
    differ += find_data_conflicts(table.get("data_sha256", data_sha256), data_sha256)
    if differ and (config.store or not path.is_file()):
        there = f"run {table['run'] or 'of an earlier version'} at step {table['step']}"
        raise UsageError(
            f"{storage.address} holds {there} with other settings ({'; '.join(differ)}); use these "
            f"again, or {other}"
        )
    return own or table["run"] or make_run_id(run), config


def parse_settings(table: Mapping[str, Any]) -> Config:
    """Return the config of the settings in a checkpoint, which may be of another version.

    Raises:
        ValueError: a setting is not known, or cannot work.
    """
    settings = translate_values(table)
    for key, value in settings.items():
        if key not in TYPES or not is_of_type(value, TYPES[key]):
            raise ValueError(f"{key} is {value!r:.80}")
        if isinstance(value, list):
            settings[key] = tuple(value)
    return Config.from_settings(settings)


def load_newest(
    storage: CheckpointStorage,
    run: Path,
    mesh: ProcessMesh,
    net: AlexNet,
    optimizer: Sgd2012,
    tell: Tell,
    run_id: str = "",
    memory: Memory | None = None,
) -> FoundState:
    """Load the newest sound state, of memory or a checkpoint; a collective call of all processes.

    Damaged checkpoints are skipped with a warning. Incomplete ones are removed.

    Args:
        storage: of the run's checkpoints.
        run: folder of the run.
        mesh: rank and column of this process.
        net: gets the weights of its columns.
        optimizer: gets their velocities.
        tell: gets the leader's warnings.
        run_id: name of the run; "" if it is not known.
        memory: state that this process has kept, or not.

    Raises:
        DataError: all checkpoints are damaged, or the newest is of another network.
        SetupError: they cannot be reached, or are of another run.
    """
    offers = mesh.gather(memory.offer(run_id) if memory else None)
    columns = (0, 1) if mesh.pair else net.columns
    found, seen = (
        _discover(storage, run, run_id, tell, offers, columns)
        if mesh.is_leader
        else (None, FoundState())
    )
    seen = mesh.broadcast(seen)
    if seen.trouble:
        raise SetupError(seen.trouble)
    if seen.is_in_memory:
        if trouble := _load_offer(offers, seen.mark, memory, mesh, net, optimizer):
            if mesh.is_leader:
                tell(Warned(f"{UNUSED} ({trouble}); the newest checkpoint is"))
            return load_newest(storage, run, mesh, net, optimizer, tell, run_id)
        return seen
    if seen.names and not seen.newest:
        raise DataError(
            f"no checkpoint in {storage.address} is sound; restore one, or name another --run to "
            "start over"
        )
    if seen.newest:
        path, holder = (
            (found.path, found.holder) if found else fetch_own_columns(storage, seen.newest, mesh)
        )
        load_checkpoint(path, net, optimizer)
        del holder  # and downloaded files with it
    return seen


def _load_offer(
    offers: Sequence[Offer | None], mark: Mark, memory: Memory | None, mesh: ProcessMesh,
    net: AlexNet, optimizer: Sgd2012,
) -> str:  # fmt: skip
    """Load a state that some processes have in memory; a collective call.

    Returns:
        Reason that a process could not; "" if all could.
    """
    from cluster.checkpoint.memory import receive_columns

    trouble, state = "", {}
    own = memory.collect() if memory and offers[mesh.rank] else {}
    try:
        state = receive_columns(offers, mark, own, mesh, collect_state(net, optimizer))
    except DataError as error:
        trouble = str(error)
    if words := [words for words in mesh.gather(trouble) if words]:
        return words[0]
    for prefix, load in (
        ("weights/", net.load_column_state),
        ("velocity/", partial(optimizer.load_column_state, net)),
    ):
        load({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})
    return ""


def _discover(
    storage: CheckpointStorage, run: Path, run_id: str, tell: Tell,
    offers: Sequence[Offer | None] = (), columns: Sequence[int] = (),
) -> tuple[Checkpoint | None, FoundState]:  # fmt: skip
    """Find the newest state: sound in a checkpoint, or in memory. Leader only."""
    from cluster.checkpoint.memory import choose_offer, restore_rows  # the driver needs no torch

    seen = FoundState()
    try:
        seen.names = storage.list_complete()
        before = read_last_step(run)
        if not seen.names and before:
            # A start at step 0 would discard checkpoints that are only out of reach.
            raise SetupError(
                f"{storage.address} holds no checkpoint, but the run had one of step {before}; "
                "bring its disk back, or name another --run to start over"
            )
        storage.prepare()
        storage.remove_unfinished(parse_step(seen.names[0]) if seen.names else 0)
        seen.errors = {name: read_error(storage, name) for name in seen.names}
        saved = seen.saved
        written = next((row.get("step", 0) for row in read_tail(run / METRICS, 1)), 0)
        offer, why = choose_offer(offers, columns, written, saved)
        if why:
            tell(Warned(f"{UNUSED} ({why}); the checkpoint of step {saved} is"))
        if offer is not None:
            try:
                restore_rows(run, offer)
            except OSError as error:
                why = f"the rows in {run} cannot be written: {summarize_error(error)}"
                tell(Warned(f"{UNUSED} ({why}); the checkpoint of step {saved} is"))
            else:
                seen.mark, seen.is_in_memory, seen.is_ended = offer.mark, True, offer.is_ended
                return None, seen
        found = find_sound(storage, seen.names, tell)
        if found is not None and (words := describe_stranger(found.run, run_id)):
            raise SetupError(f"{storage.address} holds checkpoints {words}; name another --store")
    except SetupError as error:
        return None, FoundState(trouble=str(error))
    except (OSError, DuetError) as error:
        return None, FoundState(
            trouble=f"{storage.address} cannot be used ({summarize_error(error)})"
        )
    if found is not None:
        seen.newest, seen.mark = found.name, found.mark
    return found, seen


def fetch_own_columns(
    storage: CheckpointStorage, name: str, mesh: ProcessMesh
) -> tuple[Path, object]:
    """Return a folder with this process's columns of a checkpoint, and the folder's holder.

    Raises:
        SetupError: this process cannot read the files, or they do not match their hashes.
    """
    try:
        files = [column_file(column) for column in mesh.columns]
        return fetch_files(storage, name, read_table(storage, name), files)
    except UNSOUND as error:
        raise SetupError(
            f"{mesh} cannot read {storage.address}/{name}, and the leader can "
            f"({summarize_error(error)}); have all nodes see the same folder, or give --store"
        ) from error


@dataclass(frozen=True)
class InitSource:
    """Checkpoint that `init` names."""

    storage: CheckpointStorage
    base: str
    """Folder or address of the checkpoints, as it stands in the setting or a config."""
    name: str
    """Name of the checkpoint; "" for the newest."""


def parse_init(init: str) -> InitSource:
    """Parse the setting `init`; at most a config file is read.

    Raises:
        UsageError: it is neither a run nor a checkpoint, or no address of an object store.
    """
    if (named := open_named(init)) is not None:
        return InitSource(*named)
    if is_remote(init):
        base = f"{init.rstrip('/')}/{CHECKPOINTS}"
        return InitSource(RemoteStorage(open_store(init, CHECKPOINTS)), base, "")
    path = local_path(init)
    if (path / CONFIG).is_file():
        store = read_run_config(path / CONFIG)[0].store
        if is_remote(store):
            return parse_init(store)
        path = local_path(store) if store else path
    if not (path / CHECKPOINTS).is_dir():
        raise UsageError(
            f"init {init} is no run, and no checkpoint (step-...); name a folder that "
            "cluster.train made"
        )
    return InitSource(LocalStorage(path / CHECKPOINTS), str(path / CHECKPOINTS), "")


def choose_init(source: InitSource, tell: Tell) -> Checkpoint:
    """Find the checkpoint and verify its hashes; it is downloaded from a store.

    Raises:
        UsageError: there is none.
        DataError: it is damaged.
        StoreError: the store does not answer.
    """
    called = f"init {hide_credentials(source.base)}"
    step = parse_step(source.name) if source.name else None
    return choose_from_storage(source.storage, called, tell, step)


def pin_init(config: Config, run: Path, before: str = "") -> Config:
    """Return `config` with the checkpoint's address that the run was started from as `init`.

    That is the `init` in RUN/config.toml, if the setting names the same run or checkpoint.

    Args:
        config: settings of this command.
        run: folder of the run.
        before: `init` of the run's checkpoints, for a RUN without config.toml.
    """
    if not config.init:
        return config
    init = config.init if is_remote(config.init) else str(local_path(config.init).resolve())
    config = _replace_init(config, init)
    if (run / CONFIG).is_file():
        before = read_run_config(run / CONFIG)[0].init
    base = before.rpartition("/")[0]
    if before and (
        init in (before, base.removesuffix(f"/{CHECKPOINTS}")) or base == _find_base(init)
    ):
        return replace(config, init=before)
    return config


def _replace_init(config: Config, init: str) -> Config:
    try:
        return replace(config, init=init)
    except ValueError as error:  # a folder whose name is no text
        raise UsageError(str(error)) from error


def _find_base(init: str) -> str:
    try:
        source = parse_init(init)
    except UsageError:  # it was removed meanwhile
        return ""
    return "" if source.name else source.base


def resolve_init(config: Config, classes: int, tell: Tell) -> tuple[Config, str]:
    """Find the checkpoint that `init` names, and check that its network fits.

    Args:
        config: settings of the run that is to begin, with `init`.
        classes: number of its classes.
        tell: gets warnings.

    Returns:
        The config with the checkpoint's own address as `init`, and a line for the user.

    Raises:
        UsageError, DataError, StoreError: as `parse_init` and `choose_init`, or it does not fit.
    """
    from model.alexnet import AlexNet  # here: it brings torch

    source = parse_init(config.init)
    found = choose_init(source, tell)
    address = f"{source.base}/{found.name}"
    net = AlexNet(classes=classes, design=config.design)
    columns = len(read_table(source.storage, found.name)["files"])
    there = load_columns(found.path, range(columns), "weights/")
    layers, fresh = list_layers(net), list_fresh_layers(net, config.init_layers)
    taken = match_layers(net.column_state(), there, layers, hide_credentials(address), fresh)
    kept = set(map(_layer_of, taken))
    new = [layer for layer in list_layers(net) if layer not in kept]
    said = (
        f"starts from {hide_credentials(address)} ({len(found.classes)} classes); "
        f"new: {', '.join(new)}"
    )
    return _replace_init(config, address), said


def load_init(
    init: str, net: AlexNet, mesh: ProcessMesh, tell: Tell, init_layers: str = "all"
) -> None:
    """Load this process's columns from another run's checkpoint; a collective call.

    Args:
        init, init_layers: settings of those names.
        net, mesh, tell: columns and mesh of this process; what gets warnings.

    Raises:
        UsageError, DataError, StoreError: as `resolve_init`.
        SetupError: this process cannot read the files that the leader can.
    """
    source = parse_init(init)
    name = source.name or mesh.broadcast(choose_init(source, tell).name if mesh.is_leader else "")
    path, holder = fetch_own_columns(source.storage, name, mesh)
    there, own = load_columns(path, net.columns, "weights/"), net.column_state()
    called = hide_credentials(f"{source.base}/{name}")
    layers, fresh = list_layers(net), list_fresh_layers(net, init_layers)
    taken = match_layers(own, there, layers, called, fresh)
    net.load_column_state(own | {key: there[key] for key in taken})
    del holder  # and downloaded files with it


def list_layers(net: AlexNet) -> list[str]:
    """Return the names of the layers, from the image to the logits."""
    return [stage.layer.name for stage in net.stages]


def list_fresh_layers(net: AlexNet, init_layers: str) -> list[str]:
    """Return the layers, besides the last, that take nothing from another run's checkpoint."""
    fully_connected = [stage.layer.name for stage in net.stages if stage.layer.kind == "fc"]
    return fully_connected if init_layers == "conv" else []


def match_layers(
    own: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    layers: Sequence[str],
    called: str,
    fresh: Sequence[str] = (),
) -> list[str]:
    """Return the keys of the tensors that are loaded; see `AlexNet.column_state` for them.

    Args:
        own: tensors of the new network; only their shapes matter.
        there: tensors of the checkpoint.
        layers: names of the new network's layers; the last is new, and conv6 may be.
        called: the checkpoint's name in messages.
        fresh: layers that are new, too, with which the checkpoint's fully connected ones are left.

    Raises:
        UsageError: a layer is missing, has another shape, or is not in the new network.
    """
    known = {_layer_of(key) for key in there}
    new = {layers[-1], NEW, *fresh} - ({NEW} & known)
    left = {layers[-1], "bottleneck", *fresh}  # which only the last layer reads
    way = "give the settings of its RUN/config.toml (net, columns, width, norm, conv6, ...)"
    taken = []
    for key, tensor in own.items():
        if _layer_of(key) in new:
            continue
        if key not in there:
            raise UsageError(f"{called} has no {key}, which this network has; {way}")
        if there[key].shape != tensor.shape:
            shapes = f"{list(there[key].shape)}, and this network's {list(tensor.shape)}"
            raise UsageError(f"{called}: {key} is {shapes}; {way}")
        taken.append(key)
    if more := [key for key in there if key not in own and _layer_of(key) not in left]:
        layer = more[0].rpartition(".")[0]
        raise UsageError(f"{called} has {layer}, which this network has not; {way}")
    return taken


def _layer_of(key: str) -> str:
    """Return the layer of a key: `conv1` for `a.conv1.norm.weight`."""
    return key.split(".")[1]
