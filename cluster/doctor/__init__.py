"""What is wrong with this machine, its data and its cluster, and the command that mends it.

finding      a line of the result
software     Python, packages, driver: what goes together (pure judgements over gathered facts)
hardware     GPUs, memory, limits, compiler
exchange     a real round trip between two processes, by gloo and by NCCL
storage      the data set and the run's folder: there, whole, and how fast
ray_check    the cluster: reachable, token, and what every node sees
command      python -m cluster.doctor
"""
