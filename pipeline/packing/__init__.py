"""Packing: the images of a source -> chunks -> shards -> a sealed data set.

    options     the settings of a build
    plan        every image in its place, before any of them has been opened
    target      where OUT is: a folder, or an address in a store
    pixels      one encoded image -> 256x256 pixels, or the reason why not; pixels -> JPEG
    perceptual  pixels -> a hash that near-copies share
    chunks      a run of source images -> encoded, measured, hashed: stage one
    gather      encoded images, shuffled over the whole set -> one shard: stage two
    duplicates  hashes of a set -> images that are the same
    pool        the processes of this machine that do the work
    build       all of it joined, killed and resumed

Nothing outside imports from here but `build_shards`, `index`, `inspect` and `cluster.build_shards`.
"""
