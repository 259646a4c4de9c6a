"""Pictures to batches: everything between a folder of JPEGs and a tensor on the device.

The files in the order the bytes flow (each may import only those before it):

    errors          what a user did wrong, in one line, with the exit code
    files           write-then-rename, so that nothing is ever half there
    whole_file      a file read or mapped once, and looked at from many sides
    processes       helper processes that end when their parent does
    progress        one progress line, silent when nobody looks
    page_cache      what the kernel keeps of files in memory
    waits           what whoever takes batches has waited for
    splitmix        random words as a pure function of numbers
    augment         epoch and sample id -> crop, flip, colour (a pure function)
    order           position in the stream -> epoch and sample id (a pure function)
    picture         what a stored picture is
    pixel_stats     mean picture, channel mean and colour covariance of a training set
    manifest        what a sealed data set is: splits, shards, classes, hashes
    stored_picture  a stored picture, decoded strictly
    shard_pool      the same work on each of many shards, on all cores
    index *         where each sample of a split lies
    shards          write one tar shard
    stores          shards fetched from a store into a cache that a node shares
    dataset         a folder or an address -> local files
    sources         folders, tars, parquet, shards -> a listing of pictures, and readers of them
    storage         sample id -> checked bytes and label
    decode          the DALI graphs: stored bytes and draws -> pixels
    ledger          what was delivered, and the proof of exactly once
    quarantine      the damaged samples, each listed once
    screen          pictures that DALI must not see in a batch
    reader          position -> a batch ready to be decoded, damaged samples replaced
    background      an iterator that runs ahead in a thread
    flow            batches under way: read, decoded, taken
    asked, opened   what a stream is asked for, and what it is made of
    batches         all of it joined: `Stream`
    indexing        shards of other tools -> an index, statistics and a manifest
    packing         pictures -> chunks -> shards -> a sealed data set
    build_shards *  the first door: sources -> a sealed data set
    verification    every byte of a set, and what it says of itself
    verify *        a data set against its manifest; a run's deliveries against its ledgers
    inspect *       what a set holds: a table and a page
    native          DALI's own reader on the same graph, as the yardstick
    throughput *    the third door: how fast it is, and what would help (a package of its own)
    demo_pictures * draws a small data set to try everything on

`*` is run as `python -m pipeline.<name>`. Nothing here knows the network or the cluster.
"""
