"""`python -m cluster.evidence RUN... [--data DATA] [--out FILE]`."""

from cluster.evidence.page import main
from pipeline.errors import run

if __name__ == "__main__":
    run(main)
