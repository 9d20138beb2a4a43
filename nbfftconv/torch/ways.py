"""Ways to compute a network as a whole: whose convolutions, and PyTorch's in which order of memory.

PyTorch's convolution of images gives its results with channels last where its input or its weight has them so, and what
follows takes them so. Which order is faster depends on the whole network, and so does what a layer of this package
costs among those of PyTorch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from nbfftconv.hosts import Choice
from nbfftconv.torch.arrays import LAST, is_last
from nbfftconv.torch.decisions import choose
from nbfftconv.torch.kept_weights import forget
from nbfftconv.torch.layers import COUNTERPARTS, HOSTS, LeftReLU
from nbfftconv.torch.races import Length, clock, race

NOTE, _FORMER_ORDER = "nbfftconv_choice", "nbfftconv_former_order"
#: Of the race of whole networks.
_LENGTH = Length(rounds=4, seconds=3.0, limit=15.0)
#: Another way than the first is taken if it takes at most this part of the first one's time.
_GAIN = 0.97


@dataclass(frozen=True)
class Way:
    """What is chosen for each layer, and whether weights are in the other order of memory."""

    choices: dict[torch.nn.Module, Choice]
    is_reordered: bool = False

    def by_host(self) -> "Way":
        """Return the way of the same order in which PyTorch computes all layers."""
        choices = {
            layer: replace(each, is_converted=False, why=f"{each.why}; the network is faster without")
            for layer, each in self.choices.items()
            if each.is_converted
        }
        return Way(self.choices | choices, self.is_reordered)

    def take(self, relus: dict[torch.nn.Module, torch.nn.ReLU]) -> None:
        """Let the layers be computed so, and clip their results in the place of the ReLUs that follow them."""
        for layer, choice in self.choices.items():
            give_back(layer)
            vars(layer)[NOTE] = choice
            clips = choice.is_converted and layer in relus
            if choice.is_converted:
                layer.__class__ = COUNTERPARTS[type(layer)]
            if self.is_reordered:
                _reorder(layer)
            if layer in relus:
                relus[layer].__class__ = LeftReLU if clips else torch.nn.ReLU
            if clips:
                layer.clips = True  # type: ignore[assignment]


def give_back(layer: torch.nn.Module) -> None:
    """Let PyTorch compute a layer, with its weight in the order that it had."""
    if type(layer) in HOSTS:
        layer.__class__ = HOSTS[type(layer)]
    forget(layer.weight)  # type: ignore[arg-type]
    for name in (NOTE, "clips"):
        vars(layer).pop(name, None)
    former = vars(layer).pop(_FORMER_ORDER, None)
    if former is not None:
        _lay(layer, former)


def _reorder(layer: torch.nn.Module) -> None:
    """Lay a weight in the other order, with channels last or not, if there is one."""
    weight: Any = layer.weight
    last = LAST.get(weight.dim())
    if last is not None:
        former, order = (last, torch.contiguous_format) if is_last(weight) else (torch.contiguous_format, last)
        vars(layer)[_FORMER_ORDER] = former
        _lay(layer, order)


def _lay(layer: torch.nn.Module, order: torch.memory_format) -> None:
    weight: Any = layer.weight
    with torch.inference_mode(weight.is_inference()):  # which its values have to be as well
        weight.data = weight.data.to(memory_format=order)


def find_fastest(
    model: torch.nn.Module,
    layers: list[torch.nn.Module],
    example_inputs: tuple[Any, ...],
    relus: dict[torch.nn.Module, torch.nn.ReLU],
) -> Way:
    """Race layers in both orders of memory, then the networks that come out, with PyTorch's own."""
    first = Way(choose(model, layers, example_inputs, True))
    ways = [first]
    if any(layer.weight.dim() in LAST for layer in layers):  # type: ignore[union-attr, operator]
        Way({layer: replace(each, is_converted=False) for layer, each in first.choices.items()}, True).take({})
        with contextlib.suppress(RuntimeError):  # of networks that want one order
            ways.append(Way(choose(model, layers, example_inputs, True), True))
    ways += [way.by_host() for way in ways if any(each.is_converted for each in way.choices.values())]

    def turn(way: Way) -> float:
        way.take(relus)
        call = _step(model, example_inputs) if model.training else lambda: model(*example_inputs)
        call()  # kernels are transformed
        return clock(call)

    seconds = race([functools.partial(turn, way) for way in ways], _LENGTH) if len(ways) > 1 else [0.0]
    fastest = min(range(len(ways)), key=seconds.__getitem__)
    return ways[fastest if seconds[fastest] <= _GAIN * seconds[0] else 0]


def _step(model: torch.nn.Module, example_inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """Return what computes a network's results and the gradients of its parameters, which go nowhere."""
    wanted = [each for each in model.parameters() if each.requires_grad]

    def step() -> None:
        with torch.enable_grad():
            results = pytree.tree_leaves(model(*example_inputs))
            ends = [each for each in results if isinstance(each, torch.Tensor) and each.requires_grad]
            if ends:
                torch.autograd.grad(ends, wanted, list(map(torch.ones_like, ends)), allow_unused=True)

    return step


@contextlib.contextmanager
def without_trace(model: torch.nn.Module) -> Iterator[None]:
    """Let a network run, and then have the buffers that it had, such as statistics, and the same random numbers."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.inference_mode():  # buffers may be tensors of inference
                for buffer, values in before:
                    buffer.copy_(values)
