"""convert, report, revert: networks whose convolutions are computed here wherever that is faster.

A layer that is converted stays the module that it was, of another class: parameters, hooks, names and whoever refers to
it are as before. Which layers are, is told by the cost model of this package and a rule for PyTorch's, or by a race.
"""

import math
from typing import Any, TypeVar

import torch

from nbfftconv import hosts, scratch
from nbfftconv.hosts import Choice
from nbfftconv.torch.decisions import Seen, choose, decide
from nbfftconv.torch.folding import fold_norms, relus
from nbfftconv.torch.layers import COUNTERPARTS, HOSTS, LeftReLU
from nbfftconv.torch.ways import NOTE, Way, find_fastest, give_back, without_trace

_Model = TypeVar("_Model", bound=torch.nn.Module)


class Report(hosts.Report):
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
    >>> from matplotlib.figure import Figure
    >>> report = nt.Report({"head": nt.Choice("1×1×9×9, 1×1×3×3", 2e-3, 1e-3, True, "")})
    >>> report.plot(Figure().subplots()).get_title()
    'Convolutions: 2.0 ms by PyTorch, 1.0 ms as converted'
    """

    _host, _title = "torch", "PyTorch"


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
        Race both convolutions of each layer, for some tenths of a second, instead of asking models of their times. That
        is done with the weights as they are, and again with channels last in memory; then the networks that come out
        are raced, with PyTorch's own. Of the fastest one, weights of PyTorch's layers may have their channels last,
        and so results; `revert` lays them as they were.

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
    clipped = {} if model.training else relus(model)
    with torch.set_grad_enabled(model.training), without_trace(model):
        if measure:
            way = find_fastest(model, layers, example_inputs, clipped)
        else:
            way = Way(choose(model, layers, example_inputs, False))
    way.take(clipped)
    scratch.release()
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
        if type(module) in HOSTS or NOTE in vars(module):
            give_back(module)
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
        is_ours = type(layer) in HOSTS
        why = "was not converted" if is_ours or type(layer) in COUNTERPARTS else f"it is a {type(layer).__name__}"
        nothing = Choice("", math.nan, math.nan, is_ours, "is one of this package" if is_ours else why)
        choices[name] = vars(layer).get(NOTE, nothing)
    return Report(choices)


class _Deciding:
    """A hook that decides on a layer at its first call, and then is gone."""

    def __call__(self, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
        if type(layer) in COUNTERPARTS:
            Way({layer: decide(layer, [Seen.of(layer, arguments[0], False)])}).take({})
