"""Stores: any address that fsspec knows, with one function that retries requests.

answers      what a store answered: whether and when another try is of use
cache        shard cache of a node
dataset      opens a data set in a folder or a store
download     one file to a local path
file         a seekable remote file
filesystem   addresses, file systems, retries, timeouts
hub          addresses of the Hugging Face hub, its token and its refusals
lease        one writer at an address
local        the interface of a data set, and one in a folder
prefetch     downloads shards before they are needed
target       writes to a folder or an object store
"""
