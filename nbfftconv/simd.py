"""Vectors and raw addresses in Numba: the only module that speaks LLVM.

Kernels elsewhere are written against `Emitter`, which turns arithmetic on Python objects into vector instructions
of the host's full width, or against the small intrinsics `call`, `pointer`, `claim` and their like.
"""

import ctypes
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

from nbfftconv.numba_internals import cgutils, config

_AVX512_CPUS = (
    "skylake-avx512",
    "cascadelake",
    "cooperlake",
    "cannonlake",
    "icelake",
    "tigerlake",
    "rocketlake",
    "sapphirerapids",
    "emeraldrapids",
    "graniterapids",
    "diamondrapids",
    "knl",
    "knm",
    "x86-64-v4",
    "znver4",
    "znver5",
)


def _vector_bytes() -> int:
    """Bytes of a vector register; ``NUMBA_CPU_NAME`` may hold Numba to less than the host has."""
    features = llvmlite.binding.get_host_cpu_features()
    name = config.CPU_NAME
    if name == "generic":
        return 16
    if features.get("avx512f") and (name is None or name.startswith(_AVX512_CPUS)):
        return 64
    return 32 if features.get("avx2") else 16


VECTOR_BYTES = _vector_bytes()
_TRIPLE = llvmlite.binding.get_default_triple()
#: Vector registers: 32 with AVX-512 and on AArch64, else 16.
REGISTERS = 32 if VECTOR_BYTES == 64 or _TRIPLE.startswith(("aarch64", "arm64")) else 16


def lanes(real: type) -> int:
    """Number of scalars of type `real` in a vector."""
    return VECTOR_BYTES // np.dtype(real).itemsize


class Emitter:
    """Emits vector instructions at the current place of a function; its values are LLVM values.

    Addresses are integers in bytes, vectors hold `lanes(real)` scalars.
    """

    def __init__(self, builder: ir.IRBuilder, real: type) -> None:
        self._builder = builder
        self.itemsize = np.dtype(real).itemsize
        scalar = ir.FloatType() if self.itemsize == 4 else ir.DoubleType()
        self.lanes = lanes(real)
        self._vector = ir.VectorType(scalar, self.lanes)
        self._bits = ir.VectorType(ir.IntType(8 * self.itemsize), self.lanes)
        self._word = ir.IntType(64)
        suffix = f"v{lanes(real)}f{8 * self.itemsize}"
        function_type = ir.FunctionType(self._vector, [self._vector] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fma.{suffix}")

    def integer(self, value: int) -> ir.Value:
        """Integer constant."""
        return ir.Constant(self._word, value)

    def zero(self) -> ir.Value:
        """Vector of zeros."""
        return ir.Constant(self._vector, None)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Integer sum: address arithmetic."""
        return self._builder.add(a, b)

    def scale(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Integer product: address arithmetic."""
        return self._builder.mul(a, b)

    def subtract(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Integer difference."""
        return self._builder.sub(a, b)

    def odd(self, a: ir.Value) -> ir.Value:
        """Return 1 if an address or integer is odd, else 0."""
        return self._builder.and_(a, self.integer(1))

    def divide(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Integer quotient of positive numbers."""
        return self._builder.udiv(a, b)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller integer."""
        return self._builder.select(self._builder.icmp_signed("<", a, b), a, b)

    def load(self, address: ir.Value) -> ir.Value:
        """Vector at an address, aligned as a scalar."""
        return self._builder.load(self._at(address), align=self.itemsize)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Write a vector to an address, aligned as a scalar."""
        self._builder.store(value, self._at(address), align=self.itemsize)

    def store_line(self, value: ir.Value, address: ir.Value) -> None:
        """Write a vector to a multiple of its size."""
        self._builder.store(value, self._at(address), align=VECTOR_BYTES)

    def stream_line(self, value: ir.Value, address: ir.Value) -> None:
        """Write a vector to a multiple of its size, past the caches; `fence` before other threads read it."""
        store = self._builder.store(value, self._at(address), align=VECTOR_BYTES)
        store.set_metadata("nontemporal", self._builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    def _at(self, address: ir.Value) -> ir.Value:
        return self._builder.inttoptr(address, self._vector.as_pointer())

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a·b + c with one rounding."""
        return self._builder.call(self._fma, [a, b, c])

    def integer_at(self, address: ir.Value) -> ir.Value:
        """The int64 at an address."""
        return self._builder.load(self._builder.inttoptr(address, self._word.as_pointer()))

    def broadcast(self, address: ir.Value) -> ir.Value:
        """The scalar at an address, in all lanes."""
        scalar = self._builder.load(self._builder.inttoptr(address, self._vector.element.as_pointer()))
        first = self._builder.insert_element(ir.Constant(self._vector, ir.Undefined), scalar, self.integer(0))
        return self._shuffle(first, first, [0] * self.lanes)

    def all_or_none(self, condition: ir.Value) -> ir.Value:
        """Mask of all lanes where an integer is not 0, of none where it is."""
        return self._builder.icmp_signed(
            "!=", self._splat(condition), ir.Constant(ir.VectorType(self._word, self.lanes), None)
        )

    def between(self, first: ir.Value, begin: ir.Value, end: ir.Value) -> ir.Value:
        """Mask of the lanes whose index, counted from `first`, is in begin .. end - 1."""
        indices = ir.VectorType(self._word, self.lanes)
        lane = self._builder.add(self._splat(first), ir.Constant(indices, list(range(self.lanes))))
        from_begin = self._builder.icmp_signed(">=", lane, self._splat(begin))
        return self._builder.and_(from_begin, self._builder.icmp_signed("<", lane, self._splat(end)))

    def _splat(self, value: ir.Value) -> ir.Value:
        vector = ir.VectorType(self._word, self.lanes)
        first = self._builder.insert_element(ir.Constant(vector, ir.Undefined), value, self.integer(0))
        return self._shuffle(first, first, [0] * self.lanes)

    def mask_at(self, address: ir.Value) -> ir.Value:
        """Mask of the lanes whose bits are set in the 16 bits at an address."""
        bits = self._builder.load(self._builder.inttoptr(address, ir.IntType(16).as_pointer()))
        if self.lanes < 16:
            bits = self._builder.trunc(bits, ir.IntType(self.lanes))
        return self._builder.bitcast(bits, ir.VectorType(ir.IntType(1), self.lanes))

    def load_some(self, address: ir.Value, mask: ir.Value) -> ir.Value:
        """Vector at an address, zero in the lanes outside the mask, whose memory is not touched."""
        arguments = [self._at(address), ir.Constant(ir.IntType(32), self.itemsize), mask, self.zero()]
        return self._builder.call(self._masked("load", self._vector, arguments), arguments)

    def load_apart(self, address: ir.Value, step: ir.Value, mask: ir.Value) -> ir.Value:
        """Scalars `step` bytes apart, from an address on; zero in the lanes outside the mask, as in `load_some`."""
        indices = ir.Constant(ir.VectorType(self._word, self.lanes), list(range(self.lanes)))
        addresses = self._builder.add(self._splat(address), self._builder.mul(self._splat(step), indices))
        pointers = self._builder.inttoptr(addresses, ir.VectorType(self._vector.element.as_pointer(), self.lanes))
        arguments = [pointers, ir.Constant(ir.IntType(32), self.itemsize), mask, self.zero()]
        function_type = ir.FunctionType(self._vector, [argument.type for argument in arguments])
        name = f"llvm.masked.gather.v{self.lanes}f{8 * self.itemsize}.v{self.lanes}p0"
        function = cgutils.get_or_insert_function(self._builder.module, function_type, name)
        return self._builder.call(function, arguments)

    def store_some(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        """Write the lanes of a mask."""
        arguments = [value, self._at(address), ir.Constant(ir.IntType(32), self.itemsize), mask]
        self._builder.call(self._masked("store", ir.VoidType(), arguments), arguments)

    def _masked(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Function:
        function_type = ir.FunctionType(result, [argument.type for argument in arguments])
        suffix = f"v{self.lanes}f{8 * self.itemsize}.p0"
        return cgutils.get_or_insert_function(self._builder.module, function_type, f"llvm.masked.{name}.{suffix}")

    def magnitude_bits(self, value: ir.Value) -> ir.Value:
        """The bits of absolute values, as integers, which are in the order of the values; NaN is last."""
        bits = self._builder.bitcast(value, self._bits)
        mask = ir.Constant(self._bits, [(1 << (8 * self.itemsize - 1)) - 1] * self.lanes)
        return self._builder.and_(bits, mask)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger integers of two vectors of magnitudes."""
        return self._builder.select(self._builder.icmp_signed(">", a, b), a, b)

    def limited(self, value: ir.Value, limit: int) -> ir.Value:
        """Vector with zero in the lanes whose magnitude, as bits, is over a limit."""
        over = self._builder.icmp_signed(">", self.magnitude_bits(value), ir.Constant(self._bits, [limit] * self.lanes))
        return self._builder.select(over, self.zero(), value)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller integers of two vectors of magnitudes."""
        return self._builder.select(self._builder.icmp_signed("<", a, b), a, b)

    def most_bits(self) -> ir.Value:
        """Vector of magnitudes that are larger than all others."""
        return ir.Constant(self._bits, [(1 << (8 * self.itemsize - 1)) - 1] * self.lanes)

    def no_bits(self) -> ir.Value:
        """Vector of magnitudes of zero."""
        return ir.Constant(self._bits, None)

    def load_bits(self, address: ir.Value) -> ir.Value:
        """Vector of integers at an address, aligned as a scalar."""
        return self._builder.load(self._builder.inttoptr(address, self._bits.as_pointer()), align=self.itemsize)

    def store_bits(self, value: ir.Value, address: ir.Value) -> None:
        """Write a vector of integers to an address, aligned as a scalar."""
        self._builder.store(value, self._builder.inttoptr(address, self._bits.as_pointer()), align=self.itemsize)

    def prefetch(self, address: ir.Value, write: bool = False, level: int = 1) -> None:
        """Hint to a level of cache that the line at an address, which may be invalid, will be read, or written."""
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(self._builder.module, function_type, "llvm.prefetch.p0")
        access, locality, data = (ir.Constant(number, value) for value in (int(write), 4 - level, 1))
        self._builder.call(function, [self._builder.inttoptr(address, byte), access, locality, data])

    def clip(self, value: ir.Value) -> ir.Value:
        """Zero where a lane is negative; a NaN stays."""
        negative = self._builder.fcmp_ordered("<", value, self.zero())
        return self._builder.select(negative, self.zero(), value)

    def constant(self, value: float) -> ir.Value:
        """Vector with one value in all lanes."""
        return ir.Constant(self._vector, [value] * self._vector.count)

    def plus(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Sum of vectors."""
        return self._builder.fadd(a, b)

    def minus(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Difference of vectors."""
        return self._builder.fsub(a, b)

    def times(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Product of vectors."""
        return self._builder.fmul(a, b)

    def transpose(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Transpose a square of as many vectors as a vector has lanes."""
        rows = list(rows)
        lanes = len(rows)
        distance = lanes // 2
        while distance:
            for i in range(lanes):
                if not i & distance:
                    a, b = rows[i], rows[i + distance]
                    low = [lane + lanes - distance if lane & distance else lane for lane in range(lanes)]
                    high = [lane + lanes if lane & distance else lane + distance for lane in range(lanes)]
                    rows[i] = self._shuffle(a, b, low)
                    rows[i + distance] = self._shuffle(a, b, high)
            distance //= 2
        return rows

    def reverse(self, a: ir.Value) -> ir.Value:
        """Vector with its lanes in reverse order."""
        return self._shuffle(a, a, list(range(self.lanes))[::-1])

    def even(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Every other lane, from the first on, of two vectors."""
        return self._shuffle(a, b, list(range(0, 2 * self.lanes, 2)))

    def _shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self._builder.shuffle_vector(a, b, mask)

    def negate(self, a: ir.Value) -> ir.Value:
        """Vector with its signs changed."""
        return self._builder.fneg(a)

    def repeat(
        self, count: ir.Value, state: Sequence[ir.Value], body: Callable[..., Sequence[ir.Value]]
    ) -> list[ir.Value]:
        """Emit ``for _ in range(count): state = body(*state)`` with the state in registers; return the last state."""
        builder = self._builder
        before = builder.block
        loop = builder.append_basic_block("repeat")
        after = builder.append_basic_block("repeated")
        builder.cbranch(builder.icmp_signed(">", count, self.integer(0)), loop, after)
        builder.position_at_end(loop)
        index = builder.phi(self._word)
        index.add_incoming(self.integer(0), before)
        inside = [builder.phi(value.type) for value in state]
        for phi, value in zip(inside, state, strict=True):
            phi.add_incoming(value, before)
        new = body(*inside)
        following = builder.add(index, self.integer(1))
        index.add_incoming(following, builder.block)
        for phi, value in zip(inside, new, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        end = builder.block
        builder.position_at_end(after)
        outside = [builder.phi(value.type) for value in state]
        for phi, value, last in zip(outside, state, new, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(last, end)
        return outside

    @contextmanager
    def when(self, value: ir.Value, equals: int) -> Iterator[None]:
        """Emit the body of the with statement under ``if value == equals``."""
        with self._builder.if_then(self._builder.icmp_signed("==", value, self.integer(equals))):
            yield


def kernel(emit: Callable[..., None], name: str, arity: int) -> Any:
    """Make an intrinsic ``name(real, arguments)``, with a tuple of `arity` int64, of ``emit(emitter, *arguments)``."""

    def typed(typingctx: Any, real: Any, arguments: Any) -> Any:
        if not isinstance(real, types.NumberClass) or arguments != types.UniTuple(types.int64, arity):
            return None
        scalar = np.float32 if real.dtype == types.float32 else np.float64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(Emitter(builder, scalar), *cgutils.unpack_tuple(builder, args[1], arity))
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
