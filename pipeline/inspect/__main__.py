"""`python -m pipeline.describe DATA [--out FILE.html] [--json]`."""

from pipeline.describe.__main__ import main
from pipeline.tools.errors import run

run(main)
