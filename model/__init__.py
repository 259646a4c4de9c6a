"""Tensors in, tensors out: the AlexNet of 2012, both columns of it.

alexnet    the table of layers and the network, in one process or one column per process
layers     what torch does not have: local response normalisation, the dropout of the paper
exchange   what crosses between the two columns of a pair, and its gradients
optim      the update rule and the learning-rate schedule of the original
evaluate   ten views, averaged probabilities, top-1 and top-5 errors
summary    sizes, parameters and multiply-adds of every layer

This package knows nothing of files, data sets or Ray.
"""
