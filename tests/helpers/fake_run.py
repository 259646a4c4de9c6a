"""`python -m tests.helpers.fake_run CONFIG --data DATA --run RUN`: rows like a training."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    run = Path(sys.argv[-1])
    run.mkdir(parents=True)
    if run.name.startswith("fails"):
        sys.stderr.write("begun\nerror: the disk is full; make room\n")
        return 3
    if run.name.startswith("diverges"):
        sys.stderr.write("error: the loss of step 3 is nan: conv1 is the first\n")
        return 1
    (run / "cores").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
    try:
        for step in range(1, 1000):
            row = {"position": 8 * step, "step": step, "top1_error": 1 / step, "img_s": 1.0}
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            time.sleep(0.05)
    except KeyboardInterrupt:
        (run / "saved").touch()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
