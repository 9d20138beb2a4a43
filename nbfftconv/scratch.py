"""Memory that is used again: its bound, scratch memory of passes, and results.

Memory fresh from the system costs a page fault every few KiB, for a block of tiles as much as their transforms, and for
a large result as much as writing it twice. So the pool keeps what it lends, up to the bound, and lends it again once
nobody else refers to it.

No finalizer tells when that is: Python drops exceptions that are raised in one, a KeyboardInterrupt among them.
Instead the pool looks for memory that only itself refers to; NumPy lets every view of an array refer to the array that
owns the memory. Nor is there a lock, which a signal handler could find held by the very thread that it interrupts:
what changes the pool is one operation of a dictionary at a time, and whatever happens in between leaves the pool whole.
"""

import math
import operator
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nbfftconv import environment, epoch, memory
from nbfftconv.rounding import round_up
from nbfftconv.target import LINE_BYTES

_DEFAULT_LIMIT = 512 * 2**20
_SMALL_RESULT = 2**20  # bytes below which a result is not worth keeping
_BYTE = np.dtype(np.uint8)


_from_environment = environment.number_of_bytes(environment.SCRATCH_BYTES)
_limit = _from_environment or _DEFAULT_LIMIT
_limit_source = "environment" if _from_environment else "default"


class Memory(NamedTuple):
    """Bytes that begin at a cache line, and the address of the first, which takes a microsecond to ask an array for."""

    array: np.ndarray
    address: int


class _Owner(NamedTuple):
    """An array that owns its memory; the first byte at a cache line, its address, and how many can be lent."""

    array: np.ndarray
    first: int
    address: int
    nbytes: int

    def lent(self) -> Memory:
        """Return its memory, which refers to the array."""
        return Memory(np.ndarray((self.nbytes,), _BYTE, self.array, self.first), self.address)


_size = operator.attrgetter("nbytes")

#: By the array's address as an object, all memory that was lent, the last at the end: lent still, or free to be again.
_pool: dict[int, _Owner] = {}


def set_scratch_limit(nbytes: int) -> None:
    """Bound the memory that a call takes for the spectra of its tiles; the kernels' spectra come on top of it.

    Parameters
    ----------
    nbytes : int
        At least 1; at first 512 MiB, or what ``NBFFTCONV_SCRATCH_BYTES`` says. As much memory is kept to be used again,
        at most, with that of results, whether somebody refers to them or not, and less if that is free and
        `nbfftconv.config.set_memory_limit` says so. Results depend on it by rounding only, where it rules out the tiles
        or the blocks that would be chosen without it.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is less than 1.

    Examples
    --------
    >>> from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
    >>> before = get_scratch_limit()
    >>> set_scratch_limit(2**26)
    >>> get_scratch_limit()
    67108864
    >>> set_scratch_limit(before)
    """
    global _limit, _limit_source
    _limit, _limit_source = memory.check_bytes("the scratch limit", nbytes, 1), "set"
    epoch.begin()
    _pool.clear()


def get_scratch_limit() -> int:
    """Return the bound on the memory that a call takes for the spectra of its tiles.

    Returns
    -------
    int
        Bytes, as of `set_scratch_limit`.

    Examples
    --------
    >>> from nbfftconv.scratch import get_scratch_limit
    >>> get_scratch_limit() >= 1
    True
    """
    return _limit


def scratch_limit_source() -> str:
    """Return where the bound comes from: "set", "environment" or "default"."""
    return _limit_source


def aligned(nbytes: int) -> Memory:
    """Return uninitialised bytes of memory of its own."""
    return _new(nbytes).lent()


def borrow(nbytes: int, spare: float = 15.0) -> Memory:
    """Lend at least `nbytes` bytes that begin at a cache line, of any content; a share of `spare` more at most.

    They are lent until nothing refers to the array any more.
    """
    limit = _limit
    owner = _take_free(nbytes, (1 + spare) * nbytes + 2**16) if _pool else None
    if owner is not None:
        lent = owner.lent()  # first: who finds the owner in the pool sees by it that it is lent
        _pool[id(owner.array)] = owner
        # another thread may have set a limit; and results may be free by now that were not
        if limit != _limit or sum(map(_size, list(_pool.values()))) > memory.room():
            trim()
        return lent
    owner = _new(nbytes)
    lent = owner.lent()
    if nbytes <= _limit:
        _make_room(nbytes)
        _pool[id(owner.array)] = owner
        trim()  # the limit may have changed, or another thread have lent as well
    return lent


def borrow_together(sizes: Sequence[int]) -> list[Memory]:
    """Lend so many areas at once, each as `borrow` does; they are of one array."""
    if len(sizes) == 1:
        return [borrow(sizes[0])]
    offsets, total = [], 0
    for nbytes in sizes:
        offsets.append(total)
        total += round_up(nbytes, LINE_BYTES)
    array, address = borrow(total)
    return [Memory(array[offset:], address + offset) for offset in offsets]


def result(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array, of memory that is used again if it is large and within the bound."""
    nbytes = math.prod(shape) * dtype.itemsize
    return np.ndarray(shape, dtype, borrow(nbytes, 0.1).array) if nbytes >= _SMALL_RESULT else np.empty(shape, dtype)


def lasting(nbytes: int) -> Memory:
    """Return uninitialised bytes, of memory that is used again like that of a result."""
    if nbytes < _SMALL_RESULT:
        return aligned(nbytes)
    array, address = borrow(nbytes, 0.1)
    return Memory(array[:nbytes], address)


def _new(nbytes: int) -> _Owner:
    array = np.empty(nbytes + LINE_BYTES, _BYTE)
    address = array.ctypes.data
    first = -address % LINE_BYTES
    return _Owner(array, first, address + first, nbytes)


def _take_free(least: int, most: float) -> _Owner | None:
    """Take the smallest that fits, and whose array nobody else refers to, from the pool; None if there is none."""
    fitting = [owner for owner in list(_pool.values()) if least <= owner.nbytes <= most]
    if len(fitting) > 1:
        fitting.sort(key=_size)
    for owner in fitting:
        if _is_free(owner):
            key = id(owner.array)
            found = _pool.pop(key, None)  # from now on only this call can lend it
            if found is owner and _is_free(owner):
                return owner
            if found is not None:  # lent, or replaced, by another thread or by what has interrupted this call
                _pool[key] = found
    return None


def _is_free(owner: _Owner) -> bool:
    """Whether nobody but its owner refers to an array."""
    return _references(owner) == _FEWEST


def _references(owner: _Owner) -> int:
    return sys.getrefcount(owner.array)


#: Those of an array to which only its owner refers: Python's own, of the call, are not the same in all its versions.
_FEWEST = _references(_Owner(np.empty(0, _BYTE), 0, 0, 0))


def release() -> None:
    """Give back all memory that is free: after races, which took more than what was chosen will."""
    free = [key for key, owner in list(_pool.items()) if _is_free(owner)]
    for key in free:
        _pool.pop(key, None)
    memory.trim_heap()


def trim() -> None:
    """Let go of what is not within the bounds, which have changed."""
    _make_room(0)


def _make_room(nbytes: int) -> None:
    """Let go of what was lent longest ago until so many bytes more are within the bounds: of all, and of what is free.

    What is in use then belongs to its users alone.
    """
    owners = list(_pool.items())
    excess = sum(owner.nbytes for _, owner in owners) + nbytes - _limit
    free = [(key, owner) for key, owner in owners if _is_free(owner)]
    excess_free = sum(owner.nbytes for _, owner in free) - memory.room()
    for kind, over in ((free, excess_free), (owners, excess)):
        for key, owner in kind:
            if over <= 0:
                break
            if _pool.pop(key, None) is not None:
                over -= owner.nbytes
