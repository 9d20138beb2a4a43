"""Convolution layers on CPUs by FFT: forward pass and both gradients, NumPy arrays in, NumPy arrays out."""

from nbfftconv import config as config
from nbfftconv.functional import conv2d, conv2d_input, conv2d_weight
from nbfftconv.layer import Conv2d
from nbfftconv.planner import plan_conv2d
from nbfftconv.threads import get_num_threads, set_num_threads

#: The only place that has the version: a literal, which the build reads without importing the package.
__version__ = "0.1.0"

__all__ = [
    "Conv2d",
    "conv2d",
    "conv2d_input",
    "conv2d_weight",
    "get_num_threads",
    "plan_conv2d",
    "set_num_threads",
]
