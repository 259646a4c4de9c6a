"""Training in one process, without Ray.

loop           the training loop: start reading here
step           one step: forward, backward, update
passes         forward and backward pass, also as CUDA graphs
components     network, optimizer, stream, log, checkpoints
pair_batches   two half batches joined into one
gradients      mean over replicas
learning_rate  rates by schedule, plateau, or hand
finite_check   which layer made the loss non-finite
precision      device, dtype, settings of cuDNN and malloc
profiler       split of a step's time
"""
