"""conv_transpose1d, conv_transpose2d, conv_transpose3d: gradients of convolutions at their input, as layers.

Arguments and semantics are those of `torch.nn.functional`.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv import scratch
from nbfftconv.arguments import as_batch, as_given, as_kernels, check_activation, check_bias, size_of
from nbfftconv.arrays import check_out, compact, result_type
from nbfftconv.geometry import Numbers, Padding, TransposedGeometry, check_flag
from nbfftconv.implementations import Kernels, add_bias, registry
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan
from nbfftconv.run import run_conv_transpose


def _conv_transpose(
    axes: int,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: Any,
    padding: Padding,
    output_padding: Any,
    groups: int,
    dilation: Any,
    activation: str | None,
    channels_last: bool,
    out: np.ndarray | None,
) -> np.ndarray:
    """Convolve what has so many spatial axes, transposed."""
    is_last = check_flag("channels_last", channels_last)
    (x, is_batch), w = as_batch("input", input, axes, is_last), as_kernels("weight", weight, axes)
    numbers = stride, padding, output_padding, groups, dilation
    geometry = TransposedGeometry.from_arguments(x.shape, w.shape, *numbers, axes)
    b = check_bias(bias, geometry.output_size[1], result_type(x, w))
    check_activation(activation)
    dtype = result_type(x, w) if b is None else result_type(x, w, b)
    if out is not None:
        check_out(out, size_of(geometry.output_size, is_batch, is_last), dtype)
    images = geometry.convolution.of_images
    plan = make_plan(images, "grad_input", dtype)
    kernels = registry.get(plan.algorithm).prepare(plan, compact(w, dtype).reshape(images.weight_size))
    result = as_given(run_transposed(geometry, plan, kernels, x, b, activation), is_batch, is_last)
    if out is None:
        return result
    np.asarray(out)[...] = result
    return out


def run_transposed(
    geometry: TransposedGeometry,
    plan: ConvPlan,
    kernels: Kernels,
    x: np.ndarray,
    bias: np.ndarray | None,
    activation: str | None,
) -> np.ndarray:
    """Run the forward pass, a gradient at the input, on validated arguments."""
    x = x.reshape(geometry.convolution.of_images.output_shape)
    result = run_conv_transpose(plan, kernels, x, bias, activation).reshape(geometry.convolution.input_size)
    if any(geometry.beyond):  # where there is nothing but the bias
        reached, result = result, scratch.result(geometry.output_size, plan.dtype)
        result[...] = 0
        add_bias(result, None if bias is None else bias.astype(plan.dtype), activation == "relu")
        if not any(geometry.left_out):
            result[tuple(map(slice, reached.shape))] = reached
    return result


def gradient_of_convolution(geometry: TransposedGeometry, g: np.ndarray) -> np.ndarray:
    """Return the gradient at the input of `geometry.convolution`, given that at the output."""
    size = geometry.convolution.input_size
    return np.zeros(size, g.dtype) if any(geometry.left_out) else g[tuple(map(slice, size))]


def conv_transpose1d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    activation: str | None = None,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Convolve sequences with kernels, transposed, as `torch.nn.functional.conv_transpose1d` does; on NumPy arrays.

    It is the gradient of `conv1d` at its input: each sample of the input adds its multiple of the kernels to the
    output.

    Parameters
    ----------
    input : array_like, shape (batch, channels, length) or (channels, length)
        Sequences of float32 or float64, in any memory layout and byte order. The batch may be empty.
    weight : array_like, shape (channels, out channels / groups, kernel length)
        Kernels of float32 or float64.
    bias : array_like, shape (out channels,), optional
        As in `conv2d`.
    stride : int or tuple of int, default 1
        Samples of the output from where a sample of the input is added to where the next one is.
    padding : int or tuple, default 0
        Samples of the output that are left out: one number, or (left, right).
    output_padding : int or tuple of int, default 0
        Samples that the output is longer at its end; less than `stride` or less than `dilation`.
    groups : int, default 1
        As in `conv2d`.
    dilation : int or tuple of int, default 1
        As in `conv1d`.
    activation : {None, "relu"}, default None
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of input, result and `out`.
    out : numpy.ndarray, optional
        As in `conv2d`.

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out length)
        Without the batch if `input` has none. Its length is (length - 1) * stride - left - right + output_padding + 1 +
        dilation * (kernel length - 1). Of the dtype to which NumPy promotes the arguments' dtypes. `out`, if it was
        given.

    Raises
    ------
    TypeError
        As `conv2d` does.
    ValueError
        If shapes do not match, a number is out of range, a name is unknown, or the output would be empty.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.array([[[1, 2, 3]]], np.float32)
    >>> w = np.array([[[1, 10, 100]]], np.float32)
    >>> nbfftconv.conv_transpose1d(x, w, stride=2)
    array([[[  1.,  10., 102.,  20., 203.,  30., 300.]]], dtype=float32)
    """
    arguments = stride, padding, output_padding, groups, dilation, activation, channels_last, out
    return _conv_transpose(1, input, weight, bias, *arguments)


def conv_transpose2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    activation: str | None = None,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Convolve images with kernels, transposed, as `torch.nn.functional.conv_transpose2d` does; on NumPy arrays.

    It is the gradient of `conv2d` at its input: each pixel of the input adds its multiple of the kernels to the output.

    Parameters
    ----------
    input : array_like, shape (batch, channels, height, width) or (channels, height, width)
        Images of float32 or float64, in any memory layout and byte order. The batch may be empty.
    weight : array_like, shape (channels, out channels / groups, kernel height, kernel width)
        Kernels of float32 or float64.
    bias : array_like, shape (out channels,), optional
        As in `conv2d`.
    stride : int or tuple of int, default 1
        Pixels of the output from where a pixel of the input is added to where the next one is: one number, or
        (vertical, horizontal).
    padding : int or tuple, default 0
        Pixels of the output that are left out: one number, (vertical, horizontal), or ((top, bottom), (left, right)).
    output_padding : int or tuple of int, default 0
        Pixels that the output is larger at its end: one number, or (vertical, horizontal); less than `stride` or less
        than `dilation`.
    groups : int, default 1
        As in `conv2d`.
    dilation : int or tuple of int, default 1
        As in `conv2d`.
    activation : {None, "relu"}, default None
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of input, result and `out`.
    out : numpy.ndarray, optional
        As in `conv2d`.

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out height, out width)
        Without the batch if `input` has none. Its height is (height - 1) * stride - top - bottom + output_padding + 1 +
        dilation * (kernel height - 1), and so is its width. Of the dtype to which NumPy promotes the arguments' dtypes.
        `out`, if it was given.

    Raises
    ------
    TypeError
        As `conv2d` does.
    ValueError
        If shapes do not match, a number is out of range, a name is unknown, or the output would be empty.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x, w = np.ones((1, 3, 8, 8), np.float32), np.ones((3, 2, 2, 2), np.float32)
    >>> y = nbfftconv.conv_transpose2d(x, w, bias=[0, 1], stride=2)
    >>> y.shape, float(y[0, 0, 3, 5]), float(y[0, 1, 3, 5])  # 3 channels, one tap each, and the bias
    ((1, 2, 16, 16), 3.0, 4.0)
    """
    arguments = stride, padding, output_padding, groups, dilation, activation, channels_last, out
    return _conv_transpose(2, input, weight, bias, *arguments)


def conv_transpose3d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Numbers = 1,
    padding: Padding = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    activation: str | None = None,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Convolve volumes with kernels, transposed, as `torch.nn.functional.conv_transpose3d` does; on NumPy arrays.

    It is the gradient of `conv3d` at its input: each voxel of the input adds its multiple of the kernels to the
    output.

    Parameters
    ----------
    input : array_like, shape (batch, channels, depth, height, width) or (channels, depth, height, width)
        Volumes of float32 or float64, in any memory layout and byte order. The batch may be empty.
    weight : array_like, shape (channels, out channels / groups, kernel depth, kernel height, kernel width)
        Kernels of float32 or float64.
    bias : array_like, shape (out channels,), optional
        As in `conv2d`.
    stride : int or tuple of int, default 1
        Voxels of the output from where a voxel of the input is added to where the next one is: one number, or (in
        depth, vertical, horizontal).
    padding : int or tuple, default 0
        Voxels of the output that are left out: one number, (in depth, vertical, horizontal), or ((front, back), (top,
        bottom), (left, right)).
    output_padding : int or tuple of int, default 0
        Voxels that the output is longer at the end of each axis; less than `stride` or less than `dilation`.
    groups : int, default 1
        As in `conv2d`.
    dilation : int or tuple of int, default 1
        As in `conv3d`.
    activation : {None, "relu"}, default None
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of input, result and `out`.
    out : numpy.ndarray, optional
        As in `conv2d`.

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out depth, out height, out width)
        Without the batch if `input` has none. Along each axis its size is that of `conv_transpose1d`.
        Of the dtype to which NumPy promotes the arguments' dtypes. `out`, if it was
        given.

    Raises
    ------
    TypeError
        As `conv2d` does.
    ValueError
        If shapes do not match, a number is out of range, a name is unknown, or the output would be empty.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.ones((1, 4, 3, 5, 6), np.float32)
    >>> w = np.ones((4, 2, 2, 2, 2), np.float32)
    >>> nbfftconv.conv_transpose3d(x, w, stride=2).shape
    (1, 2, 6, 10, 12)
    """
    arguments = stride, padding, output_padding, groups, dilation, activation, channels_last, out
    return _conv_transpose(3, input, weight, bias, *arguments)
