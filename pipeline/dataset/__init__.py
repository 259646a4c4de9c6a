"""The on-disk format of a data set."""
