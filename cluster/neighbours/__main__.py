"""`python -m cluster.neighbours RUN --data DATA`."""

from cluster.neighbours.command import main
from pipeline.errors import run

if __name__ == "__main__":
    run(main)
