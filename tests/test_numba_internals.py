"""What Numba and llvmlite do not document, and this package relies on: a test for each, that fails where it changes."""

from __future__ import annotations

import ctypes
import importlib.metadata
import inspect
import os
import pickle
import re
import threading
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import pytest
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

import nbfftconv
from nbfftconv import numba_internals as internals

PACKAGE = Path(nbfftconv.__file__).parent


def double(value):
    return value + value


class Kept(internals.NullCache):
    """A cache in memory, of bytes, as one on disk has them."""

    def __init__(self, options=None):
        self.options, self.calls, self.codes = options, [], {}

    def load_overload(self, sig, target_context):
        self.calls.append(("load", sig))
        internals.refresh(target_context)
        code = self.codes.get(str(sig))
        return code and internals.unpacked(target_context, code)

    def save_overload(self, sig, data):
        self.calls.append(("save", sig))
        assert isinstance(data, internals.CompileResult) and data.target_context is not None
        self.codes[str(sig)] = internals.packed(data)


def njit(function, cache=None, **options):
    dispatcher = numba.njit(nogil=True, **options)(function)
    caches = []

    def make(options):
        caches.append(cache or Kept())
        caches[0].options = options
        return caches[0]

    internals.set_cache(dispatcher, make)
    return dispatcher, caches[0]


def test_the_version_is_one_that_was_tested():
    """Whoever moves the bound runs these tests first."""
    (bound,) = (text for text in importlib.metadata.requires("numba") if text.startswith("llvmlite"))
    assert "<" in bound or "==" in bound, "Numba no longer bounds llvmlite: pyproject.toml has to"
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    major, minor = map(int, re.search(r'"numba>=[\d.]+,<(\d+)\.(\d+)"', text).groups())
    assert tuple(map(int, numba.__version__.split(".")[:2])) < (major, minor)


def test_nothing_else_is_imported():
    """Other modules use what Numba documents: its names, `types`, `extending`."""
    private = re.compile(r"^\s*(?:from|import) numba\.(?!extending\b)|\bfrom llvmlite\.binding\b", re.MULTILINE)
    found = {path.name for path in PACKAGE.rglob("*.py") if private.search(path.read_text(encoding="utf-8"))}
    assert found == {"numba_internals.py"}


def test_a_dispatcher_asks_its_cache_before_it_compiles_and_afterwards():
    dispatcher, cache = njit(double, fastmath=True)
    assert cache.options["nogil"] and cache.options["fastmath"]
    assert dispatcher(1.5) == dispatcher(1.5) == 3.0
    assert cache.calls == [(kind, (types.float64,)) for kind in ("load", "save")]
    assert dispatcher(np.float32(2)) == 4
    assert len(cache.calls) == 4


def test_what_a_cache_returns_is_not_compiled():
    _, cache = njit(double)
    first, _ = njit(double, cache)
    assert first(21) == 42
    cache.calls.clear()
    second, _ = njit(lambda value: value - 1, cache)
    assert second(21) == 42
    assert [kind for kind, _ in cache.calls] == ["load"]


def test_compilation_can_be_wrapped():
    dispatcher, _ = njit(double)
    wrapped = []

    def wrap(compile_for_args):
        def compile_noted(*args, **keywords):
            wrapped.append(args)
            return compile_for_args(*args, **keywords)

        return compile_noted

    internals.wrap_compilation(dispatcher, wrap)
    assert [dispatcher(1), dispatcher(2), dispatcher(1.5)] == [2, 4, 3.0]
    assert wrapped == [(1,), (1.5,)]


def test_functions_and_intrinsics_can_be_told():
    def forty_two(typingctx):
        return types.int64(), lambda context, builder, signature, args: context.get_constant(types.int64, 42)

    assert internals.python_function(numba.njit(double)) is double
    assert internals.intrinsic_definition(intrinsic(forty_two)) == ("forty_two", forty_two)
    for other in (double, 1, None, Kept()):
        assert internals.python_function(other) is None and internals.intrinsic_definition(other) is None


def increment(address):
    numba.carray(address, 1)[0] += 1


def test_a_callback_is_compiled_once_and_loaded_afterwards():
    signature = types.void(types.CPointer(types.int64))
    assert isinstance(signature, internals.Signature)
    cache, number = Kept(), ctypes.c_int64(0)
    for count in (1, 2):
        made = internals.callback(increment, signature, cache)
        assert isinstance(made, internals.CFunc)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(made.address)(ctypes.addressof(number))
        assert number.value == count
    assert [kind for kind, _ in cache.calls] == ["load", "save", "load"]
    assert hasattr(internals.CFunc, "_compile_uncached")  # of which tests count the calls


def test_symbols_have_the_qualified_name():
    """`nbfftconv.jit` makes it unique over processes."""

    def named(address):
        numba.carray(address, 1)[0] = 1

    named.__qualname__ = "named.0123456789abcdef"
    made = internals.callback(named, types.void(types.CPointer(types.int64)), Kept())
    assert "named_2e_0123456789abcdef" in made.inspect_llvm() or "named.0123456789abcdef" in made.inspect_llvm()


def test_machine_code_goes_through_bytes():
    dispatcher, cache = njit(double)
    dispatcher(1)
    (code,) = cache.codes.values()
    assert isinstance(code, bytes)
    assert isinstance(pickle.loads(code), tuple)
    context = cpu_target.target_context
    internals.refresh(context)
    result = internals.unpacked(context, code)
    assert isinstance(result, internals.CompileResult)
    assert result.signature.return_type == types.int64


def test_machine_code_with_addresses_is_no_bytes():
    function = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(lambda value: value + 1)

    def call(value):
        return function(value)

    dispatcher, cache = njit(call)
    assert dispatcher(1.0) == 2.0
    assert list(cache.codes.values()) == [None]


def test_threads_of_a_loop_are_set_by_code_that_can_be_kept():
    def change(number):
        before = internals.num_threads()
        internals.set_num_threads(number)
        return before

    numba.get_num_threads()  # starts the pool
    dispatcher, cache = njit(change)
    before = numba.get_num_threads()
    try:
        assert dispatcher(1) == before
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)
    assert [type(code) for code in cache.codes.values()] == [bytes]


def test_a_target_is_told_by_triple_cpu_and_features():
    triple, name, features = internals.target_of(cpu_target.target_context)
    assert triple == llvmlite.binding.get_process_triple()
    assert isinstance(name, str) and isinstance(features, str)
    assert "0x" not in repr((triple, name, features))


def test_settings_are_those_of_numba(monkeypatch):
    assert [name for name, _ in internals.settings()] == list(internals.SETTINGS)
    known = {name for name in internals.SETTINGS if hasattr(internals.config, name)}
    assert known >= {"OPT", "CPU_NAME", "CPU_FEATURES", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE"}
    monkeypatch.setattr(internals.config, "OPT", "0 of a test")
    assert dict(internals.settings())["OPT"] == "0 of a test"
    assert isinstance(internals.config.DISABLE_JIT, int) and internals.config.NUMBA_NUM_THREADS >= 1


def test_the_lock_of_llvm():
    """A context manager, held in every call of LLVM: where it is held, another thread waits."""
    done = threading.Event()

    def use_llvm():
        llvmlite.binding.parse_assembly("define void @nothing() { ret void }")
        done.set()

    with internals.llvm_lock:
        thread = threading.Thread(target=use_llvm)
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(30)
    thread.join()


def test_the_lock_of_the_compiler():
    lock = internals.global_compiler_lock
    lock.acquire()
    try:
        held = []
        thread = threading.Thread(target=lambda: (lock.acquire(), held.append(1), lock.release()))
        thread.start()
        thread.join(0.2)
        assert not held
    finally:
        lock.release()
    thread.join(30)
    assert held


def test_helpers_that_emit_code():
    """Those of `cgutils`, by their parameters."""
    expected = {
        "alloca_once": ["builder", "ty"],
        "get_or_insert_function": ["module", "fnty", "name"],
        "unpack_tuple": ["builder", "tup", "count"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(internals.cgutils, name)).parameters)[: len(parameters)] == parameters


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = internals.user_cache_folder("nbfftconv-of-a-test")
    assert os.path.basename(folder) == "nbfftconv-of-a-test" or "nbfftconv-of-a-test" in folder
    if os.name == "posix" and os.uname().sysname == "Linux":
        assert Path(folder) == tmp_path / "nbfftconv-of-a-test"


@pytest.mark.parametrize("name", internals.__all__)
def test_all_there_is_is_used(name):
    """Nothing private stays behind when its last user goes."""
    others = (path for path in PACKAGE.rglob("*.py") if path.name != "numba_internals.py")
    assert name == "SETTINGS" or any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in others)
