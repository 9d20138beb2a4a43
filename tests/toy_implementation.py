"""An implementation as somebody might add one: sums over sliding windows, by NumPy."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from nbfftconv.implementations import Candidates, Implementation, Kernels
from nbfftconv.plan import ConvPlan


@dataclass(frozen=True, kw_only=True)
class ToyPlan(ConvPlan):
    algorithm: ClassVar[str] = "toy"


def windows(geometry, input):
    """The padded input, and the pixels under the taps at each output: [image, group, channel, y, x, u, v]."""
    (sy, sx), (dy, dx), (height, width) = geometry.stride, geometry.dilation, geometry.weight_size[2:]
    padded = np.pad(input, ((0, 0), (0, 0), *geometry.padding))
    extent = dy * (height - 1) + 1, dx * (width - 1) + 1
    seen = sliding_window_view(padded, extent, (2, 3), writeable=True)[:, :, ::sy, ::sx, ::dy, ::dx]
    return padded, grouped(geometry, seen, 1)


def grouped(geometry, array, axis):
    shape = array.shape
    return array.reshape(*shape[:axis], geometry.groups, shape[axis] // geometry.groups, *shape[axis + 1 :])


class Toy(Implementation[ToyPlan, Kernels]):
    name = ToyPlan.algorithm
    phrase = "by a toy"

    def __init__(self, rate=1e-9):
        self.rate = rate

    def candidates(self, request):
        seconds = self.rate * request.geometry.multiply_adds
        fields = {"geometry": request.geometry, "direction": request.direction, "dtype": request.dtype}
        return Candidates(ToyPlan(**fields, scratch_bytes=0, weight_bytes=0, reason="", seconds=seconds))

    def prepare(self, plan, weight):
        return Kernels(weight)

    def forward(self, plan, geometry, input, kernels, bias, relu, output, keep=False):
        seen, w = windows(geometry, input)[1], grouped(geometry, kernels.weight, 0)
        output[...] = np.einsum("ngcyxuv,gkcuv->ngkyx", seen, w).reshape(output.shape)
        if bias is not None:
            output += bias[:, None, None]
        if relu:
            np.maximum(output, 0, out=output)

    def grad_input(self, plan, geometry, kernels, grad_output, result):
        padded, seen = windows(geometry, np.zeros(geometry.input_size, plan.dtype))
        w, g = grouped(geometry, kernels.weight, 0), grouped(geometry, grad_output, 1)
        for u, v in np.ndindex(geometry.weight_size[2:]):
            seen[..., u, v] += np.einsum("ngkyx,gkc->ngcyx", g, w[..., u, v])
        (top, _), (left, _) = geometry.padding
        result[...] = padded[:, :, top : top + result.shape[2], left : left + result.shape[3]]

    def grad_weight(self, plan, geometry, input, grad_output, result):
        seen, g = windows(geometry, input)[1], grouped(geometry, grad_output, 1)
        result[...] = np.einsum("ngcyxuv,ngkyx->gkcuv", seen, g).reshape(result.shape)


TOY = Toy()
