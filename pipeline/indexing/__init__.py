"""Shards of other tools: their samples, labels and faults -> an index, statistics and a manifest.

samples     members of a tar -> samples, the picture and the label of each
idx         DALI's `.idx` of a tar
names       labels as they are written -> numbers, and the names of the classes
examine     one shard of another tool -> its rows, and what is wrong with it
foreign     a folder of such shards -> a data set
"""
