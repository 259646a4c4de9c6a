"""A claim of the paper tested by a study: variants of a training, several seeds, one number each.

    python -m cluster.experiments.study figure1 --data DATA --out OUT

config   the study file
subsets  parts of the data set that a study trains on
runner   runs side by side, each a process; one run without Ray
goals    training errors to come to, the images until then, and when a run may end
results  the number of each run, averages of networks, study.json and study.md
plot     curves of the variants, or errors over the number of networks
"""
