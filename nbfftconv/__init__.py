"""Convolution layers on CPUs by FFT: forward pass and both gradients, NumPy arrays in, NumPy arrays out."""

from nbfftconv import config as config
from nbfftconv.functional import conv1d, conv2d, conv3d
from nbfftconv.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight, conv3d_input, conv3d_weight
from nbfftconv.layer import Conv1d, Conv2d, Conv3d
from nbfftconv.planner import plan_conv1d, plan_conv2d, plan_conv3d
from nbfftconv.threads import get_num_threads, set_num_threads
from nbfftconv.transposed import conv_transpose1d, conv_transpose2d, conv_transpose3d
from nbfftconv.transposed_layer import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d

#: The only place that has the version: a literal, which the build reads without importing the package.
__version__ = "0.1.0"

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "conv1d",
    "conv1d_input",
    "conv1d_weight",
    "conv2d",
    "conv2d_input",
    "conv2d_weight",
    "conv3d",
    "conv3d_input",
    "conv3d_weight",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "get_num_threads",
    "plan_conv1d",
    "plan_conv2d",
    "plan_conv3d",
    "set_num_threads",
]
