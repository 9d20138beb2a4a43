"""The bound on what is kept between calls: kernels of all layers in other forms, and memory that is free to be used.

Kernels come first: `nbfftconv.scratch` keeps free memory within what they leave, since they take longer to be made
again. A layer that is gone is noticed when room is next asked for, not by a finalizer: exceptions in one would be lost.
"""

import ctypes
import itertools
import os
import weakref
from typing import Any, Protocol

import numpy as np

from nbfftconv import environment, epoch

#: Bytes that are kept by default, on top of so many times the weights of the layers that keep kernels.
_DEFAULT, _WEIGHTS = 384 * 2**20, 2


class Holder(Protocol):
    """What keeps kernels.

    Attributes
    ----------
    weight : numpy.ndarray
    nbytes : int
        Bytes of what is kept of it.
    """

    weight: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""


_from_environment = environment.number_of_bytes(environment.MEMORY_BYTES)
_limit: int | None = _from_environment
_limit_source = "environment" if _from_environment else "default"
_holders: dict[int, "weakref.ref[Holder]"] = {}
_numbers = itertools.count()
_room: int | None = None  # None if it has to be found out


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def trim_heap() -> None:
    """Give back to the system what the C library's heap has free, where there is a way to."""
    if _trim is not None:
        _trim(0)


def check_bytes(name: str, value: Any, least: int) -> int:
    """Return a limit in bytes as an int; raise TypeError if it is no integer, ValueError if it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer number of bytes, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} byte{'s' * (least != 1)}, got {value}")
    return int(value)


def set_memory_limit(nbytes: int | None) -> None:
    """Bound the memory that is kept between calls.

    That is the kernels of all layers in the forms that plans need, and free memory of results and tiles.

    Parameters
    ----------
    nbytes : int or None
        None, as at first, is for 384 MiB and twice the weights of the layers that have computed anything; or what
        ``NBFFTCONV_MEMORY_BYTES`` says. What is kept already and not within the bound goes when memory is next asked
        for. Kernels that find no room are made anew by every call. A layer's plan weighs what its kernels would take,
        so that its results may depend on the bound, by rounding.

    Raises
    ------
    TypeError
        If it is neither an integer nor None.
    ValueError
        If it is negative.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.set_memory_limit(2**26)
    >>> config.get_memory_limit()
    67108864
    >>> config.set_memory_limit(None)
    """
    global _limit, _limit_source
    if nbytes is None:
        _limit, _limit_source = None, "default"
    else:
        _limit, _limit_source = check_bytes("the memory limit", nbytes, 0), "set"
    forget_room()
    epoch.begin()


def get_memory_limit() -> int:
    """Return the bound on the memory that is kept between calls.

    Returns
    -------
    int
        Bytes, as of `set_memory_limit`.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.get_memory_limit() >= 2**26
    True
    """
    return _DEFAULT + _WEIGHTS * sum(each.weight.nbytes for each in holders()) if _limit is None else _limit


def given_memory_limit() -> int | None:
    """Return the bound that was set; None if it goes by the weights."""
    return _limit


def memory_limit_source() -> str:
    """Return where the bound comes from: "set", "environment" or "default"."""
    return _limit_source


def add_holder(holder: Holder) -> None:
    """Count what a holder keeps, as long as it lives."""
    _holders[next(_numbers)] = weakref.ref(holder)
    forget_room()


def holders() -> list[Holder]:
    """Return all that live."""
    alive = []
    for number, reference in list(_holders.items()):
        holder = reference()
        if holder is None:
            _holders.pop(number, None)
        else:
            alive.append(holder)
    return alive


def forget_room() -> None:
    """Count anew when room is next asked for: a holder keeps more, or less."""
    global _room
    _room = None


def room() -> int:
    """Return how many bytes the kernels that are kept leave; none if it is less than 0."""
    global _room
    found = _room
    if found is None:
        _room = found = get_memory_limit() - sum(holder.nbytes for holder in holders())
    return found
