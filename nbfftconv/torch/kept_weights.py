"""The kernels of weights that are tensors, kept from call to call as long as a tensor is there and has not changed."""

import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from nbfftconv.kept_kernels import KeptKernels
from nbfftconv.torch.arrays import array_of, memory_of

#: A change through ``.data`` counts no version up. So values are compared, as many from all over a weight; more would
#: take longer to read than a small convolution takes.
_SAMPLES = 2**6


class State:
    """A tensor as it is: its version and place, and some of its values.

    Parameters
    ----------
    tensor : torch.Tensor
    forget : callable, optional
        Called with the weak reference to the tensor, `tensor`, when it dies.
    """

    def __init__(self, tensor: torch.Tensor, forget: Callable[[weakref.ref], None] | None = None) -> None:
        flat = memory_of(tensor).reshape(-1)
        self.tensor = weakref.ref(tensor, forget)
        self._state, self._some = _state_of(tensor), flat[:: flat.size // _SAMPLES + 1]
        self._sample = self._some.tobytes()

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether this is that tensor, and it has not changed since."""
        if self.tensor() is not tensor or self._state != _state_of(tensor):
            return False
        return self._some.tobytes() == self._sample


class _Entry(NamedTuple):
    """Kernels, and what they were made of."""

    state: State
    kernels: KeptKernels


_entries: dict[int, _Entry] = {}


def kernels_of(weight: torch.Tensor) -> KeptKernels:
    """Return the kernels of a weight: those that are kept, or new ones, which are kept from now on."""
    if (kernels := known_kernels_of(weight)) is not None:
        return kernels
    kernels = KeptKernels(array_of(weight))
    _entries[id(weight)] = _Entry(State(weight, functools.partial(_forget, id(weight))), kernels)
    return kernels


def known_kernels_of(weight: torch.Tensor) -> KeptKernels | None:
    """Return the kernels of a weight if they are kept; None if they are not, or it has changed since."""
    found = _entries.get(id(weight))
    return found.kernels if found is not None and found.state.is_of(weight) else None


def _state_of(weight: torch.Tensor) -> tuple[int, int]:
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def forget(weight: torch.Tensor | None) -> None:
    """Keep the kernels of a weight no longer."""
    _entries.pop(id(weight), None)


def _forget(key: int, dead: weakref.ref) -> None:
    found = _entries.get(key)
    if found is not None and found.state.tensor is dead:
        _entries.pop(key, None)
