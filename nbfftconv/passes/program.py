"""Programs: the tasks of a pass, made once a plan, in whose records addresses are open.

What the records of a pass say depends on its plan, but for the addresses of arrays and of memory that it borrows. So a
pass is recorded with operands of which only the sizes are known, each in a region of addresses of its own, where no
memory is. Every word of a record that lies in a region is an address; a call puts the true one there.
"""

import math
from array import array
from typing import NamedTuple

import numpy as np

from nbfftconv import scratch, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.context import Context, Operand
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.records import Record
from nbfftconv.rounding import cdiv
from nbfftconv.scratch import Memory

# A region is of addresses with the same bits from this one on; its array begins in the middle, so that what points to
# some bytes before it is in the region, too.
_BITS = 56
_MIDDLE = 1 << (_BITS - 1)
#: An array where none is needed.
NOTHING = np.empty(0, np.uint8)


class _Open(NamedTuple):
    """A word of a record: the address of an operand, plus an offset in bytes."""

    word: int
    operand: int
    offset: int


class Recorder(Context):
    """A pass that is recorded: with an `operand` for each array, tasks are added as for one that is run."""

    def __init__(self, plan: TiledPlan, geometry: ConvGeometry) -> None:
        self.names: list[str] = []
        self.borrowed: list[int] = []
        self.zeroed_words: list[int] = []
        self.cleared: tuple[int, ...] | None = None
        super().__init__(plan, geometry)

    def operand(self, name: str, shape: tuple[int, ...], itemsize: int) -> Operand:
        """Return what stands for an array; a call has its address by the name."""
        self.names.append(name)
        return Operand((len(self.names) << _BITS) + _MIDDLE, shape, itemsize, itemsize * math.prod(shape))

    def borrow(self, nbytes: int) -> Memory:
        """Stand for scratch memory."""
        self.borrowed.append(nbytes)
        return Memory(NOTHING, self.operand(f"borrowed {len(self.borrowed)}", (nbytes,), 1).address)

    def zeroed(self, count: int, dtype: type) -> Operand:
        """Stand for an array of zeros."""
        array = self.operand(f"zeroed {len(self.zeroed_words) + 1}", (count,), np.dtype(dtype).itemsize)
        self.zeroed_words.append(cdiv(array.nbytes, 8))
        return array

    def clear(self, memory: Memory, areas: int, area: int, begin: int, end: int) -> None:
        """Note what of scratch memory is to be cleared: the last that was borrowed."""
        self.cleared = len(self.borrowed) - 1, areas, area, begin, end

    def program(self) -> "Program":
        """Return the program of the tasks that were added."""
        return Program(self)


class Program:
    """The tasks of a pass, for all calls of a plan.

    Parameters
    ----------
    recorder : Recorder
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder  # keeps alive what records have the addresses of
        self._tasks = [
            (stage, record, items, workers, self._open_words(record))
            for stage, record, items, workers in recorder.tasks
        ]
        self._named = {name: number for number, name in enumerate(recorder.names)}
        self._borrowed = [(self._named[f"borrowed {i}"], nbytes) for i, nbytes in enumerate(recorder.borrowed, 1)]
        self._zeroed, words = [], 0
        for i, count in enumerate(recorder.zeroed_words, 1):
            self._zeroed.append((self._named[f"zeroed {i}"], words))
            words += count
        self._zero_words = words

    @staticmethod
    def _open_words(record: Record) -> list[_Open]:
        words = ((word, value, (value >> _BITS) - 1) for word, value in enumerate(record.words))
        return [
            _Open(word, operand, value - ((operand + 1) << _BITS) - _MIDDLE)
            for word, value, operand in words
            if operand >= 0
        ]

    def run(self, **addresses: int) -> "array[int]":
        """Run the tasks on operands at these addresses; return the words of the zeroed arrays, one after the other.

        Those that no record has may be left out.
        """
        state = array("q", bytes(8 * self._zero_words))
        places = [0] * len(self._named)
        for name, address in addresses.items():
            places[self._named[name]] = address
        memory = scratch.borrow_together([nbytes for _, nbytes in self._borrowed])
        for (operand, _), (_, address) in zip(self._borrowed, memory, strict=True):
            places[operand] = address
        zeros = state.buffer_info()[0]
        for operand, word in self._zeroed:
            places[operand] = zeros + 8 * word
        if self._recorder.cleared is not None:
            borrowed, areas, area, begin, end = self._recorder.cleared
            memory[borrowed].array[: areas * area].reshape(areas, area)[:, begin:end] = 0
        tasks = []
        for stage, template, items, workers, opened in self._tasks:
            record = template.copy()
            words = record.words
            for word, operand, offset in opened:
                words[word] = places[operand] + offset
            tasks.append(threads.Task(stage, record, items, workers))
        threads.run(*tasks)
        return state
