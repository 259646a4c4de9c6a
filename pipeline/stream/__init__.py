"""Stored bytes to batches.

config           `StreamConfig`: every setting of a stream
order            order of the samples, as a function of seed and position
augment          random draws of crop, flip and colour
normalization    mean, colour shift and divisor of pixels
selection        samples that take part: filters, drawn parts, weights
mixture          several datasets read as one
shard_reader     bytes and labels of samples, checked
fields           other members of samples, masks, labels of a user's own
quarantine       list of damaged samples; check of JPEG headers
operators        DALI's operators, imported at their first use
decode           DALI graphs
prefetch         an iterator run in a thread
loader           batches, read and decoded ahead of need
transfer         choice of a GPU, and copies to it that the host does not wait for
timing           seconds spent and waited, by stage
ledger           record of what was delivered, and the proof of exactly once
"""
