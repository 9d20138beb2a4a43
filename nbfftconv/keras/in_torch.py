"""Convolutions of tensors of PyTorch, by the operators of `nbfftconv.torch`, which have derivatives of any order."""

from typing import Any, NamedTuple

import torch

from nbfftconv.keras.passes import Convolution
from nbfftconv.keras.setting import Setting
from nbfftconv.torch.functional import is_ours as _is_ours
from nbfftconv.torch.functional import run
from nbfftconv.torch.kept_weights import State

#: Seconds that a call takes beside its passes.
CALL = 0.0


def is_cpu() -> bool:
    """Whether tensors may be on the CPU; each is asked for itself."""
    return True


def threads() -> int:
    """Return the number of threads of the host."""
    return torch.get_num_threads()


def tensor(value: Any) -> Any:
    """Return the value of a variable as a tensor."""
    return value


def is_ours(x: Any, kernel: Any, bias: Any) -> bool:
    """Whether this package can compute with tensors."""
    if not isinstance(x, torch.Tensor) or not isinstance(kernel, torch.Tensor):
        return False
    return _is_ours(kernel.dim() - 2, x, kernel, bias)


def convolve(convolution: Convolution, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Convolve tensors; None where the host is to do it."""
    setting = convolution.setting
    try:
        geometry = setting.geometry(x.shape, kernel.shape)
    except (TypeError, ValueError):
        return None
    source = x.movedim(-1, 1) if setting.channels_last else x
    padding = [amount for pads in geometry.padding for amount in pads]
    numbers = list(geometry.stride), padding, list(geometry.dilation), geometry.groups
    weight = _weight(convolution, kernel)
    if setting.is_transposed:
        result = run("convolution_input", (list(geometry.input_size), weight, source, bias, *numbers))
        if result is not None and convolution.relu:
            result = torch.relu(result)
    else:
        result = run("convolution", (source, weight, bias, *numbers, convolution.relu))
    return None if result is None else result.movedim(1, -1) if setting.channels_last else result


class _Arranged(NamedTuple):
    """The weight of a kernel that nobody differentiates by, and the kernel as it was when it was made."""

    kernel: State
    weight: torch.Tensor


def _weight(convolution: Convolution, kernel: torch.Tensor) -> torch.Tensor:
    """Return the weight of a kernel: one that stays the same, so that what is made of it is kept, or one to learn."""
    setting = convolution.setting
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and kernel.requires_grad):
        convolution.arranged = None  # which is about to change
        return _as_weight(setting, kernel)
    arranged = convolution.arranged
    if arranged is None or not arranged.kernel.is_of(kernel):
        weight = _as_weight(setting, kernel.detach()).clone(memory_format=torch.contiguous_format)
        convolution.arranged = arranged = _Arranged(State(kernel), weight)
    return arranged.weight


def _as_weight(setting: Setting, kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(setting.order()).reshape(setting.weight_size(kernel.shape))
