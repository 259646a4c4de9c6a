"""One loader's way through the cases, in a process of its own.

`python -m torture NAME FOLDER CASES` prints a JSON object a line: `{"case": ..., ...}` for each
case, and at last `{"covers": ...}`; or `{"missing": reason}`. It imports the library once, and
consumers are forked from it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from torture import PEERS


def main() -> None:
    """Run the cases."""
    name, folder, cases = sys.argv[1:]
    peer = PEERS[name]
    # Imported here: a library may start workers that import this module again.
    from torture.cases import Trial

    try:
        importlib.import_module(f"torture.{peer.adapter}")
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return _print({"missing": f"cannot be imported: {type(error).__name__}: {lines[0]}"})
    trial = Trial(peer, Path(folder))
    if missing := trial.prepare():
        return _print({"missing": missing})
    for case in cases.split(","):
        _print({"case": case} | trial.run(case))
    _print({"covers": trial.covers()})


def _print(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
