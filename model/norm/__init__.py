"""Local response normalization, alone or fused with the ReLU and the pooling around it.

alternatives  local contrast normalization and batch normalization
gpu           launches the Triton kernels of a GPU on tensors
kernels.c     C kernels for a CPU; kernels.inc is their body, included once per number type
native        compiles the C kernels once, loads and calls them
reference     the same in torch's own operations: fallback, and oracle of the tests
response      the functions that the network calls: each picks the fastest form for its tensor
"""

from model.norm.alternatives import BatchNorm, local_contrast_norm
from model.norm.native import pad_images
from model.norm.reference import Response
from model.norm.response import (
    describe_backend,
    local_response_norm,
    norm_pool,
    spatial_response_norm,
)

__all__ = [
    "BatchNorm",
    "Response",
    "describe_backend",
    "local_contrast_norm",
    "local_response_norm",
    "norm_pool",
    "pad_images",
    "spatial_response_norm",
]
