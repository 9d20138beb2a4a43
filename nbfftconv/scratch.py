"""Memory that is used again: its bound, scratch memory that passes borrow and give back, and results.

Memory fresh from the system costs a page fault every few KiB, for a block of tiles as much as their transforms, and for
a large result as much as writing it twice. So what a pass gives back, and a result that nobody refers to any more, is
kept for the next one, up to the bound.
"""

import collections
import contextlib
import math
import os
from collections.abc import Iterator

import numpy as np

from nbfftconv.forking import fork_safe_lock

_DEFAULT_LIMIT = 512 * 2**20
_SMALL_RESULT = 2**20  # bytes below which a result is not worth keeping


def _limit_from_environment() -> int:
    text = os.environ.get("NBFFTCONV_SCRATCH_BYTES", "")
    return int(text) if text.isdecimal() and int(text) > 0 else _DEFAULT_LIMIT


_limit = _limit_from_environment()
_lock = fork_safe_lock()
_is_busy = False  # somebody is at what is kept: it may be this thread, interrupted by a finalizer
_kept: list[np.ndarray] = []
_returned: collections.deque[np.ndarray] = collections.deque()  # of results; a finalizer must not wait for the lock


def set_scratch_limit(nbytes: int) -> None:
    """Bound the memory that a call takes for the spectra of its tiles; the kernels' spectra come on top of it.

    Parameters
    ----------
    nbytes : int
        At first 512 MiB, or what ``NBFFTCONV_SCRATCH_BYTES`` says. As much is kept between calls, at most, with results
        that nobody refers to any more. Results depend on it by rounding only, where it rules out the tiles or the
        blocks that would be chosen without it.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is less than 1.
    """
    global _limit
    if isinstance(nbytes, bool) or not isinstance(nbytes, (int, np.integer)):
        raise TypeError(f"the scratch limit must be an integer number of bytes, got {nbytes!r}")
    if nbytes < 1:
        raise ValueError(f"the scratch limit must be at least 1 byte, got {nbytes}")
    with _exclusive():
        _limit = int(nbytes)
        _returned.clear()
        _kept.clear()


def get_scratch_limit() -> int:
    """Return the bound in bytes on the memory that a call takes for the spectra of its tiles."""
    return _limit


def aligned(nbytes: int) -> np.ndarray:
    """Return uninitialised bytes that begin at a cache line."""
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def borrow(nbytes: int, spare: float = 1.0) -> np.ndarray:
    """Return at least `nbytes` bytes that begin at a cache line, of any content; a share of `spare` more at most."""
    with _exclusive():
        _collect()
        largest = (1 + spare) * nbytes + 2**16
        fitting = [i for i, array in enumerate(_kept) if nbytes <= array.nbytes <= largest]
        if fitting:
            return _kept.pop(min(fitting, key=lambda i: _kept[i].nbytes))
    return aligned(nbytes)


def give_back(*arrays: np.ndarray) -> None:
    """Keep what was borrowed for a later pass, and let go of what was kept longest, past the bound."""
    with _exclusive():
        _kept.extend(arrays)
        _collect()


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    global _is_busy
    with _lock:
        _is_busy = True
        try:
            yield
        finally:
            _is_busy = False


def _collect() -> None:
    while _returned:
        _kept.append(_returned.popleft())
    while sum(kept.nbytes for kept in _kept) > _limit:
        _kept.pop(0)


def _take_back(memory: np.ndarray) -> None:
    """Keep the memory of a result: at once, so that the bound holds, or when whoever is busy comes back."""
    _returned.append(memory)
    if _lock.acquire(blocking=False):
        try:
            if not _is_busy:
                with _exclusive():
                    _collect()
        finally:
            _lock.release()


class _Loan:
    """The base of a result: its memory comes back when the last array that views it is gone."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._memory = memory
        address = memory.ctypes.data, False
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": address}

    def __del__(self) -> None:
        if _take_back is not None:  # as it is when the interpreter ends
            _take_back(self._memory)


def result(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array, of memory that is used again if it is large and within the bound."""
    nbytes = math.prod(shape) * dtype.itemsize
    return _lent(nbytes, shape, dtype) if _is_worth_keeping(nbytes) else np.empty(shape, dtype)


def lasting(nbytes: int) -> np.ndarray:
    """Return uninitialised bytes that begin at a cache line, of memory that is used again like that of a result."""
    return _lent(nbytes, (nbytes,), np.dtype(np.uint8)) if _is_worth_keeping(nbytes) else aligned(nbytes)


def _is_worth_keeping(nbytes: int) -> bool:
    return _SMALL_RESULT <= nbytes <= _limit


def _lent(nbytes: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.asarray(_Loan(borrow(nbytes, spare=0.1), shape, dtype))
