"""Programs: the tasks of a pass, made once a plan, in whose records addresses are open.

What the records of a pass say depends on its plan, but for the addresses of arrays and of memory that it borrows. So a
pass is recorded with operands of which only the sizes are known, each in a region of addresses of its own, where no
memory is. Every word of a record that lies in a region is an address; a call puts the true one there.
"""

import itertools
import math
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nbfftconv import scratch
from nbfftconv.rounding import cdiv
from nbfftconv.scratch import Memory
from nbfftconv.threads import Task, TaskTable

# A region is of addresses with the same bits from this one on; its array begins in the middle, so that what points to
# some bytes before it is in the region, too.
_BITS = 56
_MIDDLE = 1 << (_BITS - 1)
#: An array where none is needed.
NOTHING = np.empty(0, np.uint8)


class Operand(NamedTuple):
    """Stands for an array while a program is recorded.

    Attributes
    ----------
    address : int
        Where no memory is.
    shape : tuple of int
    itemsize, nbytes : int
    """

    address: int
    shape: tuple[int, ...]
    itemsize: int
    nbytes: int


class _Open(NamedTuple):
    """A word of a table: the address of an operand, by its number, plus an offset in bytes."""

    word: int
    operand: int
    offset: int


class Recording:
    """What stands for arrays and memory while tasks are made for a program.

    Attributes
    ----------
    names : list of str
        Of the arrays that a call has.
    borrowed : list of int
        Bytes of each area of scratch memory.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.borrowed: list[int] = []
        self._zeroed_words: list[int] = []
        self._cleared: tuple[int, int, int, int, int] | None = None
        # of each operand, whether it is one of the call's arrays, or of the memory that is borrowed or zeroed; and its
        # number among these
        self._kinds: list[tuple[str, int]] = []

    def _new(self, kind: str, number: int, shape: tuple[int, ...], itemsize: int) -> Operand:
        self._kinds.append((kind, number))
        return Operand((len(self._kinds) << _BITS) + _MIDDLE, shape, itemsize, itemsize * math.prod(shape))

    def operand(self, name: str, shape: tuple[int, ...] = (), itemsize: int = 1) -> Operand:
        """Return what stands for an array; a call has its address by the name."""
        self.names.append(name)
        return self._new("array", len(self.names) - 1, shape, itemsize)

    def borrow(self, nbytes: int) -> Memory:
        """Stand for scratch memory."""
        self.borrowed.append(nbytes)
        return Memory(NOTHING, self._new("borrowed", len(self.borrowed) - 1, (nbytes,), 1).address)

    def zeroed(self, count: int, dtype: Any) -> Operand:
        """Stand for an array of zeros."""
        itemsize = np.dtype(dtype).itemsize
        self._zeroed_words.append(cdiv(count * itemsize, 8))
        return self._new("zeroed", len(self._zeroed_words) - 1, (count,), itemsize)

    def clear(self, memory: Memory, areas: int, area: int, begin: int, end: int) -> None:
        """Note what of scratch memory is to be cleared: the last that was borrowed."""
        self._cleared = len(self.borrowed) - 1, areas, area, begin, end

    def program(self, tasks: Iterable[Task], *kept: Any) -> "Program":
        """Return the program of tasks; what is `kept` has addresses in their records, and stays alive."""
        return Program(self, tasks, kept)


class Program:
    """The tasks of a pass, for all calls of a plan. Made by `Recording.program`."""

    def __init__(self, recording: Recording, tasks: Iterable[Task], kept: tuple[Any, ...]) -> None:
        self._kept = kept
        self._table = TaskTable(tasks)
        self._names, self._borrowed, self._cleared = recording.names, recording.borrowed, recording._cleared
        # a call has the addresses of its arrays, of what it borrows, and of the zeros, which are at the table's end
        first = {"array": 0, "borrowed": len(self._names), "zeroed": len(self._names) + len(self._borrowed)}
        ends = list(itertools.accumulate(recording._zeroed_words, initial=0))
        self._open = []
        for word, operand, offset in _open_words(self._table.words):
            kind, number = recording._kinds[operand]
            if kind == "zeroed":  # one address for all
                number, offset = 0, offset + 8 * ends[number]
            self._open.append(_Open(word, first[kind] + number, offset))
        self._end = len(self._table.words)
        self._words = self._table.words + array("q", bytes(8 * ends[-1]))

    def run(self, **addresses: int) -> "array[int]":
        """Run the tasks on operands at these addresses; return the words of the zeroed arrays, one after the other.

        Those that no record has may be left out.
        """
        words = self._words[:]
        memory = scratch.borrow_together(self._borrowed)
        places = [addresses.get(name, 0) for name in self._names]
        places += [area.address for area in memory]
        places.append(words.buffer_info()[0] + 8 * self._end)
        if self._cleared is not None:
            borrowed, areas, area, begin, end = self._cleared
            memory[borrowed].array[: areas * area].reshape(areas, area)[:, begin:end] = 0
        for word, operand, offset in self._open:
            words[word] = places[operand] + offset
        self._table.run(words)
        return words[self._end :]


def _open_words(words: "array[int]") -> list[_Open]:
    """Return the words that are addresses of operands, by their number among all."""
    numbers = ((word, value, (value >> _BITS) - 1) for word, value in enumerate(words))
    return [
        _Open(word, operand, value - ((operand + 1) << _BITS) - _MIDDLE)
        for word, value, operand in numbers
        if operand >= 0
    ]
