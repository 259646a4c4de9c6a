"""Packing: the images of a source -> chunks -> shards -> a sealed data set.

plan         settings of a build and its images' sizes; split, label and place of every image
build        driver: plan, pack, write shards, seal; resumes a killed build
chunks       stage one: a run of source images -> encoded, hashed, measured
resize       one encoded image -> sRGB pixels of its size -> a JPEG
formats      formats that need a decoder beside Pillow's own, and what Pillow refuses in PNGs
duplicates   perceptual hashes -> groups of duplicates
hamming      groups of hashes within a Hamming distance
additions    a version with more images
withdrawal   a version without some samples; purged shards
revision     tables, lists and manifest of the next version
measure      pixel sums and hashes of stored images
known        images that a set has already
foreign_shards  shards of another tool: checked sample by sample
shards       stage two: encoded images in shuffled order -> shards, side files, manifest
"""
