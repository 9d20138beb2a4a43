"""convert, report, revert: networks whose convolutions are computed here wherever that is faster.

A layer that is converted stays the module that it was, of another class: parameters, hooks, names and whoever refers to
it are as before. Which layers are, is told by the cost model of this package and a rule for PyTorch's, or by a race.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from nbfftconv import tables
from nbfftconv.geometry import ConvGeometry, TransposedGeometry
from nbfftconv.machine import get_machine
from nbfftconv.planner import make_plan
from nbfftconv.threads import get_num_threads
from nbfftconv.torch.arrays import DTYPES
from nbfftconv.torch.folding import fold_norms, relus
from nbfftconv.torch.kept_weights import forget
from nbfftconv.torch.layers import COUNTERPARTS, LeftReLU

_Model = TypeVar("_Model", bound=torch.nn.Module)
_HOSTS = {ours: theirs for theirs, ours in COUNTERPARTS.items()}
_NOTE = "nbfftconv_choice"

#: A layer is replaced if it takes at most this part of PyTorch's time: less is noise.
_GAIN = 0.95
# What PyTorch's convolution is taken to do: a part of a core's operations in groups of at least so many channels, and
# less in proportion where there are fewer; bytes of input and output as fast as memory is copied; seconds of a call.
_HOST_RATE, _HOST_CHANNELS, _HOST_CALL = 0.7, 8, 1.5e-5
#: Seconds of a call from Python.
_CALL = 3e-5
#: So many times longer than its model says may take what reads memory that the threads share, as 1×1 does.
_CAUTION = {"direct": 2.0}
#: Rounds of a race, at least, and seconds after which there are no more; seconds after which one round is enough.
_ROUNDS, _RACE, _LONG = 5, 0.2, 2.0


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer.

    Attributes
    ----------
    geometry : str
        Input and kernels.
    host, ours : float
        Seconds of a call by PyTorch, and by this package, with its gradients in training; NaN if they are not known.
    is_converted : bool
        Whether this package computes it.
    why : str

    Examples
    --------
    >>> import nbfftconv.torch as nt
    >>> nt.Choice("1×1×9×9, 1×1×3×3", 2e-5, 1e-5, True, "2.00 times as fast, measured").is_converted
    True
    """

    geometry: str
    host: float
    ours: float
    is_converted: bool
    why: str


class Report:
    """What was chosen for all layers of a network; as text, a table.

    Parameters
    ----------
    choices : dict from str to Choice
        By the layers' names; also an attribute.

    Examples
    --------
    >>> import nbfftconv.torch as nt
    >>> str(nt.Report({})).split()
    ['layer', 'geometry', 'torch,', 'ms', 'ours,', 'ms', 'computed', 'by', 'why']
    """

    def __init__(self, choices: dict[str, Choice]) -> None:
        self.choices = choices

    def __str__(self) -> str:
        head = "layer", "geometry", "torch, ms", "ours, ms", "computed by", "why"
        rows = [
            (
                name,
                each.geometry,
                tables.milliseconds(each.host),
                tables.milliseconds(each.ours),
                "nbfftconv" if each.is_converted else "torch",
                each.why,
            )
            for name, each in self.choices.items()
        ]
        return tables.as_text(head, rows)

    def plot(self, target: Any) -> Any:
        """Draw the time of each layer by PyTorch and by this package, as far as both are known.

        Needs matplotlib. The bar of the one that does not compute the layer is pale.

        Parameters
        ----------
        target : str, path or matplotlib.axes.Axes
            A file to write, in the format that its name ends with, or axes to draw into.

        Returns
        -------
        matplotlib.axes.Axes
            What was drawn into.

        Examples
        --------
        >>> import nbfftconv.torch as nt
        >>> from matplotlib.figure import Figure
        >>> report = nt.Report({"head": nt.Choice("1×1×9×9, 1×1×3×3", 2e-3, 1e-3, True, "")})
        >>> report.plot(Figure().subplots()).get_title()
        'Convolutions: 2.0 ms by PyTorch, 1.0 ms as converted'
        """
        from matplotlib.figure import Figure

        timed = {name: each for name, each in self.choices.items() if not math.isnan(each.host + each.ours)}
        is_file = isinstance(target, (str, os.PathLike))
        axes: Any = Figure((10, 1.5 + 0.3 * len(timed)), layout="constrained").subplots() if is_file else target
        for is_ours, label, color in ((False, "PyTorch", "tab:gray"), (True, "nbfftconv", "tab:blue")):
            places = [place + (0.2 if is_ours else -0.2) for place in range(len(timed))]
            seconds = [each.ours if is_ours else each.host for each in timed.values()]
            colors = [(color, 1.0 if each.is_converted == is_ours else 0.3) for each in timed.values()]
            axes.barh(places, [1e3 * each for each in seconds], 0.4, color=colors)
            axes.barh([math.nan], [math.nan], color=color, label=label)  # for the legend
        axes.set_yticks(range(len(timed)), [f"{name}  {_first(each.geometry)}" for name, each in timed.items()])
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.set_xlabel("ms")
        axes.legend(title="pale: not in use")
        before = sum(each.host for each in timed.values())
        after = sum(each.ours if each.is_converted else each.host for each in timed.values())
        axes.set_title(f"Convolutions: {1e3 * before:.1f} ms by PyTorch, {1e3 * after:.1f} ms as converted")
        if is_file:
            axes.figure.savefig(target, dpi=120)
        return axes


def _first(geometry: str) -> str:
    """Return the first of several geometries."""
    first, _, rest = geometry.partition("; ")
    return f"{first}; …" if rest else first


def convert(model: _Model, example_inputs: tuple[Any, ...] | None = None, *, measure: bool = False) -> _Model:
    """Let this package compute the convolutions of a network wherever that is faster; in place.

    Of a network that is in eval mode, batch normalization is first folded into the convolution before it, and a ReLU
    that follows is left to it, where modules that nothing else uses follow each other. Results change by rounding only.
    Layers that are subclasses of PyTorch's, such as those with parametrizations, stay as they are; `report` says why.
    A layer that is in training mode is judged by its forward pass and those gradients that it has to compute.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU.
    example_inputs : tuple, optional
        Arguments of the model, which is run once on them, to see the geometry of each layer, and in training mode
        whether it computes the gradient at its input. Without them a layer is decided on at its first call.
    measure : bool, default False
        Race both convolutions of each layer, for some tenths of a second, instead of asking models of their times.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If `model` is no module, or `example_inputs` are no tuple.
    ValueError
        If `measure` is set without example inputs.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 7, padding=3), torch.nn.ReLU()).eval()
    >>> model = nt.convert(model, (torch.ones(1, 64, 56, 56),))
    >>> type(model[0]) is nt.Conv2d, nt.report(model).choices["0"].is_converted
    (True, True)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs must be a tuple of arguments, got {type(example_inputs).__name__}")
    if measure and example_inputs is None:
        raise ValueError("measure=True needs example_inputs: layers are raced on what they get from them")
    fold_norms(model)
    layers = [layer for layer in model.modules() if type(layer) in COUNTERPARTS]
    if example_inputs is None:
        for layer in layers:
            layer.register_forward_pre_hook(_Deciding())
        return model
    for layer, seen in _seen(model, layers, example_inputs, measure).items():
        _decide(layer, seen)
    if not model.training:
        for layer, relu in relus(model).items():
            if type(layer) in _HOSTS:
                layer.clips = True  # type: ignore[assignment]
                relu.__class__ = LeftReLU
    return model


def revert(model: _Model) -> _Model:
    """Let PyTorch compute all convolutions of a network again; in place.

    Weights stay as they are, also those that batch normalization was folded into.

    Parameters
    ----------
    model : torch.nn.Module
        With layers of this package, or without.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> model = nt.revert(torch.nn.Sequential(nt.Conv2d(1, 1, 3)))
    >>> type(model[0]) is torch.nn.Conv2d
    True
    """
    for module in model.modules():
        if type(module) is LeftReLU:
            module.__class__ = torch.nn.ReLU  # type: ignore[assignment]
        if type(module) in _HOSTS:
            forget(module.weight)  # type: ignore[arg-type]
            for name in (_NOTE, "clips"):
                vars(module).pop(name, None)
            module.__class__ = _HOSTS[type(module)]
    return model


def report(model: torch.nn.Module) -> Report:
    """Return what was chosen for each convolution of a network, and why.

    Parameters
    ----------
    model : torch.nn.Module
        That `convert` has had.

    Returns
    -------
    Report
        As text, a table.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> print(nt.report(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3))))
    layer  geometry  torch, ms  ours, ms  computed by  why
    0                                     torch        was not converted
    """
    choices = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, tuple(COUNTERPARTS)):
            continue
        is_ours = type(layer) in _HOSTS
        why = "was not converted" if is_ours or type(layer) in COUNTERPARTS else f"it is a {type(layer).__name__}"
        nothing = Choice("", math.nan, math.nan, is_ours, "is one of this package" if is_ours else why)
        choices[name] = vars(layer).get(_NOTE, nothing)
    return Report(choices)


class _Seen(NamedTuple):
    """What a layer got: a tensor like it, without its values, and the seconds of `_race`, if there was one."""

    x: torch.Tensor
    seconds: tuple[float, float] | None

    @classmethod
    def of(cls, layer: torch.nn.Module, x: torch.Tensor, measure: bool) -> "_Seen":
        """Look at a tensor; race on it where that can be."""
        alone = x.detach() if torch.is_inference_mode_enabled() else x.detach().requires_grad_(x.requires_grad)
        seconds = _race(layer, alone) if measure and _is_ours(x) else None
        like = x.new_empty(1).expand(x.shape)
        return cls(like.requires_grad_() if alone.requires_grad else like, seconds)


def _is_ours(x: torch.Tensor) -> bool:
    """Whether this package can compute with a tensor."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def _seen(
    model: torch.nn.Module, layers: list[torch.nn.Module], example_inputs: tuple[Any, ...], measure: bool
) -> dict[torch.nn.Module, list[_Seen]]:
    """Run a model once; return what each layer got, of every shape once. Values are not held: they may be large."""
    seen: dict[torch.nn.Module, list[_Seen]] = {layer: [] for layer in layers}

    def note(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        if all(each.x.shape != x.shape for each in seen[layer]):
            seen[layer].append(_Seen.of(layer, x, measure))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.set_grad_enabled(model.training):
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class _Deciding:
    """A hook that decides on a layer at its first call, and then is gone."""

    def __call__(self, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
        if type(layer) in COUNTERPARTS:
            _decide(layer, [_Seen.of(layer, arguments[0], False)])


def _decide(layer: torch.nn.Module, seen: list[_Seen]) -> None:
    """Convert a layer if that is faster on what it got, and note why."""
    if not seen:
        _note(layer, Choice("", math.nan, math.nan, False, "was not called"))
        return
    geometry = "; ".join(_geometry_text(layer, each.x) for each in seen)
    ours = host = 0.0
    for x, raced in seen:
        if not _is_ours(x):
            why = f"{x.dtype} on {x.device.type} is PyTorch's"
            _note(layer, Choice(geometry, math.nan, math.nan, False, why))
            return
        of_input = raced or (_host_seconds(layer, x), _seconds(layer, x))
        host, ours = host + of_input[0], ours + of_input[1]
    is_faster = ours <= _GAIN * host
    how = "measured" if seen[0].seconds else "by the cost model"
    passes = ", with gradients" if any(any(_gradients(layer, each.x)) for each in seen) else ""
    _note(layer, Choice(geometry, host, ours, is_faster, f"{host / ours:.2f} times as fast{passes}, {how}"))


def _note(layer: torch.nn.Module, choice: Choice) -> None:
    setattr(layer, _NOTE, choice)
    if choice.is_converted:
        layer.__class__ = COUNTERPARTS[type(layer)]
    else:
        forget(layer.weight)  # type: ignore[arg-type]


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


def _seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Return the seconds of a call, with its gradients, that this package's model expects."""
    geometry, direction = _convolution(layer, x)
    of_input, of_weight = _gradients(layer, x)
    directions = [direction]
    if of_input:
        directions.append("grad_input" if direction == "forward" else "forward")
    if of_weight:
        directions.append("grad_weight")
    seconds = 0.0
    for each in directions:  # a weight that changes is transformed in each pass
        keeps = each != "grad_weight" and not of_weight
        plan = make_plan(geometry.of_images, each, _dtype(x), "auto", weight_is_transformed=keeps)
        seconds += _CALL + _CAUTION.get(plan.algorithm, 1.0) * plan.seconds / get_num_threads()
    return seconds


def _host_seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Return the seconds of PyTorch's convolution, with its gradients, by rule of thumb."""
    geometry, _ = _convolution(layer, x)
    machine, threads, itemsize = get_machine(), torch.get_num_threads(), x.element_size()
    channels = min(geometry.weight_size[0] // geometry.groups, geometry.weight_size[1])
    rate = _HOST_RATE * min(1.0, max(0.25, channels / _HOST_CHANNELS)) * machine.flops * 4 / itemsize
    moved = itemsize * (math.prod(geometry.input_size) + math.prod(geometry.output_size))
    seconds = _HOST_CALL + max(2 * geometry.multiply_adds / (rate * threads), moved / machine.bandwidth)
    return (1 + sum(_gradients(layer, x))) * seconds


def _race(layer: torch.nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of both convolutions of a layer, with its gradients, called in turns."""
    own = type(layer)
    kinds = own, COUNTERPARTS[own]
    times: list[list[float]] = [[], []]
    learns = any(_gradients(layer, x))
    try:
        with torch.enable_grad() if learns else torch.inference_mode():
            call = _step(layer, x) if learns else lambda: layer.forward(x)
            start = time.perf_counter()
            for turn in itertools.count():
                for kind, of_kind in zip(kinds, times, strict=True):
                    layer.__class__ = kind
                    seconds = _clock(call)
                    if turn > 0:  # plans are made, and kernels transformed, at the first call
                        of_kind.append(seconds)
                spent = time.perf_counter() - start
                if turn > 0 and spent > (_RACE if turn >= _ROUNDS else _LONG):
                    break
    finally:
        layer.__class__ = own
    host, ours = map(statistics.median, times)
    return host, ours


def _step(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """Return what computes a layer's results and its gradients, which go nowhere."""
    wanted = [each for each in (x, *layer.parameters(recurse=False)) if each.requires_grad]
    gradient = torch.ones_like(layer.forward(x))
    return lambda: torch.autograd.grad(layer.forward(x), wanted, gradient)


def _clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
