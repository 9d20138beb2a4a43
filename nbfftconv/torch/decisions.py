"""Who is to compute a layer: by the cost model of this package and a rule for PyTorch's, or by a race."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nbfftconv import hosts, tables
from nbfftconv.geometry import ConvGeometry, TransposedGeometry
from nbfftconv.hosts import Choice
from nbfftconv.torch.arrays import DTYPES, is_last
from nbfftconv.torch.layers import COUNTERPARTS
from nbfftconv.torch.races import Length, clock, race

#: Of the race of a layer.
_LENGTH = Length(rounds=5, seconds=0.2, limit=2.0)


class Seen(NamedTuple):
    """What a layer got: a tensor like it, without its values, whether its channels came last in memory, and the seconds
    of `_race`, if there was one."""

    x: torch.Tensor
    channels_last: bool
    seconds: tuple[float, float] | None

    @classmethod
    def of(cls, layer: torch.nn.Module, x: torch.Tensor, measure: bool) -> "Seen":
        """Look at a tensor; race on it where that can be."""
        alone = x.detach() if torch.is_inference_mode_enabled() else x.detach().requires_grad_(x.requires_grad)
        seconds = _race(layer, alone) if measure and _is_ours(x) else None
        like = x.new_empty(1).expand(x.shape)
        return cls(like.requires_grad_() if alone.requires_grad else like, is_last(x), seconds)


def _is_ours(x: torch.Tensor) -> bool:
    """Whether this package can compute with a tensor."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def choose(
    model: torch.nn.Module, layers: list[torch.nn.Module], example_inputs: tuple[Any, ...], measure: bool
) -> dict[torch.nn.Module, Choice]:
    """Run a model once; return what to choose for each layer by what it got."""
    # of every shape once, without the values, which may be large
    seen: dict[torch.nn.Module, list[Seen]] = {layer: [] for layer in layers}

    def note(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        if all(each.x.shape != x.shape for each in seen[layer]):
            seen[layer].append(Seen.of(layer, x, measure))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: decide(layer, of_layer) for layer, of_layer in seen.items()}


def decide(layer: torch.nn.Module, seen: list[Seen]) -> Choice:
    """Return what to choose for a layer by what it got."""
    if not seen:
        return Choice("", math.nan, math.nan, False, "was not called")
    geometry = "; ".join(_geometry_text(layer, each.x) for each in seen)
    ours = host = 0.0
    for x, channels_last, raced in seen:
        if not _is_ours(x):
            why = f"{x.dtype} on {x.device.type} is PyTorch's"
            return Choice(geometry, math.nan, math.nan, False, why)
        of_input = raced or (_host_seconds(layer, x), _seconds(layer, x, channels_last))
        host, ours = host + of_input[0], ours + of_input[1]
    is_faster = ours <= hosts.GAIN * host
    how = "measured" if seen[0].seconds else "by the cost model"
    passes = ", with gradients" if any(any(_gradients(layer, each.x)) for each in seen) else ""
    return Choice(geometry, host, ours, is_faster, f"{host / ours:.2f} times as fast{passes}, {how}")


def _geometry_text(layer: Any, x: torch.Tensor) -> str:
    return tables.geometry(x.shape, layer.weight.shape, layer.stride, layer.dilation, layer.groups)


def _convolution(layer: Any, x: torch.Tensor) -> tuple[ConvGeometry, str]:
    """Return the convolution of a layer, and the direction of the pass that it is."""
    axes = layer.weight.dim() - 2
    size = tuple(x.shape) if x.dim() == axes + 2 else (1, *x.shape)
    weight_size = tuple(layer.weight.shape)
    if layer.transposed:
        transposed = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return TransposedGeometry.from_arguments(size, weight_size, *transposed, axes).convolution, "grad_input"
    numbers = layer.stride, layer.padding, layer.dilation, layer.groups
    return ConvGeometry.from_arguments(size, weight_size, *numbers, axes), "forward"


def _dtype(x: torch.Tensor) -> Any:
    return x.new_empty(0).numpy().dtype


def _gradients(layer: Any, x: torch.Tensor) -> tuple[bool, bool]:
    """Whether a layer computes the gradients at its input and at its weight."""
    if not layer.training or torch.is_inference_mode_enabled():
        return False, False
    return x.requires_grad, layer.weight.requires_grad


def _seconds(layer: torch.nn.Module, x: torch.Tensor, channels_last: bool) -> float:
    """Return the seconds of a call, with its gradients, that this package's model expects."""
    geometry, direction = _convolution(layer, x)
    of_input, of_weight = _gradients(layer, x)
    directions = [direction]
    if of_input:
        directions.append("grad_input" if direction == "forward" else "forward")
    if of_weight:
        directions.append("grad_weight")
    return hosts.our_seconds(geometry, directions, _dtype(x), of_weight, channels_last)


def _host_seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Return the seconds of PyTorch's convolution, with its gradients, by rule of thumb."""
    geometry, _ = _convolution(layer, x)
    seconds = hosts.host_seconds(geometry, x.element_size(), torch.get_num_threads())
    return (1 + sum(_gradients(layer, x))) * seconds


def _race(layer: torch.nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of both convolutions of a layer, with its gradients, called in turns."""
    own = type(layer)
    learns = any(_gradients(layer, x))

    def turn(kind: type[torch.nn.Module]) -> float:
        layer.__class__ = kind
        return clock(call)

    try:
        with torch.enable_grad() if learns else torch.inference_mode():
            call = _step(layer, x) if learns else lambda: layer.forward(x)
            host, ours = race([lambda: turn(own), lambda: turn(COUNTERPARTS[own])], _LENGTH)
    finally:
        layer.__class__ = own
    return host, ours


def _step(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """Return what computes a layer's results and its gradients, which go nowhere."""
    wanted = [each for each in (x, *layer.parameters(recurse=False)) if each.requires_grad]
    gradient = torch.ones_like(layer.forward(x))
    return lambda: torch.autograd.grad(layer.forward(x), wanted, gradient)
