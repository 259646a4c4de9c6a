"""Drives pipeline and model: from a config file and a data set to a trained network.

Read in this order:

    worker           the training loop (start here)
    place            where this process stands in the job, and what the processes say to each other
    feed             two halves of a batch become the whole batch
    compute          the type to compute in, and memory that is not given back
    gradients        means over the replicas, taken while the backward pass runs
    rates            the learning rates of a run, by schedule and by hand; rates.jsonl
    rate_events        what changes them, one list (pure)
    hand_rates         RUN/rates.toml, taken and put aside
    health           the layer that a loss that is no number comes from
    checkpoint       both columns on disk, whole or not at all
    log              metrics.jsonl, validation.jsonl, layers.jsonl
    events           what a worker tells the driver
    config           every setting
    config_file      settings from a file and from flags, and back
    topology         which worker is which column, on which node (pure)
    run_folder       what RUN holds, and whether the run in it may be continued
    ray_session      workers started, watched and restarted by Ray, our own or one that is there
    ray_pool         packing as Ray tasks
    console          what the user sees
    train *          the second door: python -m cluster.train
    build_shards *   the first door, on a cluster
    evaluate *       errors on every picture of a split, with one view or ten
    ensemble *       several networks' probabilities averaged (probabilities, weights)
    report *         RUN/report.html, from files only (a package of its own)

`*` is run as `python -m cluster.<name>`.
"""

import os

# With a core taken away (by decoding, or a neighbour), OpenMP's spinning threads make a step up to
# 60 times slower, measured on two cores; sleeping ones cost nothing. torch reads this when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
