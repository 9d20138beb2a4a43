"""conv1d, conv2d, conv3d and their transposes, of tensors, with arguments and derivatives of `torch.nn.functional`.

What is not float32 or float64 on a CPU, what autocast is to cast, and what is no convolution, goes to PyTorch's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as host

from nbfftconv.torch import operators as operators  # registers what torch.ops has
from nbfftconv.torch.arrays import DTYPES, LAST, is_last
from nbfftconv.torch.ready_calls import convolve_again, is_alone, make_ready

_operators = torch.ops.nbfftconv

Size = int | Sequence[int]


def is_ours(axes: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the operators are for these tensors."""
    dtype = input.dtype
    if dtype not in DTYPES or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dim() != axes + 2 or weight.shape[1] == 0 or input.dim() not in (axes + 1, axes + 2):
        return False
    for tensor in (input, weight, bias):
        if tensor is not None and not (tensor.is_cpu and tensor.dtype == dtype and tensor.layout == torch.strided):
            return False
    return True


def _along(value: Size, axes: int) -> list[int] | None:
    """Return a number for each axis; None of what is no such numbers."""
    if isinstance(value, (int, torch.SymInt)):
        return [value] * axes  # type: ignore[list-item]
    if not isinstance(value, (tuple, list)) or len(value) not in (1, axes):
        return None
    return list(value) * (axes if len(value) == 1 else 1)


def _pads(padding: str | Size, weight: torch.Tensor, stride: list[int], dilation: list[int]) -> list[int] | None:
    """Return the padding before and after each axis, in turns; None of what is none."""
    if padding == "valid":
        return [0] * (2 * len(stride))
    if padding == "same":
        if any(step != 1 for step in stride):
            return None
        reach = [d * (taps - 1) for d, taps in zip(dilation, weight.shape[2:], strict=True)]
        return [amount for total in reach for amount in (total // 2, total - total // 2)]
    if isinstance(padding, str):
        return None
    each = _along(padding, len(stride))
    return None if each is None else [amount for pad in each for amount in (pad, pad)]


def run(name: str, arguments: tuple[Any, ...]) -> torch.Tensor | None:
    """Return what the operator of that name does; None where PyTorch's own is to do it, or to say what is wrong.

    The derivative of `torch.func` does not take operators that are registered with one of their own.
    """
    if torch.compiler.is_compiling():
        return getattr(_operators, name)(*arguments)
    try:
        if is_alone(*(each for each in arguments if isinstance(each, torch.Tensor))):  # 25 us less
            return getattr(operators, name)(*arguments)
        weight = arguments[1]
        with operators.learning(weight, torch.is_grad_enabled() and weight.requires_grad):
            return getattr(_operators, name)(*arguments)
    except (TypeError, ValueError):
        return None
    except RuntimeError:
        if torch._C._are_functorch_transforms_active():
            return None
        raise


def convolve(
    axes: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size,
    padding: str | Size,
    dilation: Size,
    groups: int,
    relu: bool = False,
) -> torch.Tensor:
    """Convolve what has so many spatial axes; with `relu`, clip the result at zero.

    As PyTorch's, the result has its channels last in memory where the input or the weight has.
    """
    if is_last(weight) and input.dim() == weight.dim():
        input = input.contiguous(memory_format=LAST[input.dim()])
    settings, is_compiling = (stride, padding, dilation, groups, relu), torch.compiler.is_compiling()
    if not is_compiling:
        again = convolve_again(input, weight, bias, settings)
        if again is not None:
            return again
    if is_ours(axes, input, weight, bias):
        steps, dilations = _along(stride, axes), _along(dilation, axes)
        pads = None if steps is None or dilations is None else _pads(padding, weight, steps, dilations)
        if pads is not None:
            x = input if input.dim() == axes + 2 else input.unsqueeze(0)
            arguments = x, weight, bias, steps, pads, dilations, groups, relu
            result = run("convolution", arguments)
            if result is not None:
                if x is not input:
                    return result.squeeze(0)
                if not is_compiling:
                    make_ready(input, weight, bias, settings, arguments[3:])
                return result
    result = getattr(host, f"conv{axes}d")(input, weight, bias, stride, padding, dilation, groups)
    return result.relu_() if relu else result


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve sequences; arguments, result and derivatives are as of `torch.nn.functional.conv1d`.

    Parameters
    ----------
    input : torch.Tensor, shape (batch, channels, length)
        With or without the batch. Of float32 or float64, on the CPU, it is convolved here; else by PyTorch.
    weight : torch.Tensor
        Kernels, (out channels, channels / groups) and their size.
    bias : torch.Tensor, optional
        (out channels,).
    stride : int or tuple of int, default 1
        Distance of neighbouring outputs.
    padding : int, tuple of int or str, default 0
        Zeros around the input, or "valid", or "same".
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps.
    groups : int, default 1
        Groups of channels that are convolved apart.

    Returns
    -------
    torch.Tensor
        The outputs, channels last in memory where the input's are.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As PyTorch's function does.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> nt.conv1d(torch.ones(1, 2, *[5] * 1), torch.ones(3, 2, *[3] * 1), padding="same").shape
    torch.Size([1, 3, 5])
    """
    return convolve(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve images; arguments, result and derivatives are as of `torch.nn.functional.conv2d`.

    Parameters
    ----------
    input : torch.Tensor, shape (batch, channels, height, width)
        With or without the batch. Of float32 or float64, on the CPU, it is convolved here; else by PyTorch.
    weight : torch.Tensor
        Kernels, (out channels, channels / groups) and their size.
    bias : torch.Tensor, optional
        (out channels,).
    stride : int or tuple of int, default 1
        Distance of neighbouring outputs.
    padding : int, tuple of int or str, default 0
        Zeros around the input, or "valid", or "same".
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps.
    groups : int, default 1
        Groups of channels that are convolved apart.

    Returns
    -------
    torch.Tensor
        The outputs, channels last in memory where the input's are.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As PyTorch's function does.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> nt.conv2d(torch.ones(1, 2, *[5] * 2), torch.ones(3, 2, *[3] * 2), padding="same").shape
    torch.Size([1, 3, 5, 5])
    """
    return convolve(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve volumes; arguments, result and derivatives are as of `torch.nn.functional.conv3d`.

    Parameters
    ----------
    input : torch.Tensor, shape (batch, channels, depth, height, width)
        With or without the batch. Of float32 or float64, on the CPU, it is convolved here; else by PyTorch.
    weight : torch.Tensor
        Kernels, (out channels, channels / groups) and their size.
    bias : torch.Tensor, optional
        (out channels,).
    stride : int or tuple of int, default 1
        Distance of neighbouring outputs.
    padding : int, tuple of int or str, default 0
        Zeros around the input, or "valid", or "same".
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps.
    groups : int, default 1
        Groups of channels that are convolved apart.

    Returns
    -------
    torch.Tensor
        The outputs, channels last in memory where the input's are.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As PyTorch's function does.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> nt.conv3d(torch.ones(1, 2, *[5] * 3), torch.ones(3, 2, *[3] * 3), padding="same").shape
    torch.Size([1, 3, 5, 5, 5])
    """
    return convolve(3, input, weight, bias, stride, padding, dilation, groups)


def _transposed_size(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
) -> list[int] | None:
    """Return the spatial size of a transposed convolution; None where it is not that of a convolution's input."""
    if any(more >= step for more, step in zip(output_padding, stride, strict=True)):
        return None
    numbers = zip(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, strict=True)
    return [(n - 1) * s - 2 * pad + d * (taps - 1) + more + 1 for n, taps, s, pad, more, d in numbers]


def _convolve_transposed(
    axes: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> torch.Tensor:
    if is_ours(axes, input, weight, bias):
        numbers = [_along(each, axes) for each in (stride, padding, output_padding, dilation)]
        steps, pads, _, dilations = numbers
        x = input if input.dim() == axes + 2 else input.unsqueeze(0)
        space = None if None in numbers else _transposed_size(x, weight, *numbers)  # type: ignore[arg-type]
        if space is not None and pads is not None and x.shape[1] == weight.shape[0]:
            size = [x.shape[0], weight.shape[1] * groups, *space]
            around = [amount for pad in pads for amount in (pad, pad)]
            arguments = size, weight, x, bias, steps, around, dilations, groups
            result = run("convolution_input", arguments)
            if result is not None:
                return result if x is input else result.squeeze(0)
    function = getattr(host, f"conv_transpose{axes}d")
    return function(input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """Convolve sequences, transposed; arguments, result, derivatives are as of `torch.nn.functional.conv_transpose1d`.

    Parameters
    ----------
    input : torch.Tensor, shape (batch, channels, length)
        As of `conv1d`.
    weight : torch.Tensor
        Kernels, (channels, out channels / groups) and their size.
    bias : torch.Tensor, optional
        (out channels,).
    stride : int or tuple of int, default 1
        As of the convolution whose gradient it is, like `dilation`.
    padding : int or tuple of int, default 0
        What the output is shorter on both sides.
    output_padding : int or tuple of int, default 0
        What it is longer at its end.
    groups : int, default 1
        Groups of channels that are convolved apart.
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps.

    Returns
    -------
    torch.Tensor
        The outputs, channels last in memory where the input's are.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As PyTorch's function does.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> nt.conv_transpose1d(torch.ones(1, 2, *[5] * 1), torch.ones(2, 3, *[2] * 1), stride=2).shape
    torch.Size([1, 3, 10])
    """
    return _convolve_transposed(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """Convolve images, transposed; arguments, result and derivatives are as of `torch.nn.functional.conv_transpose2d`.

    Parameters
    ----------
    input : torch.Tensor, shape (batch, channels, height, width)
        As of `conv2d`.
    weight : torch.Tensor
        Kernels, (channels, out channels / groups) and their size.
    bias : torch.Tensor, optional
        (out channels,).
    stride : int or tuple of int, default 1
        As of the convolution whose gradient it is, like `dilation`.
    padding : int or tuple of int, default 0
        What the output is shorter on both sides.
    output_padding : int or tuple of int, default 0
        What it is longer at its end.
    groups : int, default 1
        Groups of channels that are convolved apart.
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps.

    Returns
    -------
    torch.Tensor
        The outputs, channels last in memory where the input's are.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As PyTorch's function does.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> nt.conv_transpose2d(torch.ones(1, 2, *[5] * 2), torch.ones(2, 3, *[2] * 2), stride=2).shape
    torch.Size([1, 3, 10, 10])
    """
    return _convolve_transposed(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """Convolve volumes, transposed; arguments, result and derivatives are as of `torch.nn.functional.conv_transpose3d`.

    Parameters
    ----------
    input : torch.Tensor, shape (batch, channels, depth, height, width)
        As of `conv3d`.
    weight : torch.Tensor
        Kernels, (channels, out channels / groups) and their size.
    bias : torch.Tensor, optional
        (out channels,).
    stride : int or tuple of int, default 1
        As of the convolution whose gradient it is, like `dilation`.
    padding : int or tuple of int, default 0
        What the output is shorter on both sides.
    output_padding : int or tuple of int, default 0
        What it is longer at its end.
    groups : int, default 1
        Groups of channels that are convolved apart.
    dilation : int or tuple of int, default 1
        Distance of neighbouring taps.

    Returns
    -------
    torch.Tensor
        The outputs, channels last in memory where the input's are.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As PyTorch's function does.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> nt.conv_transpose3d(torch.ones(1, 2, *[5] * 3), torch.ones(2, 3, *[2] * 3), stride=2).shape
    torch.Size([1, 3, 10, 10, 10])
    """
    return _convolve_transposed(3, input, weight, bias, stride, padding, output_padding, groups, dilation)
