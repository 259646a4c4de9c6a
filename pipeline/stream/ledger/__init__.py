"""Ledgers: a record of every delivered sample, and the proof that each epoch was exact.

format      the file format, `LedgerHeader` and `LedgerFile`
writer      `Ledger`: writes the file of one rank and attempt, with a checksum of each sample
attempts    the ledgers of a run by attempt, and the positions that no rank delivered
findings    errors, the `Proof`, and their text
replays     deliveries of the same positions, compared
proof       `prove`: checks that each epoch was delivered exactly once
"""
