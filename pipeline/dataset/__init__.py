"""The on-disk format of a data set.

aggregates    pixel sums and hashes, kept for the next version
check         checks of manifest, side files and shards
image_stats   mean and color covariance of the training images
images        a stored image, and its strict decoder
index         SPLIT.index.npy: place, label and CRC-32 of each sample
jpeg_header   header of a JPEG; limits on images
manifest      manifest.json
members       tables beside the index: names, keys, other members of each sample
record        the data set of a run, as RUN/config.toml has it
samples       tar members -> WebDataset samples, labels, classes
segments      which version a run reads, from which position on
shards        writes a shard and its DALI .idx
tar           reads the headers of a tar
versions      the chain of versions, and what was withdrawn
"""
