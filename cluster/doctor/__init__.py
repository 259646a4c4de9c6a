"""What is wrong with this machine, its data and its cluster, and the command that mends it.

finding      a line of the result
software     Python, packages, driver: what goes together
gpus         as torch and nvidia-smi see them
hardware     cores, memory, limits, compiler
fit          whether network and job fit the classes and the machine
exchange     a real round trip between two processes, by gloo and by NCCL
storage      the data set: there, whole, and (speed) how fast it is read
run_place    the run's folder and the store of its checkpoints
ray_check    address, token, job server
ray_nodes    the cluster, and what every node of it sees (ray_asker: asks them)
examination  all of it in turn
command      python -m cluster.doctor

Facts are gathered in one function and judged in others, which are pure: tests feed them broken
machines.
"""
