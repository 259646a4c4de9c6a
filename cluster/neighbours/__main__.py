"""`python -m cluster.experiments.neighbors RUN --data DATA`."""

from cluster.experiments.neighbors.__main__ import main
from pipeline.tools.errors import run

if __name__ == "__main__":
    run(main)
