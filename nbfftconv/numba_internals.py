"""All that this package uses of Numba and llvmlite beyond what they document.

It may change with any release, so pyproject.toml bounds Numba's versions (and Numba those of llvmlite), and for each of
the things below tests/test_numba_internals.py has a test that fails if it is not what is relied on here.
"""

import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

from llvmlite.binding import ffi
from numba import types
from numba.core import cgutils, config
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic
from numba.core.serialize import dumps
from numba.core.typing.templates import Signature
from numba.misc.appdirs import AppDirs

__all__ = [
    "SETTINGS",
    "CFunc",
    "CompileResult",
    "NullCache",
    "Signature",
    "callback",
    "cgutils",
    "config",
    "global_compiler_lock",
    "intrinsic_definition",
    "llvm_lock",
    "num_threads",
    "packed",
    "python_function",
    "refresh",
    "set_cache",
    "set_num_threads",
    "settings",
    "target_of",
    "unpacked",
    "user_cache_folder",
    "wrap_compilation",
]

#: Numba's settings that change the code of a function: names in `config`.
SETTINGS = (
    "OPT", "ENABLE_AVX", "CPU_NAME", "CPU_FEATURES", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DISABLE_INTEL_SVML",
    "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "EXTEND_VARIABLE_LIFETIMES", "DEBUG_NRT", "NRT_STATS", "ENABLE_PROFILING",
    "LLVM_REFPRUNE_PASS", "LLVM_REFPRUNE_FLAGS", "PARFOR_MAX_TUPLE_SIZE",
)  # fmt: skip

#: The lock that llvmlite holds whenever it is in LLVM: a context manager.
llvm_lock = ffi.lib._lock

#: For compiled code, once the pool is started: how many of its threads the next parallel loop of this thread takes.
#: `numba.get_num_threads` and `numba.set_num_threads` call them by addresses of this process, so that no machine code
#: can be kept that calls these; which cost each process 0.4 s.
num_threads = types.ExternalFunction("get_num_threads", types.intc())
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intc))


def settings() -> list[tuple[str, str]]:
    """Return what `SETTINGS` are now; None is said of one that this version of Numba has not."""
    return [(name, str(getattr(config, name, None))) for name in SETTINGS]


def python_function(value: Any) -> FunctionType | None:
    """Return the Python function of what `numba.njit` has made; None of anything else."""
    return value.py_func if isinstance(value, Dispatcher) else None


def intrinsic_definition(value: Any) -> tuple[str, FunctionType] | None:
    """Return name and definition of what `numba.extending.intrinsic` has made; None of anything else."""
    return (value._name, value._defn) if isinstance(value, _Intrinsic) else None


def set_cache(dispatcher: Dispatcher, make: Callable[[dict[str, Any]], NullCache]) -> None:
    """Let a function of `numba.njit` ask ``make(options)`` for machine code, before it compiles and afterwards.

    Of a `NullCache` it calls ``load_overload(signature, target_context)``, which returns a `CompileResult` or None, and
    ``save_overload(signature, result)``.
    """
    dispatcher._cache = make(dispatcher.targetoptions)


def wrap_compilation(dispatcher: Dispatcher, wrap: Callable[[Callable], Callable]) -> None:
    """Let a call of a function of `numba.njit` that has no machine code yet end in ``wrap(compile_for_args)``."""
    dispatcher._compile_for_args = wrap(dispatcher._compile_for_args)


def callback(function: FunctionType, signature: Signature, cache: NullCache) -> CFunc:
    """Compile a function for C callers, or load it from a cache; its ``address`` is that of the machine code.

    Symbols in the code are named for the function's ``__qualname__`` and a count of this process.
    """
    made = CFunc(function, (signature.args, signature.return_type), locals={}, options={})
    made._cache = cache
    made.compile()
    return made


def target_of(context: Any) -> tuple:
    """Return what tells one CPU that code is compiled for from another: its triple, name and features."""
    return context.codegen().magic_tuple()


def refresh(context: Any) -> None:
    """Let a target context know the functions and types that were made since it last looked."""
    context.refresh()


def packed(result: CompileResult) -> bytes | None:
    """Return the machine code as bytes; None if addresses of this process are in it."""
    if any(not lifted.can_cache for lifted in result.lifted) or result.library.has_dynamic_globals:
        return None
    return dumps(result._reduce())


def unpacked(context: Any, code: bytes) -> CompileResult:
    """Return what `packed` has packed; unpickles it, so the bytes must be of this package's own making."""
    return CompileResult._rebuild(context, *pickle.loads(code))


def user_cache_folder(name: str) -> str:
    """Return the folder that the platform has for the caches of this user; begins with ~ if there is no home."""
    return AppDirs(appname=name, appauthor=False).user_cache_dir
