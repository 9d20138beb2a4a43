"""Convolutions of tensors that nobody is to know of, and that are ready: what was found out at the first is known.

These are most calls of a network in inference. They need neither an operator of PyTorch's nor a look at the geometry.
"""

import contextlib
from typing import Any

import numpy as np
import torch

from nbfftconv import scratch
from nbfftconv.arrays import address_of
from nbfftconv.geometry import ConvGeometry
from nbfftconv.kept_kernels import Kept, keep_call
from nbfftconv.plan import ConvPlan
from nbfftconv.run import ReadyPass
from nbfftconv.torch.arrays import array_of, dtype_of, geometry_of, is_last, memory_of, tensor_last, tensor_of
from nbfftconv.torch.kept_weights import known_kernels_of

_PLAIN = torch.Tensor, torch.nn.Parameter


def is_alone(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody is to know of a call: no derivatives, transformations, modes, subclasses, and no profiler."""
    is_differentiable = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (is_differentiable and tensor.requires_grad)):
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
    )


def _is_like(tensor: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> bool:
    """Whether a tensor is of a dtype and size, and its memory has its values as they are."""
    return (
        tensor.dtype is dtype
        and tensor.shape == size
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


class ReadyConvolution(ReadyPass):
    """Convolutions with one weight of tensors of one size.

    Parameters
    ----------
    plan : ConvPlan
    kept : Kept
    given : ConvGeometry
        Of the tensors.
    has_bias, relu : bool
    """

    def __init__(self, plan: ConvPlan, kept: Kept, given: ConvGeometry, has_bias: bool, relu: bool) -> None:
        super().__init__(plan, kept, has_bias, relu, given.output_size)
        self._input_size, self._bias_size = given.input_size, given.weight_size[:1]
        self._tensor_dtype = torch.from_numpy(np.empty(0, plan.dtype)).dtype

    def __call__(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Convolve; None if the tensors are not such as were expected."""
        dtype = self._tensor_dtype
        if not _is_like(input, dtype, self._input_size):
            return None
        stays_last, of_bias = self._geometry.channels_last, 0
        if bias is not None:
            if not (_is_like(bias, dtype, self._bias_size) and bias.is_contiguous()):
                return None
            of_bias = bias.data_ptr()
        x = None
        if not input.is_contiguous():
            if not is_last(input):
                return None
            x = None if stays_last else array_of(input)
        elif stays_last:
            return None
        y = scratch.result(self._geometry.output_shape if stays_last else self._size, self._dtype)
        left = self._run(input.data_ptr() if x is None else address_of(x), of_bias, address_of(y))
        if left is not None:
            self._finish(left, memory_of(input) if x is None else x, None if bias is None else array_of(bias), y)
        return tensor_last(y, self._size) if stays_last else tensor_of(y, x is not None)


def make_ready(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: tuple[Any, ...],
    numbers: tuple[Any, ...],
) -> None:
    """Make a call like this one ready, of which `numbers` are the settings as the operator has them."""
    kernels = known_kernels_of(weight)
    if kernels is None or not is_alone(input, weight, bias):
        return
    *of_geometry, relu = numbers
    given = geometry_of(input.shape, weight.shape, of_geometry)
    plan = kernels.plan(given.of_images, dtype_of(weight), "auto", is_last(input))
    kept = kernels.forms.get(plan.kernel_form)
    if kept is None:
        return
    with contextlib.suppress(TypeError):  # settings that are lists
        call = ReadyConvolution(plan, kept, given, bias is not None, relu)
        keep_call(kernels.calls, (input.shape, is_last(input), bias is None, settings), call)


def convolve_again(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: tuple[Any, ...]
) -> torch.Tensor | None:
    """Convolve if that is ready; None if it is not. `settings` are all that the call has beside its tensors."""
    kernels = known_kernels_of(weight)
    if kernels is None:
        return None
    try:
        call = kernels.calls.get((input.shape, is_last(input), bias is None, settings))
    except TypeError:  # lists
        return None
    if call is None or not call.is_current() or torch.is_autocast_enabled("cpu"):
        return None
    return call(input, bias) if is_alone(input, weight, bias) else None
