"""Drives pipeline and model: from a config file and a data set to a trained network.

Read in this order:

    worker             the training loop (start here)
    training           what a training consists of in one process
    initial            the weights of another run to start from
    place              where this process stands in the job, and what they say to each other
    feed               two halves of a batch become the whole batch
    compute            the type to compute in, and memory that is not given back
    gradients          means over the replicas, taken while the backward pass runs
    rates              the learning rates of a run, by schedule and by hand; rates.jsonl
    rate_events          what changes them, one list (pure)
    hand_rates           RUN/rates.toml, taken and put aside
    health             the layer that a loss that is no number comes from
    checkpoint         both columns on disk, whole or not at all
    checkpoint_writer    written while training goes on (checkpoint_part: by one process)
    checkpoint_resume    taken up by all processes
    checkpoint_places    in a folder or in a store (checkpoint_choice: which one to look at)
    log, rows          metrics.jsonl, validation.jsonl, layers.jsonl
    kernels            conv1 as it was after steps 1, 2, 4, 8 ...; kernels.jsonl
    run_mirror         a copy of them in a store
    tensorboard, prometheus   the same numbers for others
    events             what a worker tells the driver
    config             every setting
    config_file        settings from a file and from flags, and back
    continuation       which of them may change when a run goes on
    headspace          where a step's time goes; --measure instead of a training
    run_folder         what RUN holds, and whether the run in it may be continued
    run_state          how the run in it stands

And what only knows of Ray, from the driver to the workers:

    train *            the second door: python -m cluster.train
    measure            has workers measure, and writes down what they found
    supervisor         a run kept going: placed, watched, asked to save, started again
    topology           which worker is which column, on which node (pure)
    nodes              what is free on the nodes now
    attempt            one start of the workers by Ray Train
    failure            why it ended
    channel            what the driver and the workers say to each other
    loopback           how workers find each other on a Ray of our own
    ray_worker         what runs in each of them
    ray_session        Ray, our own or one that is there
    ray_pool           packing as Ray tasks
    console            what the user sees

    build_shards *     the first door, on a cluster
    status *           how a run stands, on one screen
    doctor *           what is wrong, and what mends it (a package of its own)
    evaluate *         errors on every picture of a split, with one view or ten
    ensemble *         several networks' probabilities averaged (probabilities, weights, together;
                       ensemble_table: one, three, five of them)
    export *           merged weights as one plain file
    report *           RUN/report.html, from files only (a package of its own)
    study *            a claim put to the test by many runs (a package of its own)
    neighbours *       pictures that a network takes for alike (a package of its own)
    evidence *         the paper's claims beside what runs have found (a package of its own)

`*` is run as `python -m cluster.<name>`.
"""

import os

# With a core taken away (by decoding, or a neighbour), OpenMP's spinning threads make a step up to
# 60 times slower, measured on two cores; sleeping ones cost nothing. torch reads this when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
