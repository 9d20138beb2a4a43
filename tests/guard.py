"""Memory that ends, or begins, at a page which must not be touched: who reads or writes beyond it ends the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np

from nbfftconv import scratch

_LINE = 64  # bytes


def guarded_bytes(nbytes: int, at_end: bool, alignment: int = 1) -> np.ndarray:
    """Bytes of memory between two such pages, next to the second one, or to the first; all bits are set.

    What the alignment of the first byte leaves at the end is in reach.
    """
    page = mmap.PAGESIZE
    room = -(-max(nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (base, base + page + room):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page + ((room - nbytes) // alignment * alignment if at_end else 0)
    array = np.frombuffer(memory, np.uint8, nbytes, offset)
    array[...] = 255
    return array


def guarded(array: np.ndarray, at_end: bool) -> np.ndarray:
    """Copy an array to such memory."""
    copy = np.ndarray(array.shape, array.dtype, guarded_bytes(array.nbytes, at_end))
    copy[...] = array
    return copy


@contextmanager
def guarded_scratch(at_end: bool) -> Iterator[list[int]]:
    """Within, all scratch memory and all results are such memory; yields a list of the bytes that were lent."""
    lent = []

    def lend(nbytes: int, spare: float = 1.0) -> scratch.Memory:
        lent.append(nbytes)
        array = guarded_bytes(nbytes, at_end, _LINE)
        return scratch.Memory(array, array.ctypes.data)

    def result(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return guarded(np.full(shape, np.nan, dtype), at_end)

    def together(sizes: Sequence[int]) -> list[scratch.Memory]:
        return [lend(nbytes) for nbytes in sizes]

    with mock.patch.multiple(scratch, borrow=lend, borrow_together=together, aligned=lend, lasting=lend, result=result):
        yield lent
