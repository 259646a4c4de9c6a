"""`python -m cluster.experiments.evidence RUN... [--data DATA] [--out FILE]`."""

from cluster.experiments.evidence.__main__ import main
from pipeline.tools.errors import run

if __name__ == "__main__":
    run(main)
