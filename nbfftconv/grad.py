"""Gradients of conv1d, conv2d and conv3d with respect to kernels and input. Semantics are those of `torch.nn.grad`."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv import padding as padding_modes
from nbfftconv.arguments import (
    as_batch,
    as_given,
    as_kernels,
    geometry_for,
    plan_for,
    size_of,
    without_channels,
)
from nbfftconv.arrays import check_shape, compact, result_type
from nbfftconv.geometry import ConvGeometry, Padding, check_flag
from nbfftconv.implementations import registry
from nbfftconv.plan import ConvPlan
from nbfftconv.run import run_grad_input, run_grad_weight


def _grad_weight(
    axes: int,
    input: ArrayLike,
    weight_size: Any,
    grad_output: ArrayLike,
    stride: Any,
    padding: Padding,
    dilation: Any,
    groups: int,
    padding_mode: str,
    algorithm: str,
    channels_last: bool,
    plan: ConvPlan | None,
) -> np.ndarray:
    """Compute the gradient at kernels of so many spatial axes."""
    is_last = check_flag("channels_last", channels_last)
    x, is_batch = as_batch("input", input, axes, is_last)
    g, _ = as_batch("grad_output", grad_output, axes, is_last)
    geometry, is_empty = geometry_for(x.shape, weight_size, stride, padding, dilation, groups, axes)
    why = f"input {np.shape(input)} and weight {tuple(map(int, weight_size))}"
    _check_gradient(grad_output, geometry, is_empty, is_batch, is_last, why)
    padding_modes.check(geometry, padding_mode)
    if is_empty:
        return np.empty(weight_size, result_type(x, g))
    images = geometry.of_images
    plan = plan_for(plan, algorithm, images, "grad_weight", result_type(x, g))
    x, g = x.reshape(images.input_shape), g.reshape(images.output_shape)
    return run_grad_weight(plan, x, g, padding_mode).reshape(geometry.weight_size)


def _grad_input(
    axes: int,
    input_size: Any,
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: Any,
    padding: Padding,
    dilation: Any,
    groups: int,
    padding_mode: str,
    algorithm: str,
    channels_last: bool,
    plan: ConvPlan | None,
) -> np.ndarray:
    """Compute the gradient at an input of so many spatial axes."""
    is_last = check_flag("channels_last", channels_last)
    w, (g, is_batch) = as_kernels("weight", weight, axes), as_batch("grad_output", grad_output, axes, is_last)
    has_length = hasattr(input_size, "__len__")
    if not is_batch and has_length and len(input_size) == axes + 1:
        input_size = (1, *input_size)
    else:
        is_batch = True
    if is_last and has_length and len(input_size) == axes + 2:
        input_size = (input_size[0], input_size[-1], *input_size[1:-1])
    geometry, is_empty = geometry_for(input_size, w.shape, stride, padding, dilation, groups, axes)
    why = f"input {size_of(tuple(map(int, input_size)), is_batch, is_last)} and weight {w.shape}"
    _check_gradient(grad_output, geometry, is_empty, is_batch, is_last, why)
    padding_modes.check(geometry, padding_mode)
    dtype, images = result_type(w, g), geometry.of_images
    if is_empty:
        return as_given(np.empty(input_size, dtype), is_batch, is_last)
    plan = plan_for(plan, algorithm, images, "grad_input", dtype)
    kernels = registry.get(plan.algorithm).prepare(plan, compact(w, dtype).reshape(images.weight_size))
    result = run_grad_input(plan, kernels, g.reshape(images.output_shape), padding_mode)
    return as_given(result.reshape(geometry.input_size), is_batch, is_last)


def _check_gradient(
    grad_output: ArrayLike, geometry: ConvGeometry, is_empty: bool, is_batch: bool, channels_last: bool, why: str
) -> None:
    """Raise ValueError if a gradient has not the shape of the output.

    Of inputs without channels it may have those of the kernels or, as the output, none; as in `torch.nn.grad`.
    """
    array = np.asarray(grad_output)
    if is_empty and array.shape == size_of(without_channels(geometry.output_size), is_batch, channels_last):
        return
    check_shape("grad_output", array, size_of(geometry.output_size, is_batch, channels_last), why)


def conv1d_weight(
    input: ArrayLike,
    weight_size: tuple[int, int, int],
    grad_output: ArrayLike,
    stride: int | tuple[int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
    channels_last: bool = False,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the kernels of `conv1d`, as `torch.nn.grad.conv1d_weight` does.

    Parameters
    ----------
    input : array_like, shape (batch, channels, length) or (channels, length)
        What `conv1d` was given; float32 or float64.
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel length).
    grad_output : array_like, shape (batch, out channels, out length)
        Without the batch if `input` has none. Gradient of the loss with respect to the output of `conv1d`; float32 or
        float64.
    stride : int or tuple of int, default 1
        As in `conv1d`, in samples.
    padding : int, tuple or str, default 0
        As in `conv1d`: in samples, or a name.
    dilation : int or tuple of int, default 1
        As in `conv1d`, in samples.
    groups : int, default 1
        As in `conv1d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv1d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv1d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of the input and of `grad_output`.
    plan : ConvPlan, optional
        From `plan_conv1d` for the same geometry, dtype and direction "grad_weight"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, of shape `weight_size`
        Of the dtype to which NumPy promotes the arguments' dtypes.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, or a size is no integer.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.ones((2, 3, 8), np.float32)
    >>> g = np.ones((2, 4, 6), np.float32)
    >>> dw = nbfftconv.conv1d_weight(x, (4, 3, 3), g)
    >>> dw.shape
    (4, 3, 3)
    >>> float(dw[0, 0, 1])  # 2 sequences × 6 samples
    12.0
    """
    arguments = stride, padding, dilation, groups, padding_mode, algorithm, channels_last, plan
    return _grad_weight(1, input, weight_size, grad_output, *arguments)


def conv1d_input(
    input_size: tuple[int, int, int],
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: int | tuple[int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
    channels_last: bool = False,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the input of `conv1d`, as `torch.nn.grad.conv1d_input` does.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input: (batch, channels, length), or without the batch.
    weight : array_like, shape (out channels, channels / groups, kernel length)
        Kernels that `conv1d` was given; float32 or float64.
    grad_output : array_like, shape (batch, out channels, out length)
        Without the batch if `input_size` has none. Gradient of the loss with respect to the output of `conv1d`;
        float32 or float64.
    stride : int or tuple of int, default 1
        As in `conv1d`, in samples.
    padding : int, tuple or str, default 0
        As in `conv1d`: in samples, or a name.
    dilation : int or tuple of int, default 1
        As in `conv1d`, in samples.
    groups : int, default 1
        As in `conv1d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv1d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv1d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of the input and of `grad_output`.
    plan : ConvPlan, optional
        From `plan_conv1d` for the same geometry, dtype and direction "grad_input"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, of shape `input_size`
        Of the dtype to which NumPy promotes the arguments' dtypes.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, or a size is no integer.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> w = np.ones((4, 3, 3), np.float32)
    >>> g = np.ones((2, 4, 6), np.float32)
    >>> dx = nbfftconv.conv1d_input((2, 3, 8), w, g)
    >>> dx.shape
    (2, 3, 8)
    >>> float(dx[0, 0, 4]), float(dx[0, 0, 0])  # 4 filters × 3 taps; at the end, one tap
    (12.0, 4.0)
    """
    arguments = stride, padding, dilation, groups, padding_mode, algorithm, channels_last, plan
    return _grad_input(1, input_size, weight, grad_output, *arguments)


def conv2d_weight(
    input: ArrayLike,
    weight_size: tuple[int, int, int, int],
    grad_output: ArrayLike,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
    channels_last: bool = False,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the kernels of `conv2d`, as `torch.nn.grad.conv2d_weight` does.

    Parameters
    ----------
    input : array_like, shape (batch, channels, height, width) or (channels, height, width)
        What `conv2d` was given; float32 or float64.
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel height, kernel width).
    grad_output : array_like, shape (batch, out channels, out height, out width)
        Without the batch if `input` has none. Gradient of the loss with respect to the output of `conv2d`; float32 or
        float64.
    stride : int or tuple of int, default 1
        As in `conv2d`, in pixels: one number, or (vertical, horizontal).
    padding : int, tuple or str, default 0
        As in `conv2d`: in pixels, or a name.
    dilation : int or tuple of int, default 1
        As in `conv2d`, in pixels: one number, or (vertical, horizontal).
    groups : int, default 1
        As in `conv2d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv2d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of the input and of `grad_output`.
    plan : ConvPlan, optional
        From `plan_conv2d` for the same geometry, dtype and direction "grad_weight"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, of shape `weight_size`
        Of the dtype to which NumPy promotes the arguments' dtypes.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, or a size is no integer.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.ones((2, 3, 8, 8), np.float32)
    >>> g = np.ones((2, 4, 6, 6), np.float32)
    >>> dw = nbfftconv.conv2d_weight(x, (4, 3, 3, 3), g)
    >>> dw.shape
    (4, 3, 3, 3)
    >>> float(dw[0, 0, 1, 1])  # 2 images × 36 pixels
    72.0
    """
    arguments = stride, padding, dilation, groups, padding_mode, algorithm, channels_last, plan
    return _grad_weight(2, input, weight_size, grad_output, *arguments)


def conv2d_input(
    input_size: tuple[int, int, int, int],
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
    channels_last: bool = False,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the input of `conv2d`, as `torch.nn.grad.conv2d_input` does.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input: (batch, channels, height, width), or without the batch.
    weight : array_like, shape (out channels, channels / groups, kernel height, kernel width)
        Kernels that `conv2d` was given; float32 or float64.
    grad_output : array_like, shape (batch, out channels, out height, out width)
        Without the batch if `input_size` has none. Gradient of the loss with respect to the output of `conv2d`;
        float32 or float64.
    stride : int or tuple of int, default 1
        As in `conv2d`, in pixels: one number, or (vertical, horizontal).
    padding : int, tuple or str, default 0
        As in `conv2d`: in pixels, or a name.
    dilation : int or tuple of int, default 1
        As in `conv2d`, in pixels: one number, or (vertical, horizontal).
    groups : int, default 1
        As in `conv2d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv2d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv2d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of the input and of `grad_output`.
    plan : ConvPlan, optional
        From `plan_conv2d` for the same geometry, dtype and direction "grad_input"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, of shape `input_size`
        Of the dtype to which NumPy promotes the arguments' dtypes.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, or a size is no integer.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> w = np.ones((4, 3, 3, 3), np.float32)
    >>> g = np.ones((2, 4, 6, 6), np.float32)
    >>> dx = nbfftconv.conv2d_input((2, 3, 8, 8), w, g)
    >>> dx.shape
    (2, 3, 8, 8)
    >>> float(dx[0, 0, 4, 4]), float(dx[0, 0, 0, 0])  # 4 filters × 9 taps; in the corner, one tap
    (36.0, 4.0)
    """
    arguments = stride, padding, dilation, groups, padding_mode, algorithm, channels_last, plan
    return _grad_input(2, input_size, weight, grad_output, *arguments)


def conv3d_weight(
    input: ArrayLike,
    weight_size: tuple[int, int, int, int, int],
    grad_output: ArrayLike,
    stride: int | tuple[int, int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int, int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
    channels_last: bool = False,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the kernels of `conv3d`, as `torch.nn.grad.conv3d_weight` does.

    Parameters
    ----------
    input : array_like, shape (batch, channels, depth, height, width) or (channels, depth, height, width)
        What `conv3d` was given; float32 or float64.
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel depth, kernel height, kernel width).
    grad_output : array_like, shape (batch, out channels, out depth, out height, out width)
        Without the batch if `input` has none. Gradient of the loss with respect to the output of `conv3d`; float32 or
        float64.
    stride : int or tuple of int, default 1
        As in `conv3d`, in voxels.
    padding : int, tuple or str, default 0
        As in `conv3d`: in voxels, or a name.
    dilation : int or tuple of int, default 1
        As in `conv3d`, in voxels.
    groups : int, default 1
        As in `conv3d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv3d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv3d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of the input and of `grad_output`.
    plan : ConvPlan, optional
        From `plan_conv3d` for the same geometry, dtype and direction "grad_weight"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, of shape `weight_size`
        Of the dtype to which NumPy promotes the arguments' dtypes.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, or a size is no integer.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> x = np.ones((2, 3, 4, 8, 8), np.float32)
    >>> g = np.ones((2, 4, 2, 6, 6), np.float32)
    >>> dw = nbfftconv.conv3d_weight(x, (4, 3, 3, 3, 3), g)
    >>> dw.shape
    (4, 3, 3, 3, 3)
    >>> float(dw[0, 0, 1, 1, 1])  # 2 volumes × 72 voxels
    144.0
    """
    arguments = stride, padding, dilation, groups, padding_mode, algorithm, channels_last, plan
    return _grad_weight(3, input, weight_size, grad_output, *arguments)


def conv3d_input(
    input_size: tuple[int, int, int, int, int],
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride: int | tuple[int, int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int, int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
    channels_last: bool = False,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the input of `conv3d`, as `torch.nn.grad.conv3d_input` does.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input: (batch, channels, depth, height, width), or without the batch.
    weight : array_like, shape (out channels, channels / groups, kernel depth, kernel height, kernel width)
        Kernels that `conv3d` was given; float32 or float64.
    grad_output : array_like, shape (batch, out channels, out depth, out height, out width)
        Without the batch if `input_size` has none. Gradient of the loss with respect to the output of `conv3d`;
        float32 or float64.
    stride : int or tuple of int, default 1
        As in `conv3d`, in voxels.
    padding : int, tuple or str, default 0
        As in `conv3d`: in voxels, or a name.
    dilation : int or tuple of int, default 1
        As in `conv3d`, in voxels.
    groups : int, default 1
        As in `conv3d`.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        As in `conv3d`.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        As in `conv3d`.
    channels_last : bool, default False
        As in `conv2d`: whether channels are the last dimension of the input and of `grad_output`.
    plan : ConvPlan, optional
        From `plan_conv3d` for the same geometry, dtype and direction "grad_input"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, of shape `input_size`
        Of the dtype to which NumPy promotes the arguments' dtypes.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, or a size is no integer.
    ValueError
        If shapes do not match, a size is out of range, a name is unknown, `plan` was made for something else or comes
        with an `algorithm`, or no tile for ``algorithm="fft"`` fits the scratch limit.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> w = np.ones((4, 3, 3, 3, 3), np.float32)
    >>> g = np.ones((2, 4, 4, 6, 6), np.float32)
    >>> dx = nbfftconv.conv3d_input((2, 3, 6, 8, 8), w, g)
    >>> dx.shape
    (2, 3, 6, 8, 8)
    >>> float(dx[0, 0, 2, 4, 4]), float(dx[0, 0, 0, 0, 0])  # 4 filters × 27 taps; in a corner, one tap
    (108.0, 4.0)
    """
    arguments = stride, padding, dilation, groups, padding_mode, algorithm, channels_last, plan
    return _grad_input(3, input_size, weight, grad_output, *arguments)
