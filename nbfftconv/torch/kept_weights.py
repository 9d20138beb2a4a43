"""The kernels of weights that are tensors, kept from call to call as long as a tensor is there and has not changed."""

import functools
import weakref
from typing import NamedTuple

import torch

from nbfftconv.kept_kernels import KeptKernels
from nbfftconv.torch.arrays import array_of, values_of

#: A change through ``.data`` counts no version up. So values are compared: all of a small weight, and of a large one as
#: many from all over it.
_SAMPLES = 2**13


class _Entry(NamedTuple):
    """Kernels, and what they were made of: a tensor, its version and place, and some of its values."""

    tensor: weakref.ref
    state: tuple[int, int]
    sample: bytes
    kernels: KeptKernels


_entries: dict[int, _Entry] = {}


def kernels_of(weight: torch.Tensor) -> KeptKernels:
    """Return the kernels of a weight: those that are kept, or new ones, which are kept from now on."""
    key, state = id(weight), (0 if weight.is_inference() else weight._version, weight.data_ptr())
    flat = values_of(weight)
    sample = flat[:: flat.size // _SAMPLES + 1].tobytes()
    found = _entries.get(key)
    if found is not None and found.tensor() is weight and found.state == state and found.sample == sample:
        return found.kernels
    kernels = KeptKernels(array_of(weight))
    reference = weakref.ref(weight, functools.partial(_forget, key))
    _entries[key] = _Entry(reference, state, sample, kernels)
    return kernels


def forget(weight: torch.Tensor | None) -> None:
    """Keep the kernels of a weight no longer."""
    _entries.pop(id(weight), None)


def _forget(key: int, dead: weakref.ref) -> None:
    found = _entries.get(key)
    if found is not None and found.tensor is dead:
        _entries.pop(key, None)
