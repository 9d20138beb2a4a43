"""The border: array-likes become arrays that compiled code may touch, or an error that says what was wrong."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv.target import TARGET

#: An array larger than this would not be found in the caches of a core, but drive out what is there.
_STREAMED_BYTES = 2 * TARGET.l2_bytes


def as_array(name: str, value: Any) -> np.ndarray:
    """Return an array of any dtype; no copy.

    Raises
    ------
    TypeError
        If `value` says that it can be no array, or is masked: the values behind a mask are not to be computed with.
    ValueError
        If its parts differ in length.
    """
    try:
        array = None if _is_masked(value) else np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be made an array: {error}") from error
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise TypeError(f"{name}, of type {type(value).__name__}, cannot be made an array: {error}") from error
    if array is None:
        of = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else f"of shape {value.shape}"
        raise TypeError(f"{name}, {of}, is masked; fill it first, say with numpy.ma.filled({name}, 0)")
    return array


def _is_masked(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_masked, value))
    return isinstance(value, np.ma.MaskedArray)


def as_float(name: str, value: ArrayLike) -> np.ndarray:
    """Return a float32 or float64 array, in native byte order or not; no copy yet.

    Raises
    ------
    TypeError
        If the dtype is another one; values are not converted silently. Also as `as_array` does.
    ValueError
        As `as_array` does.
    """
    array = as_array(name, value)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        if array.dtype.kind == "c":
            cure = "convolve its real and its imaginary part apart"
        else:
            cure = f"cast it with {name}.astype(numpy.float32) or {name}.astype(numpy.float64)"
        raise TypeError(f"{name} must be float32 or float64, got {array.dtype} of shape {array.shape}; {cure}")
    return array


def as_weak_float(name: str, value: ArrayLike, dtype: np.dtype) -> np.ndarray:
    """Return an array as `as_float` does; numbers in lists and tuples take `dtype`, as Python's numbers do in NumPy.

    Raises
    ------
    TypeError
        If they are not numbers that are real. Also as `as_float` does.
    ValueError
        If one is finite, but not in `dtype`. Also as `as_float` does.
    """
    if not isinstance(value, (list, tuple)):
        return as_float(name, value)
    array = as_array(name, value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be made of real numbers, got {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):
        weak = array.astype(dtype)
    if (overflowing := np.isinf(weak) & np.isfinite(array)).any():
        raise ValueError(f"{name} has {array[overflowing].flat[0]}, which is infinite in {dtype}")
    return weak


def result_type(*arrays: np.ndarray) -> np.dtype:
    """NumPy's promotion, in native byte order."""
    return np.result_type(*arrays).newbyteorder("=")


def is_compact(array: np.ndarray) -> bool:
    """Whether an array is C-contiguous and aligned."""
    flags = array.flags
    return flags.c_contiguous and flags.aligned


def compact(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array C-contiguous, aligned and of a native dtype; a copy only where it is not so already."""
    if array.dtype == dtype and is_compact(array):
        return array
    return np.require(array, dtype, ["C", "A"])


def address_of(array: np.ndarray | None) -> int:
    """Return the address of a compact array's first element; 0 where there is none."""
    if array is None:
        return 0
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]  # array.ctypes takes four times as long
    except (TypeError, ValueError):  # read-only, or empty
        return array.ctypes.data


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError if an array does not have the shape that the others imply."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but {why} need {shape}")


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise TypeError or ValueError if `out` cannot take the result."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a numpy.ndarray without a mask, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must have the dtype of the result, {dtype}, got {out.dtype}")
    check_shape("out", out, shape, "the other arguments")
    if not out.flags.writeable:
        raise ValueError(f"out, of shape {out.shape}, is read-only")


def is_usable_out(out: np.ndarray, *operands: np.ndarray | None) -> bool:
    """Whether compiled code may write into `out` directly: compact, and apart from all operands."""
    compact_enough = out.flags.c_contiguous and out.flags.aligned and out.dtype.isnative
    return compact_enough and not any(np.may_share_memory(out, a) for a in operands if a is not None)


def is_streamed(nbytes: int) -> bool:
    """Whether an array of so many bytes is to be written past the caches."""
    return nbytes > _STREAMED_BYTES
