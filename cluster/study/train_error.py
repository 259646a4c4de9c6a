"""The error of a run on the pictures that it was trained on, as a test would count it."""

from __future__ import annotations

import json

from cluster.evaluate import Evaluate, evaluate
from cluster.experiments.study.runner import Run
from pipeline.tools.files import sealed


def train_error(run: Run) -> float:
    """Return the top-1 error, 0 to 1, of the whole network in the centre view.

    The errors of metrics.jsonl are of pictures with crops and colours, and of a network with half
    of its units dropped. It is counted once, and kept in OUT/NAME.train.json.
    """
    path = run.out / f"{run.name}.train.json"
    step = run.config.total_steps(run.pictures)
    if path.is_file():
        found = json.loads(path.read_bytes())
        if found["step"] == step:
            return float(found["top1_error"])
    found = evaluate(
        Evaluate(run=run.folder, data=run.data, split="train", device=run.config.device)
    )
    with sealed(path) as file:
        file.write((json.dumps(found) + "\n").encode())
    return float(found["top1_error"])
