"""nbfftconv for PyTorch: differentiable functions, layers, and networks converted by one line.

Needs PyTorch 2.6 or later (``pip install nbfftconv[torch]``); the rest of the package never imports it.
"""

from nbfftconv.hosts import Choice
from nbfftconv.torch import pool as _pool
from nbfftconv.torch.conversion import Report, convert, report, revert
from nbfftconv.torch.functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from nbfftconv.torch.layers import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d

_pool.share()

__all__ = [
    "Choice",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Report",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "report",
    "revert",
]
