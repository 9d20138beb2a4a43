"""The kernels of weights that are tensors, kept from call to call as long as a tensor is there and has not changed."""

import functools
import weakref
from typing import NamedTuple

import numpy as np
import torch

from nbfftconv.kept_kernels import KeptKernels
from nbfftconv.torch.arrays import array_of, values_of

#: A change through ``.data`` counts no version up. So values are compared, as many from all over a weight; more would
#: take longer to read than a small convolution takes.
_SAMPLES = 2**6


class _Entry(NamedTuple):
    """Kernels, and what they were made of: a tensor, its version and place, and some of its values as they were."""

    tensor: weakref.ref
    state: tuple[int, int]
    some: np.ndarray
    sample: bytes
    kernels: KeptKernels


_entries: dict[int, _Entry] = {}


def kernels_of(weight: torch.Tensor) -> KeptKernels:
    """Return the kernels of a weight: those that are kept, or new ones, which are kept from now on."""
    if (kernels := known_kernels_of(weight)) is not None:
        return kernels
    flat = values_of(weight)
    some = flat[:: flat.size // _SAMPLES + 1]
    kernels = KeptKernels(array_of(weight))
    reference = weakref.ref(weight, functools.partial(_forget, id(weight)))
    _entries[id(weight)] = _Entry(reference, _state_of(weight), some, some.tobytes(), kernels)
    return kernels


def known_kernels_of(weight: torch.Tensor) -> KeptKernels | None:
    """Return the kernels of a weight if they are kept; None if they are not, or it has changed since."""
    found = _entries.get(id(weight))
    if found is None or found.tensor() is not weight or found.state != _state_of(weight):
        return None
    return found.kernels if found.some.tobytes() == found.sample else None


def _state_of(weight: torch.Tensor) -> tuple[int, int]:
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def forget(weight: torch.Tensor | None) -> None:
    """Keep the kernels of a weight no longer."""
    _entries.pop(id(weight), None)


def _forget(key: int, dead: weakref.ref) -> None:
    found = _entries.get(key)
    if found is not None and found.tensor is dead:
        _entries.pop(key, None)
