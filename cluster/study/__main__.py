"""`python -m cluster.experiments.study STUDY.toml --data DATA --out OUT`."""

from cluster.experiments.study.__main__ import main
from pipeline.tools.errors import run

if __name__ == "__main__":
    run(main)
