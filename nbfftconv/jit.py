"""Compilation with Numba, and the machine code kept on disk.

Numba's own cache gives the functions that share a name one index, written without a lock: processes that compiled at
once mixed them up. Here a file holds the code of one function for one signature, is named for all that the code depends
on, and is put in place in one step. A kernel is assembled from several files of the package, so all of them count. A
file that is damaged, or cannot be written, costs a compilation, never an error.

What Numba expects of a cache is private to it: `nbfftconv.numba_internals` has all of that.
"""

import contextlib
import dataclasses
import functools
import hashlib
import marshal
import pkgutil
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import types

from nbfftconv import apart, memory, simd, store
from nbfftconv import numba_internals as internals
from nbfftconv.forking import fork_safe_lock
from nbfftconv.numba_internals import CFunc, CompileResult, NullCache, Signature, config
from nbfftconv.records import RecordType

_FORMAT = b"nbfftconv kernel 1\n"
_compile_lock = fork_safe_lock()
apart.finish_at_exit(_compile_lock)


def _modules(spec: Any) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package and of all modules in it, wherever they are imported from."""
    try:
        content = spec.loader.get_data(spec.origin)
    except (AttributeError, TypeError, OSError):  # frozen: there is no file
        content = marshal.dumps(spec.loader.get_code(spec.name), 2)  # later versions depend on more than the code
    yield spec.name, content
    for module in pkgutil.iter_modules(spec.submodule_search_locations or [], f"{spec.name}."):
        yield from _modules(module.module_finder.find_spec(module.name, None))


def _package_stamp() -> str | None:
    """Hash of the package's source, or code, and of what compiles it; None if that is not to be had."""
    package = __name__.partition(".")[0]
    versions = numba.__version__, llvmlite.__version__, np.__version__, sys.version, sys.implementation.cache_tag
    digest = hashlib.sha256(repr(versions).encode())
    found = set()
    try:
        for name, content in _modules(sys.modules[package].__spec__):
            found.add(name)
            digest.update(f"{name} {len(content)} ".encode() + content)
    except Exception:  # of whatever imports modules here
        return None
    return digest.hexdigest()[:16] if __name__ in found else None


# At once: who replaces the package's files while it is in use does not replace what is compiled here.
_STAMP = _package_stamp()


def stamp() -> str | None:
    """Return the name of the folder with this version's machine code; None if none is kept."""
    return _STAMP


# What a text tells all of.
_SIMPLE = int, float, str, type(None), np.generic, np.dtype, types.Type, Signature


def _describe(value: Any) -> Any:
    """Return what a value is in any process; ValueError if that cannot be told."""
    if (function := internals.python_function(value)) is not None:
        return _describe(function)
    if (intrinsic := internals.intrinsic_definition(value)) is not None:
        name, definition = intrinsic
        return "intrinsic", name, _describe(definition)
    if isinstance(value, FunctionType):
        inside = *(cell.cell_contents for cell in value.__closure__ or ()), *(value.__defaults__ or ())
        place = value.__module__, value.__qualname__, value.__code__.co_firstlineno
        return *place, tuple(map(_describe, inside))
    if isinstance(value, type):
        return value.__module__, value.__qualname__
    if isinstance(value, (tuple, list)):
        return type(value).__qualname__, tuple(map(_describe, value))
    if dataclasses.is_dataclass(value):
        return type(value).__qualname__, tuple(
            _describe(getattr(value, field.name)) for field in dataclasses.fields(value)
        )
    text = str(value)
    if not isinstance(value, _SIMPLE) or " at 0x" in text:  # an address
        raise ValueError(f"what {text} is in another process is not known")
    return type(value).__qualname__, text


def key(function: Callable, signature: Any, options: dict[str, Any], target: tuple) -> bytes:
    """Return all that a function's machine code depends on; the stamp stands for the package and what compiles it.

    Parameters
    ----------
    function : function
        Of this package. What is in its closure is told by name or number, as far down as it goes.
    signature : numba.core.typing.Signature or tuple of numba.types.Type
    options : dict
        Of the compilation.
    target : tuple
        Of `nbfftconv.numba_internals.target_of`.

    Raises
    ------
    ValueError
        If something in it is known in this process only.
    """
    described = _describe(function), _describe(signature), repr(options), target, simd.VECTOR_BYTES
    return repr((_STAMP, *described, internals.settings())).encode()


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _packed(key: bytes, code: bytes) -> bytes:
    content = key + b"\n" + code
    return _FORMAT + _hash(content) + content


def _unpacked(key: bytes, file: bytes) -> bytes:
    """Return the code in a file; ValueError if it is not of this key, or not whole."""
    start = len(_FORMAT) + len(_hash(b""))
    content = file[start:]
    if file[:start] != _FORMAT + _hash(content) or not content.startswith(key + b"\n"):
        raise ValueError("damaged")
    return content[len(key) + 1 :]


class _Cache(NullCache):
    """The methods that Numba calls: before it compiles a function for a signature, and afterwards."""

    def __init__(self, function: Callable, options: dict[str, Any]) -> None:
        self._function, self._options = function, options

    def _key(self, signature: Any, target_context: Any) -> bytes:
        return key(self._function, signature, self._options, internals.target_of(target_context))

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """Return what was kept for a signature, or None."""
        internals.refresh(target_context)  # it may have to know functions that were made since
        try:
            key = self._key(sig, target_context)
            with _folder() as folder:
                file = folder.read(_name(key))
            return internals.unpacked(target_context, _unpacked(key, file))
        except Exception:  # whatever is wrong with it, the function is compiled
            return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        """Keep what was compiled for a signature, if that is possible."""
        with contextlib.suppress(Exception):
            code = internals.packed(data)
            if code is not None:
                key = self._key(sig, data.target_context)
                with _folder() as folder:
                    folder.replace(_name(key), _packed(key, code))


def _folder() -> contextlib.AbstractContextManager[store.Folder]:
    if _STAMP is None:
        raise FileNotFoundError("machine code could be of another version of the package")
    return store.cache_folder("kernels", _STAMP)


def _name(key: bytes) -> str:
    return f"{hashlib.sha256(key).hexdigest()}.kernel"


def _refuse(*args: Any, **keywords: Any) -> None:
    raise RuntimeError("nbfftconv computes by compiled code only: NUMBA_DISABLE_JIT must not be set")


def _locked(compile_for_args: Callable) -> Callable:
    def compile_locked(*args: Any, **keywords: Any) -> Any:
        return apart.run(_compile_lock, functools.partial(compile_for_args, *args, **keywords))

    return compile_locked


def njit(**options: Any) -> Callable:
    """`numba.njit` with the cache of this package, no GIL, and compilation under the lock that a fork waits for."""

    def decorate(function: Callable) -> Any:
        if config.DISABLE_JIT:
            return functools.wraps(function)(_refuse)
        dispatcher = numba.njit(nogil=True, **options)(function)
        internals.set_cache(dispatcher, functools.partial(_Cache, function))
        internals.wrap_compilation(dispatcher, _locked)
        return dispatcher

    return decorate


class Callback:
    """A function that compiled code calls by its address, so that a caller compiles once for all that it may call.

    `factory(real)` returns the Python function for the scalar type `real`, `numpy.float32` or `numpy.float64`; it is
    compiled at first use, for `signature`.
    """

    def __init__(self, factory: Callable[[type], Any], signature: Any) -> None:
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
        if config.DISABLE_JIT:
            _refuse()
        function = self._factory(real)
        # Symbols in machine code are names and a count of this process: two closures from different processes, loaded
        # by a third one, could have the same.
        function.__qualname__ += f".{hashlib.sha256(repr(_describe(function)).encode()).hexdigest()[:16]}"
        callback = internals.callback(function, self._signature, _Cache(function, {"callback": True}))
        self._compiled[real] = callback
        memory.trim_heap()  # loading machine code leaves a hundred MiB there
        return callback


def stage(record: RecordType) -> Callable[[Callable], Callback]:
    """Return the decorator for a step of a pass: ``void (record, worker, begin, end)``, as `threads.run` calls it.

    It does the work items ``begin <= item < end``, with the scratch memory of `worker` to itself.
    """
    signature = types.void(numba.from_dtype(record.dtype), types.intp, types.intp, types.intp)
    return functools.partial(Callback, signature=signature)
