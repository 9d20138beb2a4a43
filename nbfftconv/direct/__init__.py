"""Direct convolution, for geometries where an FFT does not pay.

The forward pass is in `dense`, on the matrix unit in `split_dense`, for groups of few filters in `depthwise`, and of
arrays whose channels come last in `last`; the gradient with respect to the kernels
is in `dense_grad_weight` and, for groups of few filters, in `gradients`. Every pair of a pixel and a tap is
multiplied, also if the pixel is a zero of the padding: 0·inf is NaN. Arrays are C-contiguous, of one dtype and the
geometry's sizes.
"""

from typing import Any

import numpy as np

from nbfftconv.arrays import address_of
from nbfftconv.direct import dense, dense_grad_weight, depthwise, gradients, last, split_dense
from nbfftconv.geometry import FLAT, ConvGeometry
from nbfftconv.scratch import Memory
from nbfftconv.volumes import fold_input, unfold_input, unfold_output, unfolded

__all__ = [
    "Forward",
    "forward",
    "grad_input",
    "grad_weight",
    "grad_weight_bytes",
    "pack",
    "packed_bytes",
    "scratch_bytes",
]


def _module_of(geometry: ConvGeometry, dtype: np.dtype) -> Any:
    """Return the module that has the forward pass of a geometry."""
    if geometry.channels_last:
        return last
    if depthwise.fits(geometry, dtype):
        return depthwise
    return split_dense if split_dense.fits(geometry, dtype) else dense


def pack(geometry: ConvGeometry, w: np.ndarray) -> Memory | None:
    """Return the kernels in the order in which `forward` reads them, None if that is their own."""
    module = _module_of(geometry, w.dtype)
    return None if module is depthwise else module.pack(geometry, w)


def packed_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of what `pack` returns."""
    module = _module_of(geometry, dtype)
    return 0 if module is depthwise else module.packed_bytes(geometry, dtype)


def scratch_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of scratch memory of each thread of `forward`."""
    return _module_of(geometry, dtype).scratch_bytes(geometry, dtype)


class Forward:
    """The forward pass of some kernels, for calls that differ in their arrays only.

    Parameters
    ----------
    geometry : ConvGeometry
    w : numpy.ndarray
        Of the dtype of all arrays.
    packed : Memory or None
        What `pack` made of `w`.
    has_bias, relu : bool
    """

    def __init__(
        self, geometry: ConvGeometry, w: np.ndarray, packed: Memory | None, has_bias: bool, relu: bool
    ) -> None:
        self._geometry, self._kernels, self._relu = geometry, w, relu
        module = _module_of(geometry, w.dtype)
        if module is depthwise:
            self._weight = address_of(w)
        else:
            self._packed = module.pack(geometry, w) if packed is None else packed
            self._weight = self._packed.address
        self._programs = module.programs(geometry, w.dtype, has_bias, relu)
        self._is_exact = split_dense.is_exact if module is split_dense else None

    def run(self, x: int, bias: int, y: int) -> bool:
        """Convolve what is at an address into what is at another one; tell whether `convolve` is to do it again.

        `bias` is 0 if there is none.
        """
        noted = self._programs.run(input=x, weight=self._weight, output=y, bias=bias)
        return self._is_exact is not None and not self._is_exact(noted)

    def convolve(self, x: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
        """Convolve `x` into `y` in the arithmetic of its dtype, where `run` was less exact than that."""
        packed = dense.pack(self._geometry, self._kernels)
        programs = dense.programs(self._geometry, x.dtype, bias is not None, self._relu)
        programs.run(input=address_of(x), weight=packed.address, output=address_of(y), bias=address_of(bias))


def forward(
    geometry: ConvGeometry,
    x: np.ndarray,
    w: np.ndarray,
    packed: Memory | None,
    bias: np.ndarray | None,
    relu: bool,
    y: np.ndarray,
) -> None:
    """Convolve `x` into `y`; `packed` is what `pack` made of `w`, or None."""
    of_pass = Forward(geometry, w, packed, bias is not None, relu)
    if of_pass.run(address_of(x), address_of(bias), address_of(y)):
        of_pass.convolve(x, bias, y)


def grad_weight_bytes(geometry: ConvGeometry, dtype: np.dtype) -> tuple[int, int]:
    """Bytes of scratch memory of each thread of `grad_weight`, and of sums that it keeps until they are added up."""
    if not dense_grad_weight.fits(geometry, dtype):
        return 0, 0
    return dense_grad_weight.scratch_bytes(geometry, dtype), dense_grad_weight.sums_bytes(geometry, dtype)


def grad_weight(geometry: ConvGeometry, x: np.ndarray, dw: np.ndarray, g: np.ndarray) -> None:
    """Compute the gradient with respect to the kernels into `dw`."""
    if geometry.depth != FLAT:
        x, g, geometry = unfold_input(geometry, x), unfold_output(geometry, g), unfolded(geometry)
    if dense_grad_weight.fits(geometry, x.dtype):
        dense_grad_weight.grad_weight(geometry, x, dw, g)
    else:
        gradients.grad_weight(geometry, x, dw, g)


def grad_input(geometry: ConvGeometry, dx: np.ndarray, w: np.ndarray, g: np.ndarray) -> None:
    """Compute the gradient with respect to the input into `dx`."""
    if geometry.depth == FLAT:
        gradients.grad_input(geometry, dx, w, g)
        return
    of_images = np.empty(geometry.input_size, dx.dtype)
    gradients.grad_input(unfolded(geometry), of_images, w, unfold_output(geometry, g))
    fold_input(geometry, of_images, dx)
