"""`python -m cluster.doctor`."""

import sys

if __name__ == "__main__":
    try:
        from cluster.doctor.command import main
        from pipeline.tools.errors import run
    except ModuleNotFoundError as error:  # without tyro or rich the command cannot report it
        is_old = sys.version_info < (3, 11)
        text = f"packages       missing: {error.name}"
        mend = "make install"
        if is_old:
            text = f"Python         {sys.version.split()[0]} is too old, 3.11 is needed"
            mend = "rm -r .venv; make PYTHON=python3.11 install"
        sys.stdout.write(f"FAIL {text}\n      -> {mend}\n1 problem\n")
        sys.exit(3)
    run(main)
