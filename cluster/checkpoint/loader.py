"""What the processes of a job load when they start: the same checkpoint, the newest sound one.

The weights of another run to start from (`init`): of every layer but the last, which is new.

What is named may be a run, the newest sound checkpoint of which is taken, or one checkpoint. The
driver looks once which it is and whether the network fits, and writes that checkpoint's own address
into RUN/config.toml, so that whatever starts again before the first own checkpoint starts from the
same. Later starts go on from RUN's own: they do not look at it at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoint.format import (
    UNSOUND,
    Checkpoint,
    choose_from_storage,
    column_file,
    fetch_files,
    find_sound,
    load_checkpoint,
    read_table,
    reason,
)
from cluster.checkpoint.storage import (
    CheckpointStorage,
    LocalStorage,
    RemoteStorage,
    is_checkpoint,
    parse_step,
)
from cluster.config import Config, read_run_config
from cluster.mesh import ProcessMesh
from cluster.run.events import Tell
from cluster.run.folder import CHECKPOINTS, CONFIG, Mark, read_last_step
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from pipeline.remote.dataset import is_remote
from pipeline.remote.filesystem import StoreError, hide_credentials
from pipeline.remote.target import local_path, open_store
from pipeline.tools.errors import DataError, DuetError, SetupError, UsageError

Errors = dict[str, float | None]
"""Top-1 validation errors by name of the checkpoint, None where there is none."""


@dataclass
class _Seen:
    """What the leader has seen."""

    names: list[str] = field(default_factory=list)
    """All complete checkpoints, newest first."""
    newest: str = ""
    """The newest sound one."""
    mark: Mark = field(default_factory=Mark)
    errors: Errors = field(default_factory=dict)
    trouble: str = ""


def load_newest(
    places: CheckpointStorage,
    run: Path,
    place: ProcessMesh,
    net: AlexNet,
    optimiser: Sgd2012,
    tell: Tell,
) -> tuple[Mark, Errors]:
    """Load the newest sound checkpoint; all processes call it.

    Damaged ones are named in a warning and passed over. What crashes have left is removed.

    Args:
        places: where the checkpoints lie.
        run: folder of the run.
        place: of this process.
        net: gets the weights of its columns.
        optimiser: gets their velocities.
        tell: gets the warnings; the leader's.

    Returns:
        where the run stands, and (the leader only) the errors of all checkpoints.

    Raises:
        DataError: there are some, and none is sound, or the newest is of another network.
        SetupError: they cannot be reached.
    """
    found, seen = _look(places, run, tell) if place.is_leader else (None, _Seen())
    seen = place.broadcast(seen)
    if seen.trouble:
        raise SetupError(seen.trouble)
    if seen.names and not seen.newest:
        raise DataError(
            f"no checkpoint in {places.address} is sound; restore one, or name another --run to "
            "start over"
        )
    if seen.newest:
        path, holder = (
            (found.path, found.holder) if found else fetch_own_columns(places, seen.newest, place)
        )
        load_checkpoint(path, net, optimiser)
        del holder  # and with it what was fetched
    return seen.mark, seen.errors


def _look(places: CheckpointStorage, run: Path, tell: Tell) -> tuple[Checkpoint | None, _Seen]:
    """Find the newest sound one; the leader's."""
    seen = _Seen()
    try:
        seen.names = places.list_complete()
        before = read_last_step(run)
        if not seen.names and before:
            # To begin at step 0 would throw away what is only out of reach.
            raise SetupError(
                f"{places.address} holds no checkpoint, but the run had one of step {before}; "
                "bring its disk back, or name another --run to start over"
            )
        places.prepare()
        places.remove_unfinished(parse_step(seen.names[0]) if seen.names else 0)
        seen.errors = {name: _error_of(places, name) for name in seen.names}
        found = find_sound(places, seen.names, tell)
    except SetupError as error:
        return None, _Seen(trouble=str(error))
    except (OSError, DuetError) as error:
        return None, _Seen(trouble=f"{places.address} cannot be used ({reason(error)})")
    if found is not None:
        seen.newest, seen.mark = found.name, found.mark
    return found, seen


def _error_of(places: CheckpointStorage, name: str) -> float | None:
    """Return the validation error of a checkpoint; None if it is damaged."""
    try:
        error: float | None = read_table(places, name).get("top1_error")
    except StoreError:
        raise
    except UNSOUND:
        return None
    return error


def fetch_own_columns(
    places: CheckpointStorage, name: str, place: ProcessMesh
) -> tuple[Path, object]:
    """Return a folder with what the leader has found, as far as it concerns this process.

    Also an object that keeps it there.

    Raises:
        SetupError: it cannot be read here, or not as it was written.
    """
    try:
        files = [column_file(column) for column in place.columns]
        return fetch_files(places, name, read_table(places, name), files)
    except UNSOUND as error:
        raise SetupError(
            f"{place} cannot read {places.address}/{name}, and the leader can ({reason(error)}); "
            "have all nodes see the same folder, or give --store"
        ) from error


NEW = "conv6"
"""The layer that may be new, besides the last."""
_WEIGHTS = "weights/"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class InitSource:
    """Where to start from."""

    places: CheckpointStorage
    base: str
    """Folder or address that holds the checkpoints, as the user or a config has it."""
    name: str
    """Of the checkpoint; "" for the newest."""


def parse_init(init: str) -> InitSource:
    """Understand the setting; nothing but a config is read.

    Raises:
        UsageError: it is no run and no checkpoint, or no address that checkpoints go to.
    """
    if is_remote(init):
        base, _, last = init.rstrip("/").rpartition("/")
        if is_checkpoint(last):
            return InitSource(RemoteStorage(open_store(base, "")), base, last)
        return InitSource(
            RemoteStorage(open_store(init, CHECKPOINTS)), f"{init.rstrip('/')}/{CHECKPOINTS}", ""
        )
    path = local_path(init)
    if is_checkpoint(path.name):
        return InitSource(LocalStorage(path.parent), str(path.parent), path.name)
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
    """Find the checkpoint, its bytes compared with their hashes; fetched if need be.

    Raises:
        UsageError: there is none.
        DataError: it is damaged.
        StoreError: the store does not answer.
    """
    called = f"init {hide_credentials(source.base)}"
    step = parse_step(source.name) if source.name else None
    return choose_from_storage(source.places, called, tell, step)


def pin_init(config: Config, run: Path, step: int) -> Config:
    """Return `config` with `init` as the run was begun with it, if it was, and from there.

    Args:
        config: the settings of this command.
        run: its folder.
        step: of its newest checkpoint.
    """
    if not config.init:
        return config
    init = config.init if is_remote(config.init) else str(local_path(config.init).resolve())
    config = replace(config, init=init)
    before = read_run_config(run / CONFIG)[0].init if (run / CONFIG).is_file() else ""
    base = before.rpartition("/")[0]
    if before and (init in (before, base.removesuffix(f"/{CHECKPOINTS}")) or base == _base(init)):
        return replace(config, init=before)
    return config


def _base(init: str) -> str:
    try:
        source = parse_init(init)
    except UsageError:  # it has gone meanwhile
        return ""
    return "" if source.name else source.base


def resolve_init(config: Config, classes: int, tell: Tell) -> tuple[Config, str]:
    """Find the checkpoint and make sure that its network fits, before anything has started.

    Args:
        config: with `init`.
        classes: of the run that is to begin.
        tell: gets warnings.

    Returns:
        the config with the checkpoint's own address, and a line for the user.

    Raises:
        UsageError, DataError, StoreError: as `source_of` and `chosen`, or it does not fit.
    """
    source = parse_init(config.init)
    found = choose_init(source, tell)
    address = f"{source.base}/{found.name}"
    net = AlexNet(classes=classes, design=config.design)
    shapes: dict[str, Shape] = {}
    for column in range(read_table(source.places, found.name)["config"].get("columns", 2)):
        with safe_open(found.path / column_file(column), "pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    shapes = {k.removeprefix(_WEIGHTS): v for k, v in shapes.items() if k.startswith(_WEIGHTS)}
    own = {key: tuple(value.shape) for key, value in net.column_state().items()}
    taken = match_layers(own, shapes, list_layers(net), hide_credentials(address))
    new = [layer for layer in list_layers(net) if not any(_layer(key) == layer for key in taken)]
    said = (
        f"starts from {hide_credentials(address)} ({len(found.classes)} classes); "
        f"new: {', '.join(new)}"
    )
    return replace(config, init=address), said


def load_init(init: str, net: AlexNet, place: ProcessMesh, tell: Tell) -> None:
    """Fill the columns here from another run's checkpoint; all processes of a job call it.

    Raises:
        UsageError, DataError, StoreError: as `looked_at`.
        SetupError: this process cannot read what another one can.
    """
    source = parse_init(init)
    name = source.name or place.broadcast(choose_init(source, tell).name if place.is_leader else "")
    path, holder = fetch_own_columns(source.places, name, place)
    state: dict[str, Tensor] = {}
    for column in net.columns:
        state |= load_file(path / column_file(column))
    there = {k.removeprefix(_WEIGHTS): v for k, v in state.items() if k.startswith(_WEIGHTS)}
    own = net.column_state()
    taken = match_layers(
        {key: tuple(value.shape) for key, value in own.items()},
        {key: tuple(value.shape) for key, value in there.items()},
        list_layers(net),
        hide_credentials(f"{source.base}/{name}"),
    )
    net.load_column_state(own | {key: there[key] for key in taken})
    del holder  # and with it what was fetched


def list_layers(net: AlexNet) -> list[str]:
    """Names of the layers, from the image to the logits."""
    return [stage.layer.name for stage in net.stages]


def match_layers(
    own: Mapping[str, Shape], there: Mapping[str, Shape], layers: Sequence[str], called: str
) -> list[str]:
    """Return the keys that are taken over; see `AlexNet.column_state` for them.

    Args:
        own: shapes of the network that is to begin.
        there: of the one that it starts from.
        layers: names of the former's layers, of which the last is new, and conv6 may be.
        called: how messages call the latter.

    Raises:
        UsageError: a layer is missing, has another shape, or is of no use here; names it.
    """
    known = {_layer(key) for key in there}
    new = {layers[-1], NEW} - ({NEW} & known)
    way = "give the settings of its RUN/config.toml (net, columns, width, norm, conv6, ...)"
    taken = []
    for key, shape in own.items():
        if _layer(key) in new:
            continue
        if key not in there:
            raise UsageError(f"{called} has no {key}, which this network has; {way}")
        if there[key] != shape:
            raise UsageError(
                f"{called}: {key} is {list(there[key])}, and this network's {list(shape)}; {way}"
            )
        taken.append(key)
    if more := [key for key in there if key not in own and _layer(key) != layers[-1]]:
        layer = more[0].rpartition(".")[0]
        raise UsageError(f"{called} has {layer}, which this network has not; {way}")
    return taken


def _layer(key: str) -> str:
    """`a.conv1.norm.weight` -> conv1."""
    return key.split(".")[1]
