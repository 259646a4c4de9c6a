"""`python -m cluster.doctor`."""

from cluster.doctor.command import main
from pipeline.errors import run

if __name__ == "__main__":
    run(main)
