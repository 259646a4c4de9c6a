"""Ledgers → proof that each epoch was delivered exactly once, or the names of what was not.

exactly_once   `prove`: goes through all positions
attempts       files → attempts: which rank should have delivered which position
gaps           positions that nobody delivered, and who should have
replays        what was delivered again: the same?
findings       what is found, and what is proved
"""
