"""`python -m cluster.study STUDY.toml --data DATA --out OUT`."""

from cluster.study.study import main
from pipeline.errors import run

if __name__ == "__main__":
    run(main)
