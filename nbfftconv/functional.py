"""conv2d, conv2d_input, conv2d_weight: arrays in, arrays out. Arguments are validated here, before any work is done."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv import padding as padding_modes
from nbfftconv import scratch
from nbfftconv.arrays import as_float4, as_weak_float, check_out, check_shape, compact, is_usable_out, result_type
from nbfftconv.geometry import ConvGeometry, Padding, one_of
from nbfftconv.implementations import Kernels, registry
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan

ACTIVATIONS = (None, "relu")


def check_activation(activation: Any) -> None:
    """Raise ValueError for an unknown activation."""
    one_of("activation", activation, ACTIVATIONS)


def check_algorithm(algorithm: Any) -> None:
    """Raise ValueError for an unknown algorithm."""
    one_of("algorithm", algorithm, registry.algorithms())


def check_bias(bias: ArrayLike | None, filters: int, dtype: np.dtype) -> np.ndarray | None:
    """Return the bias as an array of shape (filters,), or None; what is no array takes `dtype`."""
    if bias is None:
        return None
    array = as_weak_float("bias", bias, dtype)
    check_shape("bias", array, (filters,), f"{filters} out channels")
    return array


def _plan_for(
    plan: ConvPlan | None, algorithm: str, geometry: ConvGeometry, direction: str, dtype: np.dtype
) -> ConvPlan:
    check_algorithm(algorithm)
    if plan is None:
        return make_plan(geometry, direction, dtype, algorithm)
    if not isinstance(plan, ConvPlan):
        raise TypeError(f"plan must be a ConvPlan, got {type(plan).__name__}")
    if algorithm != "auto":
        raise ValueError(f"a plan has its algorithm, {plan.algorithm!r}; with one, algorithm={algorithm!r} is too much")
    if plan.direction != direction:
        raise ValueError(f"the plan is for {plan.direction}, not for {direction}: {plan!r}")
    if plan.dtype != dtype:
        raise ValueError(f"the plan is for {plan.dtype}, the arrays are {dtype}: {plan!r}")
    if plan.geometry != geometry:
        raise ValueError(f"the plan is for another geometry, {plan.geometry}, than the arguments, {geometry}")
    return plan


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
    out: np.ndarray | None = None,
    plan: ConvPlan | None = None,
) -> np.ndarray:
    r"""Convolve images with kernels, as `torch.nn.functional.conv2d` does; on NumPy arrays.

    It is the convolution of deep learning, that is cross-correlation: kernels are not flipped.

    .. math:: y_{nkij} = b_k + \sum_{cuv} w_{kcuv}\, x_{n,c,\,i s + u d - p,\,j s + v d - p}

    Parameters
    ----------
    input : array_like, shape (batch, channels, height, width)
        Images of float32 or float64, in any memory layout and byte order. The batch may be empty.
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
    out : numpy.ndarray, optional
        Takes the result; of its shape and dtype, without a mask. It may overlap the other arrays.
    plan : ConvPlan, optional
        From `plan_conv2d` for the same geometry, dtype and direction "forward"; `algorithm` is then "auto".

    Returns
    -------
    numpy.ndarray, shape (batch, out channels, out height, out width)
        Of the dtype to which NumPy promotes the arguments' dtypes. `out`, if it was given.

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
    x, w = as_float4("input", input), as_float4("weight", weight)
    geometry = ConvGeometry.from_arguments(x.shape, w.shape, stride, padding, dilation, groups)
    b = check_bias(bias, w.shape[0], result_type(x, w))
    padding_modes.check(geometry, padding_mode)
    check_activation(activation)
    dtype = result_type(x, w) if b is None else result_type(x, w, b)
    if out is not None:
        check_out(out, geometry.output_size, dtype)
    plan = _plan_for(plan, algorithm, geometry, "forward", dtype)
    kernels = registry.get(plan.algorithm).prepare(plan, compact(w, dtype))
    return run_forward(plan, x, kernels, b, padding_mode, activation, out)[0]


def run_forward(
    plan: ConvPlan,
    x: np.ndarray,
    kernels: Kernels,
    bias: np.ndarray | None,
    padding_mode: str,
    activation: str | None,
    out: np.ndarray | None = None,
    keep: bool = False,
) -> tuple[np.ndarray, Any]:
    """Run the forward pass on validated arguments; with `keep`, return what a backward pass needs of the input, too."""
    geometry, dtype = plan.geometry, plan.dtype
    b = None if bias is None else compact(bias, dtype)
    x = padding_modes.pad(compact(x, dtype), geometry, padding_mode)
    target = None if out is None else np.asarray(out)  # of a subclass, its memory
    if target is not None and is_usable_out(target, x, kernels.weight, b):
        result = target
    else:
        result = scratch.result(geometry.output_size, dtype)
    kept = registry.get(plan.algorithm).forward(
        plan, padding_modes.pass_geometry(geometry, padding_mode), x, kernels, b, activation == "relu", result, keep
    )
    if out is None or target is None:
        return result, kept
    if result is not target:
        target[...] = result
    return out, kept


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
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the kernels of `conv2d`, as `torch.nn.grad.conv2d_weight` does.

    Parameters
    ----------
    input : array_like, shape (batch, channels, height, width)
        What `conv2d` was given; float32 or float64.
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel height, kernel width).
    grad_output : array_like, shape (batch, out channels, out height, out width)
        Gradient of the loss with respect to the output of `conv2d`; float32 or float64.
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
    x, g = as_float4("input", input), as_float4("grad_output", grad_output)
    geometry = ConvGeometry.from_arguments(x.shape, weight_size, stride, padding, dilation, groups)
    check_shape("grad_output", g, geometry.output_size, f"input {x.shape} and weight {geometry.weight_size}")
    padding_modes.check(geometry, padding_mode)
    plan = _plan_for(plan, algorithm, geometry, "grad_weight", result_type(x, g))
    return run_grad_weight(plan, x, g, padding_mode)


def run_grad_weight(plan: ConvPlan, x: np.ndarray, g: np.ndarray, padding_mode: str) -> np.ndarray:
    """Run the pass on validated arguments."""
    geometry, dtype = plan.geometry, plan.dtype
    x = padding_modes.pad(compact(x, dtype), geometry, padding_mode)
    result = scratch.result(geometry.weight_size, dtype)
    pass_geometry = padding_modes.pass_geometry(geometry, padding_mode)
    registry.get(plan.algorithm).grad_weight(plan, pass_geometry, x, compact(g, dtype), result)
    return result


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
    plan: ConvPlan | None = None,
) -> np.ndarray:
    """Compute a loss's gradient with respect to the input of `conv2d`, as `torch.nn.grad.conv2d_input` does.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input: (batch, channels, height, width).
    weight : array_like, shape (out channels, channels / groups, kernel height, kernel width)
        Kernels that `conv2d` was given; float32 or float64.
    grad_output : array_like, shape (batch, out channels, out height, out width)
        Gradient of the loss with respect to the output of `conv2d`; float32 or float64.
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
    w, g = as_float4("weight", weight), as_float4("grad_output", grad_output)
    geometry = ConvGeometry.from_arguments(input_size, w.shape, stride, padding, dilation, groups)
    check_shape("grad_output", g, geometry.output_size, f"input {geometry.input_size} and weight {w.shape}")
    padding_modes.check(geometry, padding_mode)
    dtype = result_type(w, g)
    plan = _plan_for(plan, algorithm, geometry, "grad_input", dtype)
    kernels = registry.get(plan.algorithm).prepare(plan, compact(w, dtype))
    return run_grad_input(plan, kernels, g, padding_mode)


def run_grad_input(plan: ConvPlan, kernels: Kernels, g: np.ndarray, padding_mode: str) -> np.ndarray:
    """Run the pass on validated arguments."""
    geometry = padding_modes.pass_geometry(plan.geometry, padding_mode)
    result = scratch.result(geometry.input_size, plan.dtype)
    registry.get(plan.algorithm).grad_input(plan, geometry, kernels, compact(g, plan.dtype), result)
    return padding_modes.fold(result, plan.geometry, padding_mode)


def run_backward(
    plan: ConvPlan,
    x: np.ndarray,
    kept: Any,
    kernels: Kernels,
    g: np.ndarray,
    padding_mode: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run both gradients of a step that shares spectra; return those of input, kernels and bias."""
    dtype, geometry = plan.dtype, padding_modes.pass_geometry(plan.geometry, padding_mode)
    x = padding_modes.pad(compact(x, dtype), plan.geometry, padding_mode)
    grad_input = scratch.result(geometry.input_size, dtype)
    grad_weight = scratch.result(geometry.weight_size, dtype)
    implementation = registry.get(plan.algorithm)
    grad_bias = implementation.backward(plan, geometry, x, kept, kernels, g, grad_input, grad_weight)
    with np.errstate(over="ignore"):
        grad_bias = grad_bias.astype(dtype)
    return padding_modes.fold(grad_input, plan.geometry, padding_mode), grad_weight, grad_bias
