"""What was delivered, written down sample by sample; and the proof of exactly once.

writer      `Ledger`: one file a rank and attempt
file        the format
checksum    32 bits for the pixels of a sample
proof       ledgers of a run -> each epoch was delivered exactly once, or what was not
"""
