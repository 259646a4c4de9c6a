"""Tensors in, tensors out: the AlexNet of 2012, both columns of it.

design     the table of layers: the paper's network, and those it was compared with
alexnet    the network, in one process or one column per process
layers     the first convolution, which reads the image, and what follows a layer
dropout    the dropout of the paper, its masks a function of the sample
norm       response normalisation, with what is around it in one pass; local contrast, batch
exchange   what crosses between the two columns of a pair, and its gradients
halves     a layer's arithmetic cut along its inputs, for the exchange
optim      the update rule of the original, and the means of each layer
schedule   the learning rates (changes: what a recipe says of them in words)
evaluate   ten views, averaged probabilities, top-1 and top-5 errors
summary    the layer table: sizes, parameters, multiply-adds, memory, what crosses

This package knows nothing of files, data sets or Ray.
"""
