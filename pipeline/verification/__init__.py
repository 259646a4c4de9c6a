"""Is a sealed data set what its manifest says? `pipeline.verify` is the command.

findings    one damage: file, sample, key, reason
described   the manifest itself
beside      the files beside the shards: statistics, index, lists; and strangers
shard       one shard: hash, members, index rows, .idx, CRC-32s, pictures
whole       all of it, on all cores
"""
