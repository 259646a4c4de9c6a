"""Tools that know nothing of images.

arguments   command lines: parsing, ranges
charts      charts of the pages
errors      errors that the user can act on, and exit codes
files       atomic writes, hashes, page cache, locks between processes
help        the flags of a command, and its --help
jsonl       reader of JSON lines
packages    releases of installed packages, and what brings a missing one
processes   worker pools, isolated calls
progress    progress bar
startup     before imports: former names of commands, a first line where they are slow
stdio       standard output and error of a command
tables      columns of CSV, JSON lines and Parquet
terminal    rich's console for text that comes from elsewhere
text        numbers and messages as people read them
units       sizes as people write them, cores and memory that this process may use
watchdog    calls that may not return: files on a mount that hangs
"""
