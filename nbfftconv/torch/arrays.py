"""Tensors as arrays of the same memory, and the other way round; geometries of operators."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nbfftconv.channels_last import to_channels_first, to_channels_last
from nbfftconv.geometry import ConvGeometry

#: What this package computes in.
DTYPES = torch.float32, torch.float64
#: The order of memory with channels last, by a tensor's dimensions.
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_last(tensor: torch.Tensor) -> bool:
    """Return whether the channels of a tensor are last in memory, and not first as well."""
    order = LAST.get(tensor.dim())
    return order is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=order)


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values, with its channels first in memory; a copy only where they are not."""
    tensor = tensor.detach().resolve_neg()
    if is_last(tensor):
        return to_channels_first(tensor.movedim(1, -1).numpy())
    return tensor.contiguous().numpy()


def memory_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values in the order of its memory, with channels last or first; a copy only if it has gaps."""
    tensor = tensor.detach().resolve_neg()
    if is_last(tensor):
        tensor = tensor.movedim(1, -1)
    return tensor.contiguous().numpy()


def dtype_of(tensor: torch.Tensor) -> np.dtype:
    """Return the dtype of arrays with a tensor's values."""
    return np.dtype(np.float32 if tensor.dtype == torch.float32 else np.float64)


def tensor_of(array: np.ndarray, channels_last: bool) -> torch.Tensor:
    """Return an array as a tensor of the same memory, or with its channels last."""
    if channels_last:
        return torch.from_numpy(to_channels_last(array)).movedim(-1, 1)
    return torch.from_numpy(array)


def tensor_last(array: np.ndarray, size: tuple[int, ...]) -> torch.Tensor:
    """Return an array whose channels come last as a tensor of that size."""
    batch, channels, *space = size
    return torch.from_numpy(array.reshape(batch, *space, channels)).movedim(-1, 1)


def geometry_of(input_size: Sequence[int], weight_size: Sequence[int], numbers: Sequence[Any]) -> ConvGeometry:
    """Return the geometry of stride, padding, dilation and groups as operators have them."""
    stride, padding, dilation, groups = numbers
    pads = tuple(zip(padding[::2], padding[1::2], strict=True))
    return ConvGeometry.of_unchanging(
        tuple(input_size), tuple(weight_size), tuple(stride), pads, tuple(dilation), groups
    )
