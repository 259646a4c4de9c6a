"""Checkpoints of a run: whole or not at all, loadable with one process per network or two.

format    files, hashes; the one that evaluate, export and report look at
loader    the one to resume from; start from another run's weights
memory    the state of workers that outlive another
storage   a folder or an object store
weight_files  weights that other programs have saved
writer    asynchronous writes
"""
