"""Pipeline and model, driven: from a config file and a data set to a trained network.

cli             command `duet`: the commands of all packages as verbs
train           command: train a network on a data set; begin reading at `training.loop`
evaluate        command: error rates on a split, with one view or ten
status          command: the state of a run
export          command: the merged weights as one file
import_weights  command: a run of weights that another program trained
build_shards    command: pack on Ray
report          command: RUN/report.html
doctor          command: check machine, data, and cluster
experiments     commands: the paper's claims put to the test
config          every setting, and the presets
training        one process's training, without Ray
launch          all that knows Ray: places, starts, and restarts the workers
checkpoint      both columns on disk, in a folder or a bucket
run             the files that a run leaves in RUN
mesh            rank, column, and replica of a process; its process groups
"""

import os
import sys

from pipeline.tools.startup import Renames

# With a core taken away (by decoding, or a neighbour), OpenMP's spinning threads make a step up to
# 60 times slower, measured on two cores; sleeping ones cost nothing. torch reads this when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.meta_path.insert(
    0,
    Renames(
        {
            "cluster.ensemble": "cluster.experiments.ensemble",
            "cluster.evidence": "cluster.experiments.evidence",
            "cluster.neighbours": "cluster.experiments.neighbors",
            "cluster.study": "cluster.experiments.study",
        }
    ),
)
