"""Compilation with Numba, and its cache on disk.

Numba's own cache is refreshed when the file that defines a function changes. Kernels here are assembled from several
files, so this cache is stamped with the source of the whole package. A damaged or unwritable cache costs a
compilation, never an error.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc

from nbfftconv import apart
from nbfftconv.forking import fork_safe_lock
from nbfftconv.paths import cache_directory

_PACKAGE = Path(__file__).parent
_compile_lock = fork_safe_lock()
apart.finish_at_exit(_compile_lock)


@functools.cache
def _package_stamp() -> str:
    digest = hashlib.sha256()
    for source in sorted(_PACKAGE.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


class _Locator(_CacheLocator):
    def __init__(self, function: Callable, file: str) -> None:
        self._disambiguator = f"{function.__module__}-{function.__code__.co_firstlineno}"

    @classmethod
    def from_function(cls, function: Callable, file: str) -> "_Locator":
        return cls(function, file)

    def get_cache_path(self) -> str:
        return str(cache_directory() / "kernels" / _package_stamp()[:16])

    def get_source_stamp(self) -> str:
        return _package_stamp()

    def get_disambiguator(self) -> str:
        return self._disambiguator


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(FunctionCache):
    _impl_class = _CacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged file may raise anything
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # unwritable, full, or an index that cannot be read
            self.disable()

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        # By name: Numba would hash a pickle, and that of an intrinsic differs from process to process.
        cells = [cell.cell_contents for cell in self._py_func.__closure__ or ()]
        return sig, codegen.magic_tuple(), tuple(getattr(cell, "__name__", repr(cell)) for cell in cells)


def njit(**options: Any) -> Callable:
    """`numba.njit` with the cache of this package, no GIL, and compilation under the lock that a fork waits for."""

    def decorate(function: Callable) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        dispatcher._cache = _Cache(function)
        compile_for_args = dispatcher._compile_for_args

        def compile_locked(*args: Any, **keywords: Any) -> Any:
            return apart.run(_compile_lock, functools.partial(compile_for_args, *args, **keywords))

        dispatcher._compile_for_args = compile_locked  # where a call ends that has no machine code yet
        return dispatcher

    return decorate


class Callback:
    """A function that compiled code calls by its address, so that a caller compiles once for all that it may call.

    `factory(real)` returns the Python function for the scalar type `real`, `numpy.float32` or `numpy.float64`; it is
    compiled at first use, for `signature`.
    """

    def __init__(self, factory: Callable[[type], Callable], signature: Any) -> None:
        self._factory = factory
        self._signature = signature
        self._compiled: dict[type, CFunc] = {}

    def address(self, real: type) -> int:
        """Return the address of the machine code for `real`."""
        callback = self._compiled.get(real) or apart.run(_compile_lock, functools.partial(self._compile, real))
        return callback.address

    def _compile(self, real: type) -> CFunc:
        if real in self._compiled:
            return self._compiled[real]
        function = self._factory(real)
        callback = CFunc(function, (self._signature.args, self._signature.return_type), locals={}, options={})
        callback._cache = _Cache(function)
        callback.compile()
        self._compiled[real] = callback
        return callback


def stage(record: np.dtype) -> Callable[[Callable], Callback]:
    """Return the decorator for a step of a pass: ``void (record, slot, begin, end)``, as `threads.run` calls it.

    It does the work items ``begin <= item < end``, with the scratch memory of `slot` to itself.
    """
    signature = types.void(numba.from_dtype(record), types.intp, types.intp, types.intp)
    return functools.partial(Callback, signature=signature)


def copy_record(record: np.ndarray) -> np.ndarray:
    """Return a copy of a record; NumPy's own copies field by field, a hundred in 25 us instead of 1."""
    return np.ndarray((), record.dtype, bytearray(record.tobytes()))
