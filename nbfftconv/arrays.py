"""The border: array-likes become arrays that compiled code may touch, or an error that says what was wrong."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def as_float(name: str, value: ArrayLike) -> np.ndarray:
    """Return a float32 or float64 array, in native byte order or not; no copy yet.

    Raises
    ------
    TypeError
        If the dtype is another one; values are not converted silently.
    """
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise TypeError(
            f"{name} must be float32 or float64, got {array.dtype} of shape {array.shape}; "
            f"cast it with {name}.astype(numpy.float32) or {name}.astype(numpy.float64)"
        )
    return array


def as_float4(name: str, value: ArrayLike) -> np.ndarray:
    """Return a four-dimensional array as `as_float` does; ValueError for another rank."""
    array = as_float(name, value)
    if array.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {array.shape}")
    return array


def result_type(*arrays: np.ndarray) -> np.dtype:
    """NumPy's promotion, in native byte order."""
    return np.result_type(*arrays).newbyteorder("=")


def compact(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array C-contiguous, aligned and of a native dtype; a copy only where it is not so already."""
    return np.require(array, dtype, ["C", "A"])


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError if an array does not have the shape that the others imply."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but {why} need {shape}")


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise TypeError or ValueError if `out` cannot take the result."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must have the dtype of the result, {dtype}, got {out.dtype}")
    check_shape("out", out, shape, "the other arguments")
    if not out.flags.writeable:
        raise ValueError(f"out, of shape {out.shape}, is read-only")


def is_usable_out(out: np.ndarray, *operands: np.ndarray | None) -> bool:
    """Whether compiled code may write into `out` directly: compact, and apart from all operands."""
    compact_enough = out.flags.c_contiguous and out.flags.aligned and out.dtype.isnative
    return compact_enough and not any(np.may_share_memory(out, a) for a in operands if a is not None)
