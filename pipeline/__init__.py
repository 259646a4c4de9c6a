"""Pictures to batches: everything between a folder of JPEGs and a tensor on the device.

The files in the order the bytes flow (each may import only those before it):

    errors          what a user did wrong, in one line, with the exit code
    files           write-then-rename, so that nothing is ever half there
    processes       helper processes that end when their parent does
    progress        one progress line, silent when nobody looks
    splitmix        random words as a pure function of numbers
    augment         epoch and sample id -> crop, flip, colour (a pure function)
    order           position in the stream -> epoch and sample id (a pure function)
    sources         a folder or tars of pictures -> the list of byte ranges to pack
    picture         one encoded picture -> 256x256 pixels, as JPEG or raw (or the reason why not)
    pixel_stats     mean picture, channel mean and colour covariance of a training set
    manifest        what a sealed data set is: splits, shards, classes, hashes
    index           where each sample of a split lies
    plan            the settings of a build, and which picture goes where
    shards          write and seal one tar shard
    build_shards *  the first door: sources -> a sealed data set
    stores          shards fetched from a store into a cache that a node shares
    dataset         a folder or an address -> local files
    storage         sample id -> checked bytes and label
    decode          the DALI graphs: stored bytes and draws -> pixels
    ledger          what was delivered, and the proof of exactly once
    verify *        a data set against its manifest; a run's deliveries against its ledgers
    quarantine      the damaged samples, each listed once
    screen          pictures that DALI must not see in a batch
    reader          position -> a batch ready to be decoded, damaged samples replaced
    background      an iterator that runs ahead in a thread
    flow            batches under way: read, decoded, taken
    batches         all of it joined: `Stream`
    native          DALI's own reader on the same graph, as the yardstick
    throughput *    the third door: how fast it is
    demo_pictures * draws a small data set to try everything on

`*` is run as `python -m pipeline.<name>`. Nothing here knows the network or the cluster.
"""
