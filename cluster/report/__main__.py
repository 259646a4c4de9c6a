"""`python -m cluster.report RUN [--data DATA]`."""

from cluster.report.page import main
from pipeline.errors import run

run(main)
