"""`python -m cluster.report RUN [--data DATA]`."""

from cluster.report.page import main
from pipeline.tools.errors import run

run(main)
