"""`python -m pipeline.inspect DATA [--out FILE.html] [--json]`."""

from pipeline.errors import run
from pipeline.inspect.page import main

run(main)
