"""The samples that a stream delivers.

record     `Selection`: the samples that take part; their order
filters    from settings to a selection: where, split_by, weights
"""
