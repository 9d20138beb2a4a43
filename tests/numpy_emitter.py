"""The interface of `nbfftconv.simd.Emitter`, with NumPy arrays for vectors: emitters run without being compiled.

Addresses are integers into memory of the emitter's own, in which all that was not written is NaN. Instructions are
counted, of arithmetic those that something stored depends on: a compiler drops the others.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import numpy as np


class Vector(np.lib.mixins.NDArrayOperatorsMixin):
    """Floating-point lanes, and how they came about."""

    def __init__(self, lanes, instruction=None, operands=()):
        self.lanes, self.instruction = np.asarray(lanes), instruction
        self.operands = [operand for operand in operands if isinstance(operand, Vector)]

    def __array_ufunc__(self, ufunc, method, *operands, **keywords):
        lanes = ufunc(*(operand.lanes if isinstance(operand, Vector) else operand for operand in operands))
        return lanes if lanes.dtype == bool else Vector(lanes, ufunc.__name__, operands)


class NumpyEmitter:
    """Computes at once what `nbfftconv.simd.Emitter` emits; integers are Python's, masks and magnitudes are arrays."""

    def __init__(self, real, vector_bytes, memory_bytes=2**20):
        self.real, self.itemsize, self.vector_bytes = real, np.dtype(real).itemsize, vector_bytes
        self.lanes = vector_bytes // self.itemsize
        self.counts = Counter()
        self._is_skipping = False  # a with statement's body runs anyway: it loads zeros, and changes nothing
        self._memory, self._free = np.full(memory_bytes, 0xFF, np.uint8), 64

    # For tests

    def put(self, array):
        """Copy an array to memory; return its address."""
        array = np.ascontiguousarray(array)
        address, self._free = self._free, self._free + (array.nbytes // 64 + 2) * 64
        self._view(address, np.uint8, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        return address

    def reserve(self, *shape):
        """Return the address of an array of scalars that are NaN."""
        return self.put(np.full(shape, np.nan, self.real))

    def get(self, address, *shape):
        """Return the array of scalars at an address."""
        return self._view(address, self.real, int(np.prod(shape))).reshape(shape).copy()

    def vector(self, lanes):
        """Return a vector of any number of lanes."""
        return Vector(np.array(lanes, self.real))

    def keep(self, value):
        """Count what a value depends on, as if it was stored."""
        pending = [value] if isinstance(value, Vector) else []
        while pending:
            found = pending.pop()
            if found.instruction and not self._is_skipping:
                self.counts[found.instruction] += 1
                pending += found.operands
                found.instruction = None  # counted

    def _view(self, address, dtype, count):
        size = count * np.dtype(dtype).itemsize
        if not 64 <= address <= address + size <= len(self._memory):
            raise IndexError(f"{size} bytes at {address} of {len(self._memory)}")
        return self._memory[address : address + size].view(dtype)

    def _count(self, instruction):
        if not self._is_skipping:
            self.counts[instruction] += 1

    # As of `Emitter`

    def _at(self, address, dtype=None, count=None):
        dtype, count = dtype or self.real, count or self.lanes
        return np.zeros(count, dtype) if self._is_skipping else self._view(address, dtype, count)

    def _lanes_of(self, value):
        return value.lanes if isinstance(value, Vector) else np.full(self.lanes, value, self.real)

    def constant(self, value):
        return Vector(self._lanes_of(value))

    def load(self, address):
        return Vector(self._at(address).copy(), "load")

    def store(self, value, address):
        self._count("store")
        self.keep(value)
        self._at(address)[:] = self._lanes_of(value)

    def store_aligned(self, value, address):
        assert address % self.vector_bytes == 0
        self.store(value, address)

    store_nontemporal = store_aligned

    def masked_load(self, address, mask):
        return self.gather(address, self.itemsize, mask, "masked_load")

    def gather(self, address, stride, mask, instruction="gather"):
        lanes = np.zeros(self.lanes, self.real)
        for lane in np.flatnonzero(mask):
            lanes[lane] = self._at(address + int(lane) * stride, count=1)[0]
        return Vector(lanes, instruction)

    def masked_store(self, value, address, mask):
        self._count("masked_store")
        self.keep(value)
        for lane in np.flatnonzero(mask):
            self._at(address + int(lane) * self.itemsize, count=1)[:] = self._lanes_of(value)[lane]

    def broadcast(self, address):
        return Vector(self._lanes_of(self._at(address, count=1)[0]), "broadcast")

    def load_integer(self, address):
        return int(self._at(address, np.int64, 1)[0])

    def store_integer(self, value, address):
        self._at(address, np.int64, 1)[:] = value

    def load_mask(self, address):
        return self._at(address, np.uint16, 1)[0] >> np.arange(self.lanes) & 1 == 1

    def load_magnitude(self, address):
        return self._at(address, self._integer).copy()

    def store_magnitude(self, value, address):
        self._at(address, self._integer)[:] = value

    def prefetch(self, address, write=False, level=1):
        self._count("prefetch")

    def fma(self, a, b, c):
        if not any(isinstance(value, Vector) for value in (a, b, c)):
            return a * b + c
        wide_a, wide_b, wide_c = (self._wide(value) for value in (a, b, c))
        return Vector((wide_a * wide_b + wide_c).astype(self.real), "fma", (a, b, c))

    def _wide(self, value):
        return np.asarray(value.lanes if isinstance(value, Vector) else self.real(value), np.float64)

    def minimum(self, a, b):
        return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)

    def maximum(self, a, b):
        return np.maximum(a, b) if isinstance(a, np.ndarray) else max(a, b)

    def select(self, mask, a, b):
        return Vector(np.where(mask, self._lanes_of(a), self._lanes_of(b)), "select", (a, b))

    def relu(self, value):
        return self.select(value < 0.0, 0.0, value)

    @property
    def _integer(self):
        return np.dtype(f"i{self.itemsize}")

    def magnitude(self, value):
        self.keep(value)
        return np.abs(value.lanes).view(self._integer)

    def largest_magnitude(self):
        return np.full(self.lanes, np.iinfo(self._integer).max)

    def zero_magnitude(self):
        return np.zeros(self.lanes, self._integer)

    def lanes_between(self, begin, end, first=0):
        index = first + np.arange(self.lanes)
        return (begin <= index) & (index < end)

    def all_lanes_if(self, condition):
        return np.full(self.lanes, condition != 0)

    def transpose(self, rows):
        return [Vector(lanes, "shuffle", rows) for lanes in np.array([self._lanes_of(row) for row in rows]).T]

    def reverse(self, a):
        return Vector(a.lanes[::-1], "shuffle", [a])

    def even_lanes(self, a, b):
        return Vector(np.concatenate([a.lanes, b.lanes])[::2], "shuffle", [a, b])

    def odd_lanes(self, a, b):
        return Vector(np.concatenate([a.lanes, b.lanes])[1::2], "shuffle", [a, b])

    def zip_lanes(self, a, b):
        lanes = np.stack([a.lanes, b.lanes], axis=1).reshape(2, -1)
        return [Vector(half, "shuffle", [a, b]) for half in lanes]

    def to_bfloat16(self, value):
        bits = value.lanes.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32)
        return Vector(rounded.view(np.float32), "to_bfloat16", [value])

    def high_halves(self, a, b, in_turns):
        high = np.stack([value.lanes.view(np.uint16)[1::2] for value in (a, b)], axis=int(in_turns))
        return Vector(high.reshape(-1).view(np.float32), "shuffle", [a, b])

    def begin_matrices(self, configuration):
        words = self._at(configuration, np.uint8, 64)
        assert words[0] == 1
        assert (words[16:32].view(np.uint16) == 64).all()
        assert (words[48:56] == 16).all()
        self._registers = np.zeros((8, 16, 64), np.uint8)

    def end_matrices(self):
        del self._registers

    def matrix_zero(self, register):
        self._registers[register] = 0

    def _rows(self, address, row):
        return [self._at(address + row * i, np.uint8, 64) for i in range(16)]

    def matrix_load(self, register, address, row):
        self._registers[register] = self._rows(address, row)

    def matrix_store(self, register, address, row):
        for i, place in enumerate(self._rows(address, row)):
            place[:] = self._registers[register, i]

    def matrix_fma(self, c, a, b):
        halves = [self._registers[register].view(np.uint16).astype(np.uint32) << 16 for register in (a, b)]
        of_a, of_b = (each.view(np.float32).astype(np.float64) for each in halves)
        of_b = of_b.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
        self._registers[c] = (self._registers[c].view(np.float32) + of_a @ of_b).astype(np.float32).view(np.uint8)

    def repeat(self, count, state, body):
        for _ in range(0 if self._is_skipping else count):
            state = body(*state)
        return list(state)

    @contextmanager
    def when(self, value, equals):
        before, self._is_skipping = self._is_skipping, self._is_skipping or value != equals
        yield
        self._is_skipping = before

    @contextmanager
    def unless(self, value, equals):
        before, self._is_skipping = self._is_skipping, self._is_skipping or value == equals
        yield
        self._is_skipping = before
