"""Folds batch normalization into the convolution before it, and finds the ReLU that follows a convolution.

It is done with modules only, in the place where they are. So both have to be modules that the network calls once, that
nothing else refers to or listens to, and nothing else may use what is between them. PyTorch's tracer tells; where it
cannot trace a network, it traces its parts.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from nbfftconv.torch.layers import COUNTERPARTS, LeftReLU

_NORMS = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}
_CONVOLUTIONS = *COUNTERPARTS, *COUNTERPARTS.values()


class _Tracer(fx.Tracer):
    """PyTorch's, to which layers of this package are leaves as PyTorch's are."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return type(m) in (*_CONVOLUTIONS, LeftReLU) or super().is_leaf_module(m, module_qualified_name)


def fold_norms(model: torch.nn.Module) -> None:
    """Fold what batch normalization there is into the convolutions before it, in place.

    Both have to be in eval mode; an identity takes the place of the normalization.

    Parameters
    ----------
    model : torch.nn.Module
    """
    for convolution, norm in _neighbours(model):
        is_norm = type(norm) is _NORMS[convolution.weight.dim() - 2] and not (norm.training or convolution.training)
        if is_norm and norm.track_running_stats and _has_own_parameters(model, convolution):
            if convolution.transposed and convolution.groups > 1:
                continue
            _fold(convolution, norm)
            _replace(model, norm, torch.nn.Identity().eval())


def relus(model: torch.nn.Module) -> dict[torch.nn.Module, torch.nn.ReLU]:
    """Return the convolutions that can clip their results, with the ReLU that follows each.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict from torch.nn.Module to torch.nn.ReLU
    """
    found = {}
    for convolution, relu in _neighbours(model):
        if type(relu) is torch.nn.ReLU and not convolution.transposed:
            found[convolution] = relu
    return found


def _neighbours(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Return convolutions, each with the one module that takes its results, as far as both are for each other only."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = []
    for root, graph in _graphs(model):
        calls = Counter(id(_called(root, node)) for node in graph.nodes)
        for node in graph.nodes:
            both = _called(root, node), _follower(root, node)
            if type(both[0]) not in _CONVOLUTIONS or both[1] is None:
                continue
            if all(names[id(each)] == calls[id(each)] == 1 and not _is_heard(each) for each in both):
                pairs.append(both)
    return pairs


def _called(root: torch.nn.Module, node: fx.Node) -> Any:
    """Return the module that a node calls, None if it calls none."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _follower(root: torch.nn.Module, node: fx.Node) -> Any:
    """Return the module that alone uses a result, past identities; None if there is none."""
    users = list(node.users)
    while len(users) == 1 and type(_called(root, users[0])) is torch.nn.Identity:
        users = list(users[0].users)
    return _called(root, users[0]) if len(users) == 1 else None


def _graphs(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, fx.Graph]]:
    """Trace a module, or else its parts."""
    if type(module) in _CONVOLUTIONS or not any(True for _ in module.children()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # of whatever the network does
        for child in module.children():
            yield from _graphs(child)
        return
    yield module, graph


def _is_heard(module: torch.nn.Module) -> bool:
    """Whether somebody listens to what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _has_own_parameters(model: torch.nn.Module, layer: torch.nn.Module) -> bool:
    """Whether no other module has a layer's parameters."""
    owners = Counter(id(each) for module in set(model.modules()) for each in module._parameters.values())
    return all(owners[id(each)] == 1 for each in layer._parameters.values() if each is not None)


@torch.inference_mode(False)  # which would make tensors that no parameter of a network should have
@torch.no_grad()
def _fold(convolution: Any, norm: Any) -> None:
    """Let a convolution do what a normalization after it does, computed in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight, bias = convolution.weight, convolution.bias
    along = [1] * weight.dim()
    along[int(convolution.transposed)] = -1
    if bias is not None:
        shift = shift + bias.double() * scale
    folded = weight.double() * scale.reshape(along)
    needs = bool(weight.requires_grad)
    convolution.weight = torch.nn.Parameter(folded.to(weight.dtype), needs)
    convolution.bias = torch.nn.Parameter(shift.to(weight.dtype), needs)


def _replace(model: torch.nn.Module, module: torch.nn.Module, other: torch.nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                setattr(parent, name, other)
                return
