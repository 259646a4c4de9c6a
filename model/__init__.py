"""Tensors in, tensors out: the AlexNet of 2012, both columns.

alexnet       the network, in one process or one column per process
architecture  settings of the network, and the sizes of its layers
column_threads  both columns in one process, with the bits of a pair
exchange      activations and gradients that cross between the two columns of a pair
gpu_kernels   Triton kernels for a GPU: normalization, pooling, dropout
gpu_support   whether these kernels run here, and why not
layer_table   rows of the table of layers: the paper's, other networks', and one's own
layers        first convolutions, dropout, grouping of the operations after a layer
metrics       ten views, averaged probabilities, top-1 and top-5 errors
norm          response normalization fused with ReLU and pooling; local contrast, batch
optimizer     the update rule of the original, and the means of each layer
schedule      learning rates, and the settings that change them
timing        times of a device's work, and values read without waiting for it
summary       command: the layer table with sizes, parameters, multiply-adds, memory, exchange
"""
