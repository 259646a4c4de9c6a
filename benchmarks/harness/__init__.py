"""Modules that all benchmarks share; `benchmarks/run.py` runs them one after the other.

report      options, what a benchmark found, its tables and its JSON
rounds      turns, medians and ratios within rounds
comparison  what changed beyond noise since an earlier run
page        tables of docs/results.md from the files of results
"""
