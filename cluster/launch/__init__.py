"""Ray: places, starts, watches and restarts the workers.

controller   keeps a run going until its last step
placement    columns and replicas on nodes
gpus         whether torch can use this machine's GPUs
workers      seats, workers and spares, kept from start to start
trainer      Ray Train, which starts the workers and replaces the dead
worker       process of a worker
rendezvous   workers meet at the addresses of their nodes
failure      what the error of a worker means
interfaces   network interfaces that gloo and NCCL use
channel      events to the driver, stop requests to the workers
session      attached or own Ray
measurement  the profiler, run on workers
task_pool    packing as Ray tasks
"""
