"""Local response normalisation, alone or together with the ReLU and the pooling around it.

kernels.c     what a CPU runs, with *.inc
build         ... compiled once by the system's C compiler, and kept
native        ... called
triton_gpu    what a GPU runs
contrast      what was tried in its place: local contrast normalisation
batch         ... and batch normalisation
composed      the same out of torch's own operations: for all other cases, and to test against
images      what makes images ready for the first convolution, a kernel of the same library

`local_response_norm` and the others take what is quickest for the tensor they get;
`describe_backend` says what that is. Every form computes the same numbers, within rounding.
"""

from model.norm.alternatives import LCN_SIZE, BatchNorm, local_contrast_norm
from model.norm.native import padded_images
from model.norm.reference import LRN_ALPHA, LRN_BETA, LRN_K, LRN_SIZE
from model.norm.response import (
    describe_backend,
    local_response_norm,
    norm_pool,
    spatial_response_norm,
)

__all__ = [
    "LCN_SIZE",
    "LRN_ALPHA",
    "LRN_BETA",
    "LRN_K",
    "LRN_SIZE",
    "BatchNorm",
    "describe_backend",
    "local_contrast_norm",
    "local_response_norm",
    "norm_pool",
    "padded_images",
    "spatial_response_norm",
]
