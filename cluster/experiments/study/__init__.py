"""A claim of the paper put to the test: variants of one training, their seeds, and one number each.

    python -m cluster.experiments.study figure1 --data DATA --out OUT

Read in this order: plan (what a study file says), subsets (the data sets it is made on), single
(one run below Ray), crowd (many runs, as many at a time as there is room for), measure (what a run
came to, from its rows; train_error), study (all of it in order), nets (ensembles), table and plot.
A run is an ordinary run folder, made by `cluster.train`; nothing here knows the loop.
"""
