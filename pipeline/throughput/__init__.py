"""Measures what limits the stream on this machine, and predicts what would help.

__main__        command: report, --rate, --loader, --tune, --plan, --compare
capacity        cores, disks, networks and caches that a job needs
clock           throughput timers, and rows of a report
dali_reader     DALI's own reader, as a yardstick
diagnosis       all measurements in turn, and the verdict
foreign_loader  any iterable of batches: rate, CPU, memory, the wait of a trainer
hardware        the machine and the limits of its parts
model           bottleneck model, and the predicted gain of each change
nvidia_smi      what the driver tells of its GPUs
report          the report as JSON, text and page (page.html.j2), and the comparison of two
stages          each stage of the stream alone
stream_rate     whole streams: ours, a store, raw images, DALI's reader
tune            search for threads, prefetch and decoder load
"""
