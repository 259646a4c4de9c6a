"""Pictures to batches: everything between a folder of JPEGs and a tensor on the device.

The files in the order the bytes flow (each may import only those before it):

    errors          what a user did wrong, in one line, with the exit code
    files           write-then-rename, so that nothing is ever half there
    processes       helper processes that end when their parent does
    sources         a folder or tars of pictures -> the list of byte ranges to pack
    picture         one encoded picture -> a 256x256 JPEG (or the reason why not)
    pixel_stats     mean picture, channel mean and colour covariance of a training set
    manifest        what a sealed data set is: splits, shards, classes, hashes
    plan            the settings of a build, and which picture goes where
    shards          write, index and seal one tar shard
    build_shards *  the first door: sources -> a sealed data set
    verify *        a sealed data set against its own manifest
    order           position in the stream -> epoch and sample id (a pure function)
    augment         epoch and sample id -> crop, flip, colour (a pure function)
    storage         sample id -> checked JPEG bytes and label
    decode          the DALI graphs: JPEG bytes and draws -> pixels
    batches         all of it joined: `Stream`
    throughput *    the third door: how fast it is
    demo_pictures * draws a small data set to try everything on

`*` is run as `python -m pipeline.<name>`. Nothing here knows the network or the cluster.
"""
