"""Training in one process, without Ray.

loop           the training loop: start reading here
components     network, optimizer, stream, log, checkpoints
pair_batches   two half batches joined into one
gradients      mean over replicas
learning_rate  rates by schedule, plateau, or hand
finite_check   which layer made the loss non-finite
precision      device, dtype, malloc settings
profiler       split of a step's time
"""
