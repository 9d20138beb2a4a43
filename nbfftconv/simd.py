"""Vectors and raw addresses in Numba: the only module that speaks LLVM.

Kernels elsewhere are emitters, functions of an `Emitter` and of values whose operators emit instructions of the host's
full width, or they use the small intrinsics `call`, `pointer`, `claim` and their like.
"""

import ctypes
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nbfftconv.numba_internals import cgutils
from nbfftconv.target import TARGET

llvmlite.binding.initialize_native_asmparser()  # for instructions without an intrinsic of their own

VECTOR_BYTES = TARGET.vector_bytes
_TRIPLE = llvmlite.binding.get_default_triple()
_WORD = ir.IntType(64)
#: Instructions between two of the matrix unit.
_GAP = 8


def lanes(real: type) -> int:
    """Number of scalars of type `real` in a vector."""
    return VECTOR_BYTES // np.dtype(real).itemsize


class Value:
    """A value in a register: its operators emit instructions; the other operand may be a Python number."""

    def __init__(self, builder: ir.IRBuilder, llvm: ir.Value) -> None:
        self._builder = builder
        self.llvm = llvm

    def _operand(self, other: "Operand") -> ir.Value:
        if isinstance(other, Value):
            if type(other) is not type(self):
                raise TypeError(f"operands are a {type(self).__name__} and a {type(other).__name__}")
            return other.llvm
        kind = self.llvm.type
        return ir.Constant(kind, [other] * kind.count if isinstance(kind, ir.VectorType) else other)

    def _emit(self, instruction: Callable[..., ir.Value], *operands: "Operand") -> Any:
        return type(self)(self._builder, instruction(*map(self._operand, operands)))

    def _compare(self, relation: str, other: "Operand") -> "Mask":
        compare = self._builder.fcmp_ordered if isinstance(self, Vector) else self._builder.icmp_signed
        return Mask(self._builder, compare(relation, self.llvm, self._operand(other)))

    def __lt__(self, other: "Operand") -> "Mask":
        return self._compare("<", other)

    def __gt__(self, other: "Operand") -> "Mask":
        return self._compare(">", other)


class Integer(Value):
    """An int64: an address in bytes, a distance or a count."""

    def __add__(self, other: "Operand") -> "Integer":
        return self._emit(self._builder.add, self, other)

    def __radd__(self, other: int) -> "Integer":
        return self._emit(self._builder.add, other, self)

    def __sub__(self, other: "Operand") -> "Integer":
        return self._emit(self._builder.sub, self, other)

    def __rsub__(self, other: int) -> "Integer":
        return self._emit(self._builder.sub, other, self)

    def __mul__(self, other: "Operand") -> "Integer":
        return self._emit(self._builder.mul, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: "Operand") -> "Integer":
        """The quotient of numbers that are not negative."""
        return self._emit(self._builder.udiv, self, other)

    def __and__(self, other: "Operand") -> "Integer":
        return self._emit(self._builder.and_, self, other)


class Vector(Value):
    """Floating-point lanes."""

    def __add__(self, other: "Operand") -> "Vector":
        return self._emit(self._builder.fadd, self, other)

    def __radd__(self, other: float) -> "Vector":
        return self._emit(self._builder.fadd, other, self)

    def __sub__(self, other: "Operand") -> "Vector":
        return self._emit(self._builder.fsub, self, other)

    def __rsub__(self, other: float) -> "Vector":
        return self._emit(self._builder.fsub, other, self)

    def __mul__(self, other: "Operand") -> "Vector":
        return self._emit(self._builder.fmul, self, other)

    __rmul__ = __mul__

    def __neg__(self) -> "Vector":
        return self._emit(self._builder.fneg, self)


class Magnitude(Value):
    """Absolute values of a vector, as integers of its lanes' bits: they are in the order of the values, NaN last."""


class Mask(Value):
    """One bit for each lane."""


#: A `Value`, or a Python number.
Operand = Any


class Emitter:
    """Emits instructions at the current place of a function; vectors hold `lanes` scalars of type `real`.

    Emitted values are `Value` objects, and Python numbers where they are known; ``a * b + c`` has two roundings. Of
    this interface there is a second implementation, tests/numpy_emitter.py, which computes at once.
    """

    def __init__(self, builder: ir.IRBuilder, real: type) -> None:
        self._builder = builder
        self.real = real
        self.itemsize = np.dtype(real).itemsize
        self.vector_bytes = VECTOR_BYTES
        self.lanes = lanes(real)
        bits = 8 * self.itemsize
        self._suffix = f"v{self.lanes}f{bits}"
        self._vector = ir.VectorType(ir.FloatType() if self.itemsize == 4 else ir.DoubleType(), self.lanes)
        self._magnitude = ir.VectorType(ir.IntType(bits), self.lanes)
        self._indices = ir.VectorType(_WORD, self.lanes)

    def _integer(self, value: Operand) -> ir.Value:
        return value.llvm if isinstance(value, Integer) else ir.Constant(_WORD, value)

    def constant(self, value: float) -> Vector:
        """Vector with one value in all lanes."""
        return Vector(self._builder, ir.Constant(self._vector, [value] * self.lanes))

    def _vector_of(self, value: Operand) -> ir.Value:
        return (value if isinstance(value, Vector) else self.constant(value)).llvm

    # Memory: addresses are integers

    def _pointer(self, address: Operand, to: ir.Type) -> ir.Value:
        return self._builder.inttoptr(self._integer(address), to.as_pointer())

    def load(self, address: Operand) -> Vector:
        """Vector at an address, aligned as a scalar."""
        return Vector(self._builder, self._builder.load(self._pointer(address, self._vector), align=self.itemsize))

    def store(self, value: Operand, address: Operand) -> None:
        """Write a vector to an address, aligned as a scalar."""
        self._builder.store(self._vector_of(value), self._pointer(address, self._vector), align=self.itemsize)

    def store_aligned(self, value: Operand, address: Operand) -> None:
        """Write a vector to a multiple of its size."""
        self._builder.store(self._vector_of(value), self._pointer(address, self._vector), align=self.vector_bytes)

    def store_nontemporal(self, value: Operand, address: Operand) -> None:
        """Write a vector to a multiple of its size, past the caches; `fence` before other threads read it."""
        pointer = self._pointer(address, self._vector)
        store = self._builder.store(self._vector_of(value), pointer, align=self.vector_bytes)
        store.set_metadata("nontemporal", self._builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    def masked_load(self, address: Operand, mask: Mask) -> Vector:
        """Vector at an address, zero in the lanes outside the mask, whose memory is not touched."""
        pointer = self._pointer(address, self._vector)
        arguments = [pointer, ir.Constant(ir.IntType(32), self.itemsize), mask.llvm, self._vector_of(0.0)]
        return Vector(self._builder, self._call(f"llvm.masked.load.{self._suffix}.p0", self._vector, arguments))

    def masked_store(self, value: Operand, address: Operand, mask: Mask) -> None:
        """Write the lanes of a mask."""
        pointer = self._pointer(address, self._vector)
        arguments = [self._vector_of(value), pointer, ir.Constant(ir.IntType(32), self.itemsize), mask.llvm]
        self._call(f"llvm.masked.store.{self._suffix}.p0", ir.VoidType(), arguments)

    def gather(self, address: Operand, stride: Operand, mask: Mask) -> Vector:
        """Scalars `stride` bytes apart, from an address on; zero in the lanes outside the mask, as in `masked_load`."""
        indices = ir.Constant(self._indices, list(range(self.lanes)))
        distances = self._builder.mul(self._splat(stride), indices)
        addresses = self._builder.add(self._splat(address), distances)
        pointers = self._builder.inttoptr(addresses, ir.VectorType(self._vector.element.as_pointer(), self.lanes))
        arguments = [pointers, ir.Constant(ir.IntType(32), self.itemsize), mask.llvm, self._vector_of(0.0)]
        name = f"llvm.masked.gather.{self._suffix}.v{self.lanes}p0"
        return Vector(self._builder, self._call(name, self._vector, arguments))

    def broadcast(self, address: Operand) -> Vector:
        """The scalar at an address, in all lanes."""
        scalar = self._builder.load(self._pointer(address, self._vector.element))
        return Vector(self._builder, self._in_all_lanes(scalar, self._vector))

    def load_integer(self, address: Operand) -> Integer:
        """The int64 at an address."""
        return Integer(self._builder, self._builder.load(self._pointer(address, _WORD)))

    def store_integer(self, value: Operand, address: Operand) -> None:
        """Write an int64 to an address."""
        self._builder.store(self._integer(value), self._pointer(address, _WORD))

    def load_mask(self, address: Operand) -> Mask:
        """Mask of the lanes whose bits are set in the 16 bits at an address."""
        bits = self._builder.load(self._pointer(address, ir.IntType(16)))
        if self.vector_bytes < 64:  # no masks of bits: LLVM would take them apart, one after the other
            of_lanes = ir.Constant(self._magnitude, [1 << lane for lane in range(self.lanes)])
            bits = self._in_all_lanes(self._builder.zext(bits, self._magnitude.element), self._magnitude)
            found = self._builder.and_(bits, of_lanes)
            return Mask(self._builder, self._builder.icmp_unsigned("==", found, of_lanes))
        if self.lanes < 16:
            bits = self._builder.trunc(bits, ir.IntType(self.lanes))
        return Mask(self._builder, self._builder.bitcast(bits, ir.VectorType(ir.IntType(1), self.lanes)))

    def load_magnitude(self, address: Operand) -> Magnitude:
        """Magnitudes at an address, aligned as a scalar."""
        pointer = self._pointer(address, self._magnitude)
        return Magnitude(self._builder, self._builder.load(pointer, align=self.itemsize))

    def store_magnitude(self, value: Magnitude, address: Operand) -> None:
        """Write magnitudes to an address, aligned as a scalar."""
        self._builder.store(value.llvm, self._pointer(address, self._magnitude), align=self.itemsize)

    def prefetch(self, address: Operand, write: bool = False, level: int = 1) -> None:
        """Hint to a level of cache that the line at an address, which may be invalid, will be read, or written."""
        number = ir.IntType(32)
        access, locality, data = (ir.Constant(number, value) for value in (int(write), 4 - level, 1))
        pointer = self._pointer(address, ir.IntType(8))
        self._call("llvm.prefetch.p0", ir.VoidType(), [pointer, access, locality, data])

    def _call(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
        function_type = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self._builder.module, function_type, name)
        return self._builder.call(function, arguments)

    # Arithmetic beyond operators

    def fma(self, a: Operand, b: Operand, c: Operand) -> Operand:
        """a·b + c with one rounding; a number if all are."""
        if not any(isinstance(value, Value) for value in (a, b, c)):
            return a * b + c
        arguments = [self._vector_of(value) for value in (a, b, c)]
        return Vector(self._builder, self._call(f"llvm.fma.{self._suffix}", self._vector, arguments))

    def minimum(self, a: Operand, b: Operand) -> Value:
        """The smaller integer, or the smaller magnitudes."""
        return self._choose(a < b, a, b)

    def maximum(self, a: Operand, b: Operand) -> Value:
        """The larger integer, or the larger magnitudes."""
        return self._choose(a > b, a, b)

    def _choose(self, condition: Mask, a: Operand, b: Operand) -> Value:
        value = a if isinstance(a, Value) else b
        return value._emit(functools.partial(self._builder.select, condition.llvm), a, b)

    def select(self, mask: Mask, a: Operand, b: Operand) -> Vector:
        """The lanes of `a` within a mask, those of `b` outside it."""
        return Vector(self._builder, self._builder.select(mask.llvm, self._vector_of(a), self._vector_of(b)))

    def relu(self, value: Vector) -> Vector:
        """Zero where a lane is negative; a NaN stays."""
        return self.select(value < 0.0, 0.0, value)

    def magnitude(self, value: Vector) -> Magnitude:
        """The magnitudes of lanes."""
        bits = self._builder.bitcast(value.llvm, self._magnitude)
        return Magnitude(self._builder, self._builder.and_(bits, self.largest_magnitude().llvm))

    def largest_magnitude(self) -> Magnitude:
        """Magnitudes that are at least as large as all others."""
        return self._magnitude_constant((1 << (8 * self.itemsize - 1)) - 1)

    def zero_magnitude(self) -> Magnitude:
        """Magnitudes of zero."""
        return self._magnitude_constant(0)

    def _magnitude_constant(self, bits: int) -> Magnitude:
        return Magnitude(self._builder, ir.Constant(self._magnitude, [bits] * self.lanes))

    # Masks

    def lanes_between(self, begin: Operand, end: Operand, first: Operand = 0) -> Mask:
        """Mask of the lanes whose index, counted from `first`, is in begin .. end - 1."""
        index = self._builder.add(self._splat(first), ir.Constant(self._indices, list(range(self.lanes))))
        from_begin = self._builder.icmp_signed(">=", index, self._splat(begin))
        before_end = self._builder.icmp_signed("<", index, self._splat(end))
        return Mask(self._builder, self._builder.and_(from_begin, before_end))

    def all_lanes_if(self, condition: Operand) -> Mask:
        """Mask of all lanes where an integer is not 0, of none where it is."""
        zeros = ir.Constant(self._indices, None)
        return Mask(self._builder, self._builder.icmp_signed("!=", self._splat(condition), zeros))

    # Lanes

    def _splat(self, value: Operand) -> ir.Value:
        return self._in_all_lanes(self._integer(value), self._indices)

    def _in_all_lanes(self, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
        first = self._builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_WORD, 0))
        return self._shuffle(first, first, [0] * self.lanes)

    def _shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return self._builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))

    def transpose(self, rows: Sequence[Operand]) -> list[Vector]:
        """Transpose a square of as many vectors as a vector has lanes."""
        values = [self._vector_of(row) for row in rows]
        lanes = len(values)
        distance = lanes // 2
        while distance:
            low = [lane + lanes - distance if lane & distance else lane for lane in range(lanes)]
            high = [lane + lanes if lane & distance else lane + distance for lane in range(lanes)]
            for i in range(lanes):
                if not i & distance:
                    a, b = values[i], values[i + distance]
                    values[i], values[i + distance] = self._shuffle(a, b, low), self._shuffle(a, b, high)
            distance //= 2
        return [Vector(self._builder, value) for value in values]

    def reverse(self, a: Vector) -> Vector:
        """Vector with its lanes in reverse order."""
        return Vector(self._builder, self._shuffle(a.llvm, a.llvm, list(range(self.lanes))[::-1]))

    def even_lanes(self, a: Vector, b: Vector) -> Vector:
        """Every other lane, from the first on, of two vectors."""
        return Vector(self._builder, self._shuffle(a.llvm, b.llvm, list(range(0, 2 * self.lanes, 2))))

    def odd_lanes(self, a: Vector, b: Vector) -> Vector:
        """Every other lane, from the second on, of two vectors."""
        return Vector(self._builder, self._shuffle(a.llvm, b.llvm, list(range(1, 2 * self.lanes, 2))))

    def zip_lanes(self, a: Vector, b: Vector) -> list[Vector]:
        """The lanes of two vectors in turns, as two vectors."""
        order = [lane + other for lane in range(self.lanes) for other in (0, self.lanes)]
        halves = order[: self.lanes], order[self.lanes :]
        return [Vector(self._builder, self._shuffle(a.llvm, b.llvm, half)) for half in halves]

    # Parts of float32 numbers, as bfloat16

    def to_bfloat16(self, value: Vector) -> Vector:
        """The nearest numbers of 8 significant bits, from the middle away from zero; what is not finite stays so."""
        bits = self._builder.bitcast(value.llvm, self._magnitude)
        half, kept = (ir.Constant(self._magnitude, [number] * self.lanes) for number in (0x8000, 0xFFFF0000))
        rounded = self._builder.and_(self._builder.add(bits, half), kept)
        return Vector(self._builder, self._builder.bitcast(rounded, self._vector))

    def high_halves(self, a: Vector, b: Vector, in_turns: bool) -> Vector:
        """The upper halves of all lanes of two vectors, as bits: a lane of each in turns, or those of `a` first."""
        if in_turns:  # without a shuffle
            low, high = (self._builder.bitcast(value.llvm, self._magnitude) for value in (a, b))
            shift, kept = (ir.Constant(self._magnitude, [number] * self.lanes) for number in (16, 0xFFFF0000))
            word = self._builder.or_(self._builder.lshr(low, shift), self._builder.and_(high, kept))
            return Vector(self._builder, self._builder.bitcast(word, self._vector))
        halves = ir.VectorType(ir.IntType(16), 2 * self.lanes)
        low, high = (self._builder.bitcast(value.llvm, halves) for value in (a, b))
        shuffled = self._shuffle(low, high, list(range(1, 4 * self.lanes, 2)))
        return Vector(self._builder, self._builder.bitcast(shuffled, self._vector))

    # The matrix unit (AMX): eight registers, of 16 rows of 64 bytes

    def _matrix_unit(self, instruction: str, *operands: ir.Value) -> None:
        self._call(f"llvm.x86.{instruction}", ir.VoidType(), list(operands))

    def _part_from_next(self) -> None:
        """Part an instruction of the unit from the next one.

        If the core's other hyperthread is at work, one that follows another directly takes 40 cycles, else 20.
        """
        nothing = ir.FunctionType(ir.VoidType(), [])
        self._builder.call(ir.InlineAsm(nothing, "\n".join(["nop"] * _GAP), "", side_effect=True), [])

    def _matrix_register(self, number: int) -> ir.Value:
        return ir.Constant(ir.IntType(8), number)

    def begin_matrices(self, configuration: Operand) -> None:
        """Give the registers the shapes that the 64 bytes at an address say, and zeros."""
        self._matrix_unit("ldtilecfg", self._pointer(configuration, ir.IntType(8)))

    def end_matrices(self) -> None:
        """Leave the registers to others."""
        self._matrix_unit("tilerelease")

    def matrix_zero(self, register: int) -> None:
        """Set a register to zero."""
        self._matrix_unit("tilezero", self._matrix_register(register))

    def matrix_load(self, register: int, address: Operand, row: Operand) -> None:
        """Read rows, `row` bytes apart."""
        pointer = self._pointer(address, ir.IntType(8))
        self._matrix_unit("tileloadd64", self._matrix_register(register), pointer, self._integer(row))
        self._part_from_next()

    def matrix_store(self, register: int, address: Operand, row: Operand) -> None:
        """Write rows, `row` bytes apart."""
        pointer = self._pointer(address, ir.IntType(8))
        self._matrix_unit("tilestored64", self._matrix_register(register), pointer, self._integer(row))

    def matrix_fma(self, c: int, a: int, b: int) -> None:
        """Add the product of two registers of bfloat16 to one of float32: C[i, j] += sum over r of A[i, r] · B[r, j].

        A row of A has 32 entries; one of B has two of each column, next to each other.
        """
        self._matrix_unit("tdpbf16ps", *map(self._matrix_register, (c, a, b)))
        self._part_from_next()

    # Control flow

    def repeat(self, count: Operand, state: Sequence[Operand], body: Callable[..., Sequence[Operand]]) -> list[Value]:
        """Emit ``for _ in range(count): state = body(*state)`` with the state in registers; return the last state.

        In the first state an int is an integer, a float a vector.
        """
        builder = self._builder
        state = [self._value(value) for value in state]
        count = self._integer(count)
        before = builder.block
        loop = builder.append_basic_block("repeat")
        after = builder.append_basic_block("repeated")
        builder.cbranch(builder.icmp_signed(">", count, ir.Constant(_WORD, 0)), loop, after)
        builder.position_at_end(loop)
        index = builder.phi(_WORD)
        index.add_incoming(ir.Constant(_WORD, 0), before)
        inside = [builder.phi(value.llvm.type) for value in state]
        for phi, value in zip(inside, state, strict=True):
            phi.add_incoming(value.llvm, before)
        new = body(*(type(value)(builder, phi) for value, phi in zip(state, inside, strict=True)))
        new = [value._operand(following) for value, following in zip(state, new, strict=True)]
        following = builder.add(index, ir.Constant(_WORD, 1))
        end = builder.block
        index.add_incoming(following, end)
        for phi, value in zip(inside, new, strict=True):
            phi.add_incoming(value, end)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        outside = [builder.phi(value.llvm.type) for value in state]
        for phi, value, last in zip(outside, state, new, strict=True):
            phi.add_incoming(value.llvm, before)
            phi.add_incoming(last, end)
        return [type(value)(builder, phi) for value, phi in zip(state, outside, strict=True)]

    def _value(self, value: Operand) -> Value:
        if isinstance(value, Value):
            return value
        return Integer(self._builder, self._integer(value)) if isinstance(value, int) else self.constant(value)

    @contextmanager
    def when(self, value: Operand, equals: int) -> Iterator[None]:
        """Emit the body of the with statement under ``if value == equals``."""
        with self._builder.if_then(self._builder.icmp_signed("==", self._integer(value), ir.Constant(_WORD, equals))):
            yield

    @contextmanager
    def unless(self, value: Operand, equals: int) -> Iterator[None]:
        """Emit the body of the with statement under ``if value != equals``."""
        with self._builder.if_then(self._builder.icmp_signed("!=", self._integer(value), ir.Constant(_WORD, equals))):
            yield


def store_masked(v: Any, written: Sequence[tuple[Any, Any, Any]], count: Operand, of_whole: int) -> None:
    """Write values to addresses under masks, all of which are full where `count` is `of_whole`.

    They are whole stores then: AVX2's masked ones take AMD's processors a dozen cycles each, also with a full mask.
    """
    with v.when(count, of_whole):
        for value, place, _ in written:
            v.store(value, place)
    with v.unless(count, of_whole):
        for value, place, mask in written:
            v.masked_store(value, place, mask)


def kernel(emit: Callable[..., None], name: str, arity: int | None = None) -> Any:
    """Make an intrinsic ``name(real, arguments)``, with a tuple of int64, of ``emit(emitter, *arguments)``.

    `arity` is to be told of an emitter of ``*arguments``.
    """
    if arity is None:
        arity = emit.__code__.co_argcount - 1

    def typed(typingctx: Any, real: Any, arguments: Any) -> Any:
        if not isinstance(real, types.NumberClass) or arguments != types.Tuple([types.int64] * arity):
            return None
        scalar = np.float32 if real.dtype == types.float32 else np.float64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            integers = (Integer(builder, value) for value in cgutils.unpack_tuple(builder, args[1], arity))
            emit(Emitter(builder, scalar), *integers)
            return context.get_dummy_value()

        return types.void(real, arguments), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at `address`, of type ``void (intp, ...)``, with a tuple of integers."""
    if not (isinstance(address, types.Integer) and isinstance(arguments, types.BaseTuple)):
        return None
    if not all(isinstance(kind, types.Integer) for kind in arguments):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            context.cast(builder, value, kind, types.intp)
            for value, kind in zip(cgutils.unpack_tuple(builder, args[1]), arguments, strict=True)
        ]
        function_type = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), codegen


@intrinsic
def claim(typingctx: Any, address: Any, expected: Any, new: Any) -> Any:
    """Replace the int64 at an address, atomically, if it is what is expected; return what it was."""
    if not all(isinstance(kind, types.Integer) for kind in (address, expected, new)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        counter = builder.inttoptr(args[0], word.as_pointer())
        return builder.extract_value(builder.cmpxchg(counter, args[1], args[2], "monotonic", "monotonic"), 0)

    return types.int64(types.intp, types.int64, types.int64), codegen


@intrinsic
def announce(typingctx: Any, address: Any, count: Any) -> Any:
    """Add to the int64 at an address, atomically, once others see what was written before."""
    if not (isinstance(address, types.Integer) and isinstance(count, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", counter, args[1], "release")
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def finished(typingctx: Any, address: Any) -> Any:
    """The int64 at an address that other threads change; what they wrote before is seen from now on."""
    if not isinstance(address, types.Integer):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(counter, "acquire", 8)

    return types.int64(types.intp), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Let the other thread of this core have its units for a moment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _TRIPLE.startswith(("x86_64", "i686")):
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


_yield_symbol = "nbfftconv_yield_cpu"
_yield = ctypes.windll.kernel32.SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield  # type: ignore[attr-defined]
llvmlite.binding.add_symbol(_yield_symbol, ctypes.cast(_yield, ctypes.c_void_p).value)


@intrinsic
def yield_cpu(typingctx: Any) -> Any:
    """Let another thread have this thread's CPU, if one waits for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, _yield_symbol), [])
        return context.get_dummy_value()

    return types.void(), codegen


_clock_symbol = "nbfftconv_clock"
if os.name == "nt":
    _clock = ctypes.windll.kernel32.QueryPerformanceCounter  # type: ignore[attr-defined]
    _ticks = ctypes.c_int64()
    ctypes.windll.kernel32.QueryPerformanceFrequency(ctypes.byref(_ticks))  # type: ignore[attr-defined]
    _TICKS = _ticks.value  # a second
else:
    _clock = ctypes.CDLL(None).clock_gettime
llvmlite.binding.add_symbol(_clock_symbol, ctypes.cast(_clock, ctypes.c_void_p).value)


@intrinsic
def nanoseconds(typingctx: Any) -> Any:
    """Time of a clock that only ever runs forward."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, word = ir.IntType(32), ir.IntType(64)
        pair = cgutils.alloca_once(builder, ir.ArrayType(word, 2))
        first, second = (builder.gep(pair, [ir.Constant(number, 0), ir.Constant(number, i)]) for i in range(2))
        arguments = [first] if os.name == "nt" else [ir.Constant(number, time.CLOCK_MONOTONIC), first]
        function_type = ir.FunctionType(number, [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, _clock_symbol), arguments)
        if os.name == "nt":
            ticks, rate = builder.load(first), ir.Constant(word, _TICKS)
            seconds, rest = builder.udiv(ticks, rate), builder.urem(ticks, rate)
            rest = builder.udiv(builder.mul(rest, ir.Constant(word, 10**9)), rate)
        else:
            seconds, rest = builder.load(first), builder.load(second)
        return builder.add(builder.mul(seconds, ir.Constant(word, 10**9)), rest)

    return types.int64(), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Let what this thread has written, also past the caches, be seen by all before what it writes next."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pointer(typingctx: Any, scalar: Any, address: Any) -> Any:
    """The address as a pointer to `scalar`, a NumPy scalar type: ``p[i]`` reads and writes, unchecked."""
    if not (isinstance(scalar, types.NumberClass) and isinstance(address, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(scalar.dtype)(scalar, types.intp), codegen
