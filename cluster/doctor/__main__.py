"""`python -m cluster.doctor`."""

import sys

if __name__ == "__main__":
    try:
        from cluster.doctor.command import main
        from pipeline.tools.errors import run
    except ModuleNotFoundError as error:  # without these there is nobody else to say it
        old = sys.version_info < (3, 11)
        said = f"Python         {sys.version.split()[0]} is too old, 3.11 is needed"
        said = said if old else f"packages       missing: {error.name}"
        mend = "rm -r .venv; make PYTHON=python3.11 install" if old else "make install"
        sys.stdout.write(f"FAIL {said}\n      -> {mend}\n1 problem\n")
        sys.exit(3)
    run(main)
