"""Convolution layers on CPUs by FFT: forward pass and both gradients, NumPy arrays in, NumPy arrays out."""

from nbfftconv import config as config
from nbfftconv.functional import conv1d, conv2d
from nbfftconv.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight
from nbfftconv.layer import Conv1d, Conv2d
from nbfftconv.planner import plan_conv1d, plan_conv2d
from nbfftconv.threads import get_num_threads, set_num_threads
from nbfftconv.transposed import conv_transpose1d, conv_transpose2d
from nbfftconv.transposed_layer import ConvTranspose1d, ConvTranspose2d

#: The only place that has the version: a literal, which the build reads without importing the package.
__version__ = "0.1.0"

__all__ = [
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "conv1d",
    "conv1d_input",
    "conv1d_weight",
    "conv2d",
    "conv2d_input",
    "conv2d_weight",
    "conv_transpose1d",
    "conv_transpose2d",
    "get_num_threads",
    "plan_conv1d",
    "plan_conv2d",
    "set_num_threads",
]
