"""What the processes of a job load when they start: the same checkpoint, the newest sound one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cluster.checkpoint.format import (
    UNSOUND,
    Found,
    column_file,
    fetched,
    first_sound,
    load,
    read_table,
)
from cluster.checkpoint.storage import Places, step_in
from cluster.checkpoint_part import reason
from cluster.mesh import Place
from cluster.run.events import Tell
from cluster.run.folder import Mark, last_step
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from pipeline.stores.errors import StoreError
from pipeline.tools.errors import DataError, DuetError, SetupError

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
    places: Places, run: Path, place: Place, net: AlexNet, optimiser: Sgd2012, tell: Tell
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
    found, seen = _look(places, run, tell) if place.leads else (None, _Seen())
    seen = place.share(seen)
    if seen.trouble:
        raise SetupError(seen.trouble)
    if seen.names and not seen.newest:
        raise DataError(
            f"no checkpoint in {places.address} is sound; restore one, or name another --run to "
            "start over"
        )
    if seen.newest:
        path, holder = (found.path, found.holder) if found else own_part(places, seen.newest, place)
        load(path, net, optimiser)
        del holder  # and with it what was fetched
    return seen.mark, seen.errors


def _look(places: Places, run: Path, tell: Tell) -> tuple[Found | None, _Seen]:
    """Find the newest sound one; the leader's."""
    seen = _Seen()
    try:
        seen.names = places.sealed()
        before = last_step(run)
        if not seen.names and before:
            # To begin at step 0 would throw away what is only out of reach.
            raise SetupError(
                f"{places.address} holds no checkpoint, but the run had one of step {before}; "
                "bring its disk back, or name another --run to start over"
            )
        places.prepare()
        places.tidy(step_in(seen.names[0]) if seen.names else 0)
        seen.errors = {name: _error_of(places, name) for name in seen.names}
        found = first_sound(places, seen.names, tell)
    except SetupError as error:
        return None, _Seen(trouble=str(error))
    except (OSError, DuetError) as error:
        return None, _Seen(trouble=f"{places.address} cannot be used ({reason(error)})")
    if found is not None:
        seen.newest, seen.mark = found.name, found.mark
    return found, seen


def _error_of(places: Places, name: str) -> float | None:
    """Return the validation error of a checkpoint; None if it is damaged."""
    try:
        error: float | None = read_table(places, name).get("top1_error")
    except StoreError:
        raise
    except UNSOUND:
        return None
    return error


def own_part(places: Places, name: str, place: Place) -> tuple[Path, object]:
    """Return a folder with what the leader has found, as far as it concerns this process.

    Also an object that keeps it there.

    Raises:
        SetupError: it cannot be read here, or not as it was written.
    """
    try:
        files = [column_file(column) for column in place.columns]
        return fetched(places, name, read_table(places, name), files)
    except UNSOUND as error:
        raise SetupError(
            f"{place} cannot read {places.address}/{name}, and the leader can ({reason(error)}); "
            "have all nodes see the same folder, or give --store"
        ) from error
