"""Checkpoints of a run: whole or not at all, loadable with one process per network or two.

format    files, hashes, choice of one
loader    resume; start from another run's weights
storage   a folder or an object store
writer    asynchronous writes
"""
