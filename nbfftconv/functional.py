"""conv1d, conv2d, conv3d: forward passes, arrays in, arrays out. Semantics are those of `torch.nn.functional`."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv import padding as padding_modes
from nbfftconv.arguments import (
    as_batch,
    as_given,
    as_kernels,
    check_activation,
    check_bias,
    first_size,
    geometry_for,
    plan_for,
    size_of,
    without_channels,
)
from nbfftconv.arrays import check_out, compact, result_type
from nbfftconv.channels_last import to_channels_first
from nbfftconv.geometry import Padding, check_flag
from nbfftconv.implementations import registry
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import plan_channels_last
from nbfftconv.run import run_forward


def _conv(
    axes: int,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: Any,
    padding: Padding,
    dilation: Any,
    groups: int,
    padding_mode: str,
    activation: str | None,
    algorithm: str,
    channels_last: bool,
    out: np.ndarray | None,
    plan: ConvPlan | None,
) -> np.ndarray:
    """Convolve what has so many spatial axes."""
    is_last = check_flag("channels_last", channels_last)
    (x, is_batch), w = as_batch("input", input, axes), as_kernels("weight", weight, axes)
    size = first_size(x.shape, is_last)
    geometry, is_empty = geometry_for(size, w.shape, stride, padding, dilation, groups, axes)
    b = check_bias(bias, w.shape[0], result_type(x, w))
    padding_modes.check(geometry, padding_mode)
    check_activation(activation)
    dtype = result_type(x, w) if b is None else result_type(x, w, b)
    size = without_channels(geometry.output_size) if is_empty else geometry.output_size
    if out is not None:
        check_out(out, size_of(size, is_batch, is_last), dtype)
    if is_empty:
        return as_given(np.empty(size, dtype), is_batch, is_last) if out is None else out
    images, is_given = geometry.of_images, plan is not None
    plan = plan_for(plan, algorithm, images, "forward", dtype)
    if is_last and padding_mode == "zeros" and not is_given:
        plan = plan_channels_last(plan, algorithm, weight_is_transformed=False)
    stays_last = plan.geometry.channels_last
    if is_last and not stays_last:
        x = to_channels_first(x)
    kernels = registry.get(plan.algorithm).prepare(plan, compact(w, dtype).reshape(images.weight_size))
    at_once = None
    if out is not None and out.flags.c_contiguous and is_last == stays_last:
        at_once = np.asarray(out).reshape(plan.geometry.output_shape)  # of a subclass, its memory
    result, _ = run_forward(plan, x.reshape(plan.geometry.input_shape), kernels, b, padding_mode, activation, at_once)
    if out is not None and at_once is not None:
        return out
    if stays_last:
        result = result.reshape(size_of(geometry.output_size, is_batch, True))
    else:
        result = as_given(result.reshape(geometry.output_size), is_batch, is_last)
    if out is None:
        return result
    np.asarray(out)[...] = result
    return out


def conv1d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | tuple[int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    algorithm: str = "auto",
    channels_last: bool = False,
    out: np.ndarray | None = None,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    r"""Convolve sequences with kernels, as `torch.nn.functional.conv1d` does; on NumPy arrays.

    .. math:: y_{nki} = b_k + \sum_{cu} w_{kcu}\, x_{n,c,\,i s + u d - p}

    Parameters
    ----------
    input : array_like, shape (batch, channels, length) or (channels, length)
        Sequences of float32 or float64, in any memory layout and byte order. The batch may be empty.
    weight : array_like, shape (out channels, channels / groups, kernel length)
        Kernels of float32 or float64.
    bias : array_like, shape (out channels,), optional
        As in `conv2d`.
    stride : int or tuple of int, default 1
        Distance of neighbouring outputs, in samples.
    padding : int, tuple or str, default 0
        Samples around the input: one number, or (left, right), such as (k - 1, 0) for a causal convolution. Or a name,
        as in `conv2d`.
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps of a kernel, in samples.
    groups : int, default 1
        As in `conv2d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv2d`.
    activation : {None, "relu"}, default None
        As in `conv2d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of input, result and `out`.
    out : numpy.ndarray, optional
        As in `conv2d`.
    plan : ConvPlan, optional
        From `plan_conv1d` for the same geometry, dtype and direction "forward"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out length)
        Without the batch if `input` has none. Of the dtype to which NumPy promotes the arguments' dtypes. `out`, if it
        was given.

    Raises
    ------
    TypeError
        As `conv2d` does.
    ValueError
        As `conv2d` does.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    >>> w = np.ones((1, 1, 3), np.float32)
    >>> nbfftconv.conv1d(x, w)
    array([[[ 3.,  6.,  9., 12.]]], dtype=float32)
    >>> nbfftconv.conv1d(x, w, padding=(2, 0))  # causal: no output sees what comes after it
    array([[[ 0.,  1.,  3.,  6.,  9., 12.]]], dtype=float32)
    """
    arguments = stride, padding, dilation, groups, padding_mode, activation, algorithm, channels_last, out, plan
    return _conv(1, input, weight, bias, *arguments)


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    algorithm: str = "auto",
    channels_last: bool = False,
    out: np.ndarray | None = None,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    r"""Convolve images with kernels, as `torch.nn.functional.conv2d` does; on NumPy arrays.

    It is the convolution of deep learning, that is cross-correlation: kernels are not flipped.

    .. math:: y_{nkij} = b_k + \sum_{cuv} w_{kcuv}\, x_{n,c,\,i s + u d - p,\,j s + v d - p}

    Parameters
    ----------
    input : array_like, shape (batch, channels, height, width) or (channels, height, width)
        Images of float32 or float64, in any memory layout and byte order. The batch may be empty. Without channels the
        result has none, as in PyTorch.
    weight : array_like, shape (out channels, channels / groups, kernel height, kernel width)
        Kernels of float32 or float64.
    bias : array_like, shape (out channels,), optional
        Added to each out channel; float32 or float64. Numbers in a list or a tuple take the dtype of the other arrays,
        whatever they are.
    stride : int or tuple of int, default 1
        Distance of neighbouring outputs, in pixels: one number, or (vertical, horizontal).
    padding : int, tuple or str, default 0
        Pixels around the input: one number, (vertical, horizontal), or ((top, bottom), (left, right)). Or a name:
        "valid" is 0; "same" keeps the size, needs stride 1 and puts the odd pixel of an even kernel at the end, as
        PyTorch does; "full" is that of `scipy.signal.correlate`, every position at which kernel and input overlap.
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps of a kernel, in pixels: one number, or (vertical, horizontal).
    groups : int, default 1
        Groups of channels that are convolved apart, each with its own kernels.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        What the padding holds, as in `torch.nn.Conv2d`.
    activation : {None, "relu"}, default None
        Applied to the result while it is written.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        What computes it; "auto" leaves that to the planner. An FFT's errors are relative to the largest values near
        by, those of "direct" to each value's own products: docs/accuracy.md.
    channels_last : bool, default False
        Whether input, result and `out` are (batch, height, width, channels) instead, with or without the batch.
    out : numpy.ndarray, optional
        Takes the result; of its shape and dtype, without a mask. It may overlap the other arrays.
    plan : ConvPlan, optional
        From `plan_conv2d` for the same geometry, dtype and direction "forward"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out height, out width)
        Without the batch if `input` has none. Of the dtype to which NumPy promotes the arguments' dtypes. `out`, if it
        was given.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, a size is no integer, or `out` has another dtype than
        the result.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    References
    ----------
    "Fast Training of Convolutional Networks through FFTs", M. Mathieu, M. Henaff, Y. LeCun, ICLR 2014.

    Examples
    --------
    Two images of three channels and 8 × 8 pixels, four filters of 3 × 3:

    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.ones((2, 3, 8, 8), np.float32)
    >>> w = np.ones((4, 3, 3, 3), np.float32)
    >>> nbfftconv.conv2d(x, w).shape
    (2, 4, 6, 6)
    >>> y = nbfftconv.conv2d(x, w, bias=[0, 1, 2, -30], padding="same", activation="relu")
    >>> y.shape, y.dtype
    ((2, 4, 8, 8), dtype('float32'))
    >>> y[0, :, 4, 4]  # 3 channels × 9 taps, and the bias, clipped
    array([27., 28., 29.,  0.], dtype=float32)
    """
    arguments = stride, padding, dilation, groups, padding_mode, activation, algorithm, channels_last, out, plan
    return _conv(2, input, weight, bias, *arguments)


def conv3d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int | tuple[int, int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int, int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    algorithm: str = "auto",
    channels_last: bool = False,
    out: np.ndarray | None = None,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    r"""Convolve volumes with kernels, as `torch.nn.functional.conv3d` does; on NumPy arrays.

    .. math:: y_{nkhij} = b_k + \sum_{ctuv} w_{kctuv}\, x_{n,c,\,h s + t d - p,\,i s + u d - p,\,j s + v d - p}

    Parameters
    ----------
    input : array_like, shape (batch, channels, depth, height, width) or (channels, depth, height, width)
        Volumes of float32 or float64, in any memory layout and byte order. The batch may be empty.
    weight : array_like, shape (out channels, channels / groups, kernel depth, kernel height, kernel width)
        Kernels of float32 or float64.
    bias : array_like, shape (out channels,), optional
        As in `conv2d`.
    stride : int or tuple of int, default 1
        Distance of neighbouring outputs, in voxels: one number, or (in depth, vertical, horizontal).
    padding : int, tuple or str, default 0
        Voxels around the input: one number, (in depth, vertical, horizontal), or ((front, back), (top, bottom),
        (left, right)). Or a name, as in `conv2d`.
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps of a kernel, in voxels: one number, or (in depth, vertical, horizontal).
    groups : int, default 1
        As in `conv2d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv2d`.
    activation : {None, "relu"}, default None
        As in `conv2d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of input, result and `out`.
    out : numpy.ndarray, optional
        As in `conv2d`.
    plan : ConvPlan, optional
        From `plan_conv3d` for the same geometry, dtype and direction "forward"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out depth, out height, out width)
        Without the batch if `input` has none. Of the dtype to which NumPy promotes the arguments' dtypes. `out`, if it
        was given.

    Raises
    ------
    TypeError
        As `conv2d` does.
    ValueError
        As `conv2d` does.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.ones((1, 2, 5, 6, 7), np.float32)
    >>> w = np.ones((4, 2, 3, 3, 3), np.float32)
    >>> nbfftconv.conv3d(x, w).shape
    (1, 4, 3, 4, 5)
    >>> y = nbfftconv.conv3d(x, w, padding="same")
    >>> float(y[0, 0, 2, 2, 2]), float(y[0, 0, 0, 0, 0])  # 2 channels × 27 taps; in a corner, 8 of them
    (54.0, 16.0)
    """
    arguments = stride, padding, dilation, groups, padding_mode, activation, algorithm, channels_last, out, plan
    return _conv(3, input, weight, bias, *arguments)
