"""Data sets in a store: their shards are fetched ahead of need into a cache that a node shares.

    remote      one set in one store, as `pipeline.remote.dataset` wants it
    cache       the folder: whole, checked files, least recently used out, for many processes
    ahead       fetches what will be needed, in the background
    fetch       one file out of a store (fsspec): tries, waits, gives up
    arrival     a file that is just coming in
    locks       between processes, freed with their holder
    errors      what can go wrong, in one line

Nothing outside imports from here but `pipeline.remote.dataset`.
"""
