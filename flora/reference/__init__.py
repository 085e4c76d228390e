"""A plain PyTorch twin of every function of ``flora._core``: same names, same arguments, same effect; a file a family.

These are the formulas in their shortest form. The tests compare every C body with them, and `flora.functional` runs
their differentiable halves (the functions that return a value) where the C kernels cannot go: other devices, tensor
subclasses, ``torch.func``, double backward.
"""

from flora.reference.conv import conv_input_gradient, conv_weight_gradient, pad_input
from flora.reference.dropout import drop
from flora.reference.kronecker import (
    kronecker_backward,
    kronecker_delta,
    kronecker_forward,
    kronecker_reconstruct,
    kronecker_reconstruct_backward,
    kronecker_update,
)
from flora.reference.product import multiply
from flora.reference.rescale import rescale_backward, rescale_delta, rescale_linear_backward, rescale_reconstruct
from flora.reference.toeplitz import (
    toeplitz,
    toeplitz_backward,
    toeplitz_delta,
    toeplitz_forward,
    toeplitz_multiply,
    toeplitz_reconstruct,
    toeplitz_reconstruct_backward,
    toeplitz_update,
)
from flora.reference.tucker import (
    conv_core,
    conv_expand,
    conv_project,
    conv_update,
    linear_update,
    mode_product,
    reconstruct,
    tucker_conv_backward,
    tucker_conv_forward,
    tucker_linear_backward,
    tucker_linear_forward,
    tucker_reconstruct,
    tucker_reconstruct_backward,
)

__all__ = [
    "conv_core",
    "conv_expand",
    "conv_input_gradient",
    "conv_project",
    "conv_update",
    "conv_weight_gradient",
    "drop",
    "kronecker_backward",
    "kronecker_delta",
    "kronecker_forward",
    "kronecker_reconstruct",
    "kronecker_reconstruct_backward",
    "kronecker_update",
    "linear_update",
    "mode_product",
    "multiply",
    "pad_input",
    "reconstruct",
    "rescale_backward",
    "rescale_delta",
    "rescale_linear_backward",
    "rescale_reconstruct",
    "toeplitz",
    "toeplitz_backward",
    "toeplitz_delta",
    "toeplitz_forward",
    "toeplitz_multiply",
    "toeplitz_reconstruct",
    "toeplitz_reconstruct_backward",
    "toeplitz_update",
    "tucker_conv_backward",
    "tucker_conv_forward",
    "tucker_linear_backward",
    "tucker_linear_forward",
    "tucker_reconstruct",
    "tucker_reconstruct_backward",
]
