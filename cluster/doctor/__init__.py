"""Checks what would keep a training from running, and names the command that mends it.

command      all checks in turn, and their command line; `__main__` is `python -m cluster.doctor`
data         data set, its disk or store, run folder, store of checkpoints
finding      a line of the result; text of kernel files
hardware     GPUs, cores, memory, limits, temporary folder, compiler
job          whether network and job fit the classes and the machine
network      interface, host name, and a round trip between two processes by gloo and by NCCL
ray_cluster  address, token, job server, and whether each node sees packages, data and run
ray_probe    process that joins the cluster and asks its nodes
software     Python, packages and driver: what is installed, and whether it fits together
"""
