"""The operators ``torch.ops.nbfftconv``: a convolution and both of its gradients, of one to three spatial axes.

Each is linear in two of its arguments, and its derivatives are the others, so that three have derivatives of any order.
A transposed convolution is `convolution_input` with a bias.

All take arrays with a batch. `padding` has two numbers for each axis, before and after it. Results have their channels
last in memory if the input, or the gradient, has.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import library

from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Kernels, registry
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan
from nbfftconv.run import run_conv_transpose, run_forward, run_grad_weight
from nbfftconv.torch.arrays import (
    DTYPES,
    LAST,
    array_of,
    dtype_of,
    geometry_of,
    is_last,
    memory_of,
    tensor_last,
    tensor_of,
)
from nbfftconv.torch.kept_weights import forget, kernels_of

_NAMESPACE = "nbfftconv"
_library = library.Library(_NAMESPACE, "DEF")
_NUMBERS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_library.define(f"convolution(Tensor input, Tensor weight, Tensor? bias, {_NUMBERS}, bool relu) -> Tensor")
_library.define(
    f"convolution_input(SymInt[] input_size, Tensor weight, Tensor grad_output, Tensor? bias, {_NUMBERS}) -> Tensor"
)
_library.define(f"convolution_weight(Tensor input, SymInt[] weight_size, Tensor grad_output, {_NUMBERS}) -> Tensor")
_operators = getattr(torch.ops, _NAMESPACE)


class _Learning(threading.local):
    """Whether weights are about to change, so that nothing is kept of them: of each Python thread."""

    is_on = False


_learning = _Learning()


@contextlib.contextmanager
def learning(weight: torch.Tensor, is_on: bool = True) -> Iterator[None]:
    """Keep nothing of a weight that is about to change, meanwhile, and plan accordingly."""
    before = _learning.is_on
    if is_on:
        forget(weight)
    _learning.is_on = is_on
    try:
        yield
    finally:
        _learning.is_on = before


def _prepared(plan: ConvPlan, weight: torch.Tensor) -> Kernels:
    """Return kernels in the form that a plan needs."""
    return registry.get(plan.algorithm).prepare(plan, array_of(weight).reshape(plan.geometry.weight_size))


def _check(*tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless all are float32, or all float64."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise TypeError(f"tensors must all be float32 or all float64, got {', '.join(map(str, dtypes))}")


@library.impl(_library, "convolution", "CPU")
def convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """Convolve tensors; what the operator of this name does on a CPU."""
    _check(input, weight, bias)
    given = geometry_of(input.shape, weight.shape, (stride, padding, dilation, groups))
    _check_bias(bias, given.output_size[1])
    images, channels_last, dtype = given.of_images, is_last(input), dtype_of(weight)
    if _learning.is_on:
        plan = make_plan(images, "forward", dtype)
        kernels = _prepared(plan, weight)
    else:
        kept = kernels_of(weight)
        plan = kept.plan(images, dtype, "auto", channels_last)
        kernels = kept.of(plan)
    b = None if bias is None else array_of(bias)
    activation, stays_last = "relu" if relu else None, plan.geometry.channels_last
    x = memory_of(input) if stays_last else array_of(input)
    result, _ = run_forward(plan, x.reshape(plan.geometry.input_shape), kernels, b, "zeros", activation)
    if stays_last:
        return tensor_last(result, given.output_size)
    return tensor_of(result.reshape(given.output_size), channels_last)


@library.impl(_library, "convolution_input", "CPU")
def convolution_input(
    input_size: Sequence[int],
    weight: torch.Tensor,
    grad_output: torch.Tensor,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> torch.Tensor:
    """Compute the gradient at the input, plus a bias; what the operator of this name does on a CPU."""
    _check(weight, grad_output, bias)
    given = geometry_of(input_size, weight.shape, numbers)
    _check_gradient(grad_output, given)
    _check_bias(bias, given.input_size[1])
    images, g = given.of_images, array_of(grad_output)
    plan = make_plan(images, "grad_input", g.dtype, weight_is_transformed=not _learning.is_on)
    kernels = _prepared(plan, weight) if _learning.is_on else kernels_of(weight).of(plan)
    b = None if bias is None else array_of(bias)
    result = run_conv_transpose(plan, kernels, g.reshape(images.output_shape), b, None)
    return tensor_of(result.reshape(given.input_size), is_last(grad_output))


@library.impl(_library, "convolution_weight", "CPU")
def _convolution_weight(
    input: torch.Tensor, weight_size: Sequence[int], grad_output: torch.Tensor, *numbers: Any
) -> torch.Tensor:
    _check(input, grad_output)
    given = geometry_of(input.shape, weight_size, numbers)
    _check_gradient(grad_output, given)
    images, x, g = given.of_images, array_of(input), array_of(grad_output)
    plan = make_plan(images, "grad_weight", x.dtype)
    result = run_grad_weight(plan, x.reshape(images.input_shape), g.reshape(images.output_shape), "zeros")
    return torch.from_numpy(result.reshape(given.weight_size))


def _check_bias(bias: torch.Tensor | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but there are {channels} channels in the result")


def _check_gradient(grad_output: torch.Tensor, geometry: ConvGeometry) -> None:
    if tuple(grad_output.shape) != geometry.output_size:
        raise ValueError(f"grad_output has shape {tuple(grad_output.shape)}, but {geometry} needs another")


# Shapes without values


def _like(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    result = tensor.new_empty(size)
    return result.contiguous(memory_format=LAST[tensor.dim()]) if is_last(tensor) else result


@library.register_fake(f"{_NAMESPACE}::convolution")
def _fake_convolution(input, weight, bias, stride, padding, dilation, groups, relu):
    space = [
        (size + before + after - d * (taps - 1) - 1) // s + 1
        for size, taps, s, before, after, d in zip(
            input.shape[2:], weight.shape[2:], stride, padding[::2], padding[1::2], dilation, strict=True
        )
    ]
    return _like(input, [input.shape[0], weight.shape[0], *space])


@library.register_fake(f"{_NAMESPACE}::convolution_input")
def _fake_convolution_input(input_size, weight, grad_output, bias, stride, padding, dilation, groups):
    return _like(grad_output, input_size)


@library.register_fake(f"{_NAMESPACE}::convolution_weight")
def _fake_convolution_weight(input, weight_size, grad_output, stride, padding, dilation, groups):
    return input.new_empty(weight_size)


# Derivatives


def _sum_of_channels(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sum([0, *range(2, gradient.dim())])


def _save_convolution(ctx, inputs, output):
    input, weight, bias, *numbers, relu = inputs
    ctx.numbers, ctx.relu = numbers, relu
    of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
    ctx.save_for_backward(input if of_weight else None, weight if of_input else None, output if relu else None)
    ctx.input_size, ctx.weight_size = input.shape, weight.shape
    if of_weight:
        forget(weight)  # which is about to change


def _differentiate_convolution(ctx, gradient):
    input, weight, output = ctx.saved_tensors
    if ctx.relu:
        gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
    of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = grad_bias = None
    if of_input:
        with learning(weight, of_weight):
            grad_input = _operators.convolution_input(ctx.input_size, weight, gradient, None, *ctx.numbers)
    if of_weight:
        grad_weight = _operators.convolution_weight(input, ctx.weight_size, gradient, *ctx.numbers)
    if of_bias:
        grad_bias = _sum_of_channels(gradient)
    return grad_input, grad_weight, grad_bias, *[None] * 5


def _save_convolution_input(ctx, inputs, output):
    _, weight, grad_output, _, *ctx.numbers = inputs
    _, of_weight, of_gradient, _ = ctx.needs_input_grad[:4]
    ctx.save_for_backward(weight if of_gradient else None, grad_output if of_weight else None)
    ctx.weight_size = weight.shape
    if of_weight:
        forget(weight)


def _differentiate_convolution_input(ctx, gradient):
    weight, grad_output = ctx.saved_tensors
    _, of_weight, of_gradient, of_bias = ctx.needs_input_grad[:4]
    grad_weight = grad_gradient = grad_bias = None
    if of_weight:
        grad_weight = _operators.convolution_weight(gradient, ctx.weight_size, grad_output, *ctx.numbers)
    if of_gradient:
        with learning(weight, of_weight):
            grad_gradient = _operators.convolution(gradient, weight, None, *ctx.numbers, False)
    if of_bias:
        grad_bias = _sum_of_channels(gradient)
    return None, grad_weight, grad_gradient, grad_bias, *[None] * 4


def _save_convolution_weight(ctx, inputs, output):
    input, _, grad_output, *ctx.numbers = inputs
    of_input, _, of_gradient = ctx.needs_input_grad[:3]
    ctx.save_for_backward(input if of_gradient else None, grad_output if of_input else None)
    ctx.input_size = input.shape


def _differentiate_convolution_weight(ctx, gradient):
    input, grad_output = ctx.saved_tensors
    of_input, _, of_gradient = ctx.needs_input_grad[:3]
    grad_input = grad_gradient = None
    if of_input:
        grad_input = _operators.convolution_input(ctx.input_size, gradient, grad_output, None, *ctx.numbers)
    if of_gradient:
        grad_gradient = _operators.convolution(input, gradient, None, *ctx.numbers, False)
    return grad_input, None, grad_gradient, *[None] * 4


for _name, _differentiate, _save in (
    ("convolution", _differentiate_convolution, _save_convolution),
    ("convolution_input", _differentiate_convolution_input, _save_convolution_input),
    ("convolution_weight", _differentiate_convolution_weight, _save_convolution_weight),
):
    library.register_autograd(f"{_NAMESPACE}::{_name}", _differentiate, setup_context=_save)


# Many calls at once: of one weight they are a larger batch; others follow each other


def _one_by_one(operator: Any, info: Any, in_dims: Any, arguments: Any) -> tuple[torch.Tensor, int]:
    dims = [dim if isinstance(dim, int) else None for dim in in_dims]
    results = []
    for index in range(info.batch_size):
        pairs = zip(arguments, dims, strict=True)
        results.append(operator(*(each if dim is None else each.select(dim, index) for each, dim in pairs)))
    return torch.stack(results), 0


@library.register_vmap(f"{_NAMESPACE}::convolution")
def _vmap_convolution(info, in_dims, input, weight, bias, *rest):
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:3]):
        return _one_by_one(_operators.convolution, info, in_dims, (input, weight, bias, *rest))
    input = input.movedim(in_dims[0], 0)
    result = _operators.convolution(input.flatten(0, 1), weight, bias, *rest)
    return result.unflatten(0, input.shape[:2]), 0


@library.register_vmap(f"{_NAMESPACE}::convolution_input")
def _vmap_convolution_input(info, in_dims, input_size, weight, grad_output, bias, *rest):
    if in_dims[2] is None or in_dims[1] is not None or in_dims[3] is not None:
        arguments = input_size, weight, grad_output, bias, *rest
        return _one_by_one(_operators.convolution_input, info, (None, *in_dims[1:]), arguments)
    grad_output = grad_output.movedim(in_dims[2], 0)
    count, batch = grad_output.shape[:2]
    size = [count * batch, *input_size[1:]]
    result = _operators.convolution_input(size, weight, grad_output.flatten(0, 1), bias, *rest)
    return result.unflatten(0, (count, batch)), 0


@library.register_vmap(f"{_NAMESPACE}::convolution_weight")
def _vmap_convolution_weight(info, in_dims, input, weight_size, grad_output, *rest):
    dims = in_dims[0], None, in_dims[2], *[None] * len(rest)
    return _one_by_one(_operators.convolution_weight, info, dims, (input, weight_size, grad_output, *rest))
