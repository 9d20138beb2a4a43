"""Files that processes share: who may write them, what a damaged one costs, and what a disk that refuses costs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import inspect
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyfftw
import pytest
from numba import types
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

import nbfftconv
from nbfftconv import accumulate, jit, outliers, paths, profile, store
from nbfftconv.direct import dense, dense_grad_weight, depthwise, gradients
from nbfftconv.passes import backward, blank_windows, forward, from_spectra, grad_input, to_spectra, unmet_weights
from nbfftconv.report import report
from nbfftconv.store import Document, cache_folder
from nbfftconv.transforms import codelets, fftw, four_step, kernel_callback, row_codelets, row_four_step

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")
ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
PACKAGE = Path(nbfftconv.__file__).parent
DISK_ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, not made yet."""
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", str(tmp_path / "outer" / "cache"))
    return tmp_path / "outer" / "cache"


@pytest.fixture
def own_profile(cache, monkeypatch):
    """The profile's file in that folder; returns where it belongs."""
    monkeypatch.delenv("NBFFTCONV_PROFILE", raising=False)
    monkeypatch.setattr(profile, "_profiles", {})
    return profile.profile_file()


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(warning.message) for warning in caught]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def run_python(code: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    variables = {key: value for key, value in variables.items() if value is not None}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False, cwd=os.sep)


CONVOLVE = """
x, w = np.ones((1, 1, 9, 9), np.float32), np.ones((1, 1, 3, 3), np.float32)
def convolve():
    return float(nb.conv2d(x, w, plan=nb.plan_conv2d(x.shape, w.shape, algorithm="direct"))[0, 0, 4, 4])
"""

# Who may write ---------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o277, 0o777])
def test_what_is_made_is_ours_alone(cache, umask):
    before = os.umask(umask)
    try:
        with cache_folder("kernels", "0" * 16) as folder:
            folder.replace("name", b"content")
            with folder.locked("name.lock") as is_locked:
                assert is_locked
    finally:
        os.umask(before)
    made = cache / "kernels" / ("0" * 16)
    assert [mode(path) for path in (cache.parent, cache, cache / "kernels", made)] == [0o700] * 4
    assert mode(made / "name") == 0o600 and (made / "name").read_bytes() == b"content"


@POSIX
@pytest.mark.parametrize("bits", [0o720, 0o702, 0o770, 0o777, 0o1777, 0o2775])
@pytest.mark.parametrize("inner", ["", "kernels"])
def test_a_folder_that_others_may_write(cache, bits, inner):
    """It is as if there were none, and that is said once."""
    bad = cache / inner
    bad.mkdir(parents=True, mode=0o700)
    os.chmod(bad, bits)
    names = [inner] if inner else []
    said = pytest.warns(UserWarning, match="not used as a cache: others may write it")
    for what in (said, no_warnings()):
        with what, pytest.raises(FileNotFoundError), cache_folder(*names):
            pass
    assert not list(bad.iterdir())


@ROOT
@pytest.mark.parametrize("link", [False, True])
def test_a_folder_of_another_user(cache, link, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    if link:  # to a folder of ours
        cache.parent.mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "theirs")
        os.chown(cache, 54321, 54321, follow_symlinks=False)
    else:
        cache.mkdir(parents=True, mode=0o700)
        os.chown(cache, 54321, 54321)
    with pytest.warns(UserWarning, match="belongs to user 54321"), pytest.raises(FileNotFoundError), cache_folder():
        pass


def test_a_link_of_ours_to_a_folder(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with cache_folder("kernels") as folder:
        folder.replace("name", b"content")
    assert (tmp_path / "elsewhere" / "kernels" / "name").read_bytes() == b"content"


def _a_folder(path):
    path.mkdir()


def _a_pipe(path):
    os.mkfifo(path)  # opened for reading, it would wait for a writer


def _a_link(path):
    target = path.with_name("target")
    target.write_bytes(b"content")
    path.symlink_to(target)


def _a_loop(path):
    path.symlink_to(path)


def _for_the_group(path):
    path.write_bytes(b"content")
    path.chmod(0o620)


def _for_all(path):
    path.write_bytes(b"content")
    path.chmod(0o606)


def _not_ours(path):
    path.write_bytes(b"content")
    os.chown(path, 54321, 54321)


STRANGE = [_a_folder, _a_pipe, _a_link, _a_loop, _for_the_group, _for_all, pytest.param(_not_ours, marks=ROOT)]


@POSIX
@pytest.mark.filterwarnings("ignore:.*not used as a cache")
@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_file_of_ours(cache, make):
    """It is not read, does not make anybody wait, and no lock; what can be replaced is."""
    with cache_folder() as folder:
        make(cache / "name")
        with pytest.raises(OSError):
            folder.read("name")
        with folder.locked("name") as is_locked:
            assert not is_locked
        if make is not _a_folder:
            folder.replace("name", b"new")
            assert folder.read("name") == b"new"


def test_files_that_the_user_names_may_be_anybodys(tmp_path):
    tmp_path.chmod(0o777)
    fftw.save_wisdom(tmp_path / "wisdom.json")
    (tmp_path / "wisdom.json").chmod(0o666)
    (tmp_path / "link.json").symlink_to(tmp_path / "wisdom.json")
    with no_warnings():
        fftw.load_wisdom(tmp_path / "link.json")


# Disks that refuse -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", DISK_ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["open", "write", "replace"])
def test_a_disk_that_refuses_a_step(cache, monkeypatch, step, code):
    """The old file stays, and nothing else."""
    original = getattr(os, step)

    def refuse(*arguments, **keywords):
        if step != "open" or arguments[1] & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **keywords)

    with cache_folder() as folder:
        folder.replace("name", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, step, refuse)
            with pytest.raises(OSError):
                folder.replace("name", b"new")
        assert folder.read("name") == b"old" and os.listdir(cache) == ["name"]


def test_a_disk_that_writes_a_part(cache, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    with cache_folder() as folder:
        folder.replace("name", bytes(range(256)))
        assert folder.read("name") == bytes(range(256))


# Locks -----------------------------------------------------------------------------------------------


def raising(code: int, when=lambda *arguments: True, original=None):
    def function(*arguments, **keywords):
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return original(*arguments, **keywords)

    return function


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_without_locks(cache, own_profile, monkeypatch, code):
    """Processes share all the same: wisdom is read and added to, a profile is kept."""
    monkeypatch.setattr(fftw, "_effort", "measure")
    pyfftw.forget_wisdom()
    with fftw._shared_wisdom():
        fftw._make(np.float32, 6, 34, 0)
    before = json.loads((cache / "fftw-wisdom.json").read_text())["single"]
    loaded = []
    load = fftw._load_wisdom
    monkeypatch.setattr(fftw, "_load_wisdom", lambda document: loaded.append(1) or load(document))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    monkeypatch.setattr(store.fcntl, "flock", raising(code))
    pyfftw.forget_wisdom()
    with no_warnings():
        with fftw._shared_wisdom():
            fftw._make(np.float32, 10, 34, 0)
        profile.remember(threads=(1, 1))
    assert loaded == [1]
    after = json.loads((cache / "fftw-wisdom.json").read_text())["single"]
    assert set(before.splitlines()) < set(after.splitlines())
    assert json.loads(own_profile.read_text())["threads"] == {"loops": 1, "library": 1}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_wisdom_on_a_read_only_disk(cache, monkeypatch, code):
    """What can be read is used, and nothing kept."""
    with fftw._shared_wisdom():
        fftw._make(np.float32, 6, 10, 0)
    before = (cache / "fftw-wisdom.json").read_bytes()
    loaded = []
    load = fftw._load_wisdom
    monkeypatch.setattr(fftw, "_load_wisdom", lambda document: loaded.append(1) or load(document))
    creates = lambda *arguments: arguments[1] & (os.O_CREAT | os.O_RDWR)  # noqa: E731
    with monkeypatch.context() as patch, no_warnings():
        patch.setattr(os, "open", raising(code, creates, os.open))
        with fftw._shared_wisdom():
            fftw._make(np.float32, 10, 10, 0)
    assert loaded == [1]
    assert (cache / "fftw-wisdom.json").read_bytes() == before


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(1, flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def stopped_holder(lock: Path):
    """Within, a stopped process has the lock."""
    lock.parent.mkdir(parents=True, mode=0o700)
    lock.touch(mode=0o600)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        holder.send_signal(signal.SIGSTOP)
        yield
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.fixture
def slept(monkeypatch):
    """Seconds slept so far, by a clock of its own."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(seconds))
    return seconds


@POSIX
def test_a_lock_of_a_stopped_process(cache, slept):
    """It is waited for, for a bounded time, once; not any longer when it is free."""
    document = Document.in_cache("name.json")
    with stopped_holder(cache / "name.json.lock"):
        with document.locked() as is_locked:
            assert not is_locked
        assert store._PATIENCE <= sum(slept) < 2 * store._PATIENCE < 60
        waited = len(slept)
        with document.locked() as is_locked:
            assert not is_locked
        assert len(slept) <= waited + 1
    with document.locked() as is_locked:
        assert is_locked


@POSIX
def test_a_profile_beside_a_stopped_process(own_profile, slept):
    """What took minutes to measure is kept."""
    with stopped_holder(own_profile.with_name(f"{own_profile.name}.lock")), no_warnings():
        profile.remember(threads=(1, 1))
    assert json.loads(own_profile.read_text())["threads"] == {"loops": 1, "library": 1}


# Machine code ----------------------------------------------------------------------------------------


def adder(number):
    """A function that compiles in no time; those of all numbers have one name."""

    def factory(real):
        def add(a, b):
            jit.simd.pointer(real, a)[0] += real(number)

        return add

    return jit.Callback(factory, types.void(types.intp, types.intp))


def add(number, real=np.float64) -> float:
    """What the function adds, loaded or compiled anew."""
    memory = np.zeros(1, real)
    ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 2)(adder(number).address(real))(memory.ctypes.data, 0)
    return float(memory[0])


@pytest.fixture
def compilations(monkeypatch):
    """A list with an entry for each."""
    found, compile = [], CFunc._compile_uncached
    monkeypatch.setattr(CFunc, "_compile_uncached", lambda self: found.append(1) or compile(self))
    return found


def kernel_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("kernels/*/*.kernel"))


def test_code_is_kept_by_what_it_does(cache, compilations):
    for _ in range(2):
        assert [add(number, real) for number in (1, 2) for real in (np.float32, np.float64)] == [1, 1, 2, 2]
    assert len(compilations) == len(kernel_files(cache)) == 4


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "a header alone": lambda content: content[:100],
    "another format": lambda content: content.replace(b"kernel 1", b"kernel 0"),
    "a bit of the digest": lambda content: flipped(content, 25),
    "a bit of the key": lambda content: flipped(content, 200),
    "a bit of the code": lambda content: flipped(content, -200),
    "garbage": lambda content: b"\x80\x04garbage" * 1000,
    "zeros": lambda content: bytes(len(content)),
}


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_code_costs_a_compilation(cache, compilations, name):
    add(3)
    (file,) = kernel_files(cache)
    good = file.read_bytes()
    bad = DAMAGE[name](good)
    assert bad != good
    file.write_bytes(bad)
    with no_warnings():
        assert [add(3), add(3)] == [3, 3]
    assert len(compilations) == 2  # and the file is whole again


@pytest.mark.parametrize("payload", [b"", b"garbage", b"\x80\x04N.", b"cos\nsystem\n(S'false'\ntR."])
def test_whole_files_of_what_is_no_code(cache, compilations, payload):
    add(4)
    (file,) = kernel_files(cache)
    key = file.read_bytes()[len(jit._FORMAT) + 64 :].partition(b"\n")[0]
    file.write_bytes(jit._packed(key, payload))
    assert add(4) == 4 and len(compilations) == 2


def test_code_of_another_key_under_this_name(cache, compilations):
    add(5)
    (five,) = kernel_files(cache)
    add(6)
    (six,) = set(kernel_files(cache)) - {five}
    five.write_bytes(six.read_bytes())
    assert [add(5), add(6)] == [5, 6]
    assert len(compilations) == 3


@POSIX
@pytest.mark.filterwarnings("ignore:.*not used as a cache")
@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_file_in_place_of_code(cache, compilations, make):
    add(7)
    (file,) = kernel_files(cache)
    file.unlink()
    make(file)
    assert [add(7), add(7)] == [7, 7]
    assert len(compilations) == (3 if make is _a_folder else 2)


@pytest.mark.parametrize("code", DISK_ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["open", "write", "replace", "mkdir"])
def test_code_that_cannot_be_kept(cache, monkeypatch, compilations, step, code):
    def refuse(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        with no_warnings():
            assert [add(8), add(8)] == [8, 8]
    assert len(compilations) == 2 and not kernel_files(cache)


def test_a_folder_removed_meanwhile(cache, monkeypatch, compilations):
    write = os.write

    def remove_first(descriptor, content):
        for path in sorted(cache.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        cache.rmdir()
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", remove_first)
        assert add(9) == 9
    assert [add(9), add(9)] == [9, 9] and len(compilations) == 2


def test_code_with_addresses_of_this_process_is_not_kept(cache):
    function = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(lambda value: value + 1)

    def call(value):
        return function(value)

    assert jit.njit()(call)(1.0) == 2.0
    assert not kernel_files(cache)


def test_old_folders_are_pruned(cache):
    kernels = cache / "kernels"
    kernels.mkdir(parents=True, mode=0o700)
    for age in range(6):
        (kernels / f"{age:016x}").mkdir(mode=0o700)
        (kernels / f"{age:016x}" / "a file").touch()
        os.utime(kernels / f"{age:016x}", (1e9 - age, 1e9 - age))
    others = ["precious", "0" * 15, "G" * 16]
    for name in others:
        (kernels / name).mkdir()
    with cache_folder("kernels", f"{5:016x}"):  # used again, nothing new
        pass
    assert len(os.listdir(kernels)) == 9
    with cache_folder("kernels", "f" * 16):
        pass
    kept = {f"{age:016x}" for age in (5, 0, 1)} | {"f" * 16}
    assert set(os.listdir(kernels)) == kept | set(others)


def test_what_killed_processes_left_is_removed(cache):
    cache.mkdir(parents=True, mode=0o700)
    old, new, other = (cache / name for name in (f".{'0' * 16}.tmp", f".{'1' * 16}.tmp", "mine.tmp"))
    for path in (old, new, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    with cache_folder():
        pass
    assert {path for path in (old, new, other) if path.exists()} == {new, other}


def callbacks():
    """All functions that are compiled for themselves."""
    passes = backward, blank_windows, forward, from_spectra, grad_input, to_spectra, unmet_weights
    transposition = sys.modules["nbfftconv.transpose"]
    others = (
        accumulate,
        dense,
        dense_grad_weight,
        depthwise,
        gradients,
        codelets,
        fftw,
        four_step,
        row_codelets,
        row_four_step,
        outliers,
        transposition,
    )
    for module in (*passes, *others):
        for value in vars(module).values():
            for found in value.values() if isinstance(value, dict) else [value]:
                if isinstance(found, jit.Callback):
                    yield found
    for side in codelets.SIDES:
        yield from (kernel_callback(emitter, side) for emitter in (codelets.rows_forward, codelets.rows_inverse))
        yield from (kernel_callback(codelets.columns, side, sign) for sign in (-1, 1))
    for side in four_step.SIDES:
        for emitter in (
            four_step.columns_forward,
            four_step.rows_forward,
            four_step.columns_inverse,
            four_step.rows_inverse,
        ):
            yield kernel_callback(emitter, side)
        yield from (
            kernel_callback(emitter, side, True) for emitter in (four_step.columns_forward, four_step.columns_inverse)
        )
    for n1 in {n1 for n1, _ in row_codelets.STEPS.values()}:
        yield from (kernel_callback(emitter, n1) for emitter in (row_codelets.first_forward, row_codelets.last_inverse))


def test_no_two_functions_have_the_same_key():
    target = cpu_target.target_context.codegen().magic_tuple()
    found = {}
    for callback in set(callbacks()):
        for real in (np.float32, np.float64):
            key = jit.key(callback._factory(real), callback._signature, {}, target)
            assert b"0x" not in key
            assert found.setdefault(key, callback) is callback
            assert key == jit.key(callback._factory(real), callback._signature, {}, target)
    assert len(found) > 2 * (4 * len(codelets.SIDES) + 4 * len(four_step.SIDES) + 20)


@pytest.mark.parametrize("setting", ["OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "CPU_NAME"])
def test_keys_tell_settings_options_and_signatures(monkeypatch, setting):
    def keys():
        function = adder(1)._factory(np.float32)
        return {
            jit.key(function, signature, options, ("cpu",))
            for signature in (types.void(types.intp), (types.intp,), (types.float64,))
            for options in ({}, {"fastmath": True})
        }

    before = keys()
    assert len(before) == 6
    monkeypatch.setattr(jit.config, setting, "7")
    assert not before & keys()


@pytest.mark.parametrize(
    "value", [object(), np.zeros(2000), {1: 2}, threading.Lock()], ids=lambda value: type(value).__name__
)
def test_a_closure_that_cannot_be_told_is_not_kept(value):
    def function():
        return value

    with pytest.raises(ValueError, match="not known"):
        jit.key(function, (), {}, ())


# The stamp of the package ----------------------------------------------------------------------------

STAMP = "from nbfftconv import jit; print(jit._STAMP)"


def copied(target: Path, changed: bool) -> Path:
    """A copy of the package, with a changed number or not."""
    for source in PACKAGE.rglob("*.py"):
        copy = target / "nbfftconv" / source.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        if changed and copy.name == "accumulate.py":
            assert "return 2 * self.rows\n" in text
            text = text.replace("return 2 * self.rows\n", "return 3 * self.rows\n")
        copy.write_text(text)
    return target


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "package.zip", "w") as archive:
        for path in (folder / "nbfftconv").rglob("*.py*"):
            archive.write(path, path.relative_to(folder))
    return folder / "package.zip"


def without_source(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "compileall", "-qb", "--invalidation-mode", "unchecked-hash", folder], check=True
    )
    for path in (folder / "nbfftconv").rglob("*.py"):
        path.unlink()
    return folder


WAYS = {
    "files": lambda folder: folder,
    "zip": zipped,
    "no source": without_source,
    "zip without source": lambda folder: zipped(without_source(folder)),
}


@pytest.mark.parametrize(
    "way", ["files", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "files")]
)
def test_two_releases_have_two_stamps(tmp_path, way):
    stamps = []
    for changed in (False, True):
        place = WAYS[way](copied(tmp_path / str(changed), changed))
        done = run_python(STAMP, PYTHONPATH=str(place), PYTHONDONTWRITEBYTECODE="1")
        assert done.returncode == 0, done.stderr
        stamps.append(done.stdout.strip())
    assert len(set(stamps)) == 2 and "None" not in stamps


FROZEN = """
import importlib.abc, importlib.machinery, importlib.util, pkgutil, sys
from pathlib import Path
root, lists = Path(sys.argv[1]), sys.argv[2] == "lists"

class Frozen(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    # Has code, and no files.
    def find_spec(self, name, path=None, target=None):
        file = root.joinpath(*name.split("."))
        self_is_package = (file / "__init__.py").exists()
        if name.partition(".")[0] == "nbfftconv" and (self_is_package or file.with_suffix(".py").exists()):
            spec = importlib.machinery.ModuleSpec(name, self, is_package=self_is_package)
            spec.submodule_search_locations = [f"frozen/{name}"] if self_is_package else None
            return spec
    def get_source(self, name):
        return None
    def get_code(self, name):
        file = root.joinpath(*name.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        return compile(file.read_text(), name, "exec")
    def iter_modules(self, prefix=""):
        for file in sorted(root.joinpath(*prefix.rstrip(".").split(".")).iterdir()):
            if file.stem != "__init__" and (file.suffix == ".py" or (file / "__init__.py").exists()):
                yield prefix + file.stem, file.is_dir()

finder = Frozen()
sys.meta_path.insert(0, finder)
if lists:
    iter_modules = pkgutil.iter_modules
    def patched(path=None, prefix=""):  # as PyInstaller does
        if path and str(path[0]).startswith("frozen/"):
            return (pkgutil.ModuleInfo(finder, *each) for each in finder.iter_modules(prefix))
        return iter_modules(path, prefix)
    pkgutil.iter_modules = patched
import numpy as np, nbfftconv as nb
from nbfftconv import jit
print(jit._STAMP)
"""


@pytest.mark.slow
def test_frozen_packages(tmp_path):
    """Where modules can be listed, two releases have two stamps; where not, nothing is kept."""
    stamps = []
    for changed in (False, False, True):
        place = copied(tmp_path / str(changed), changed)
        done = run_python(FROZEN, str(place), "lists")
        assert done.returncode == 0, done.stderr
        stamps.append(done.stdout.strip())
    assert stamps[0] == stamps[1] != stamps[2] and "None" not in stamps
    code = FROZEN + CONVOLVE + "print(convolve())"
    done = run_python(code, str(tmp_path / "True"), "nothing", NBFFTCONV_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout.split() == ["None", "9.0"], done.stderr
    assert not (tmp_path / "cache" / "kernels").exists()


# Where the folder is, and what is said ---------------------------------------------------------------


@ROOT
def test_no_home_and_no_user(tmp_path):
    """No folder called ~, no warning, and results."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here").chmod(0o777)
    tmp_path.chmod(0o755)
    code = f"""
    import os, sys, warnings, numpy as np, nbfftconv as nb
    os.chdir(sys.argv[1])
    os.setgroups([]); os.setgid(54321); os.setuid(54321)
    if not os.access(nb.jit.numba.__file__, os.R_OK):
        sys.exit("others cannot read the environment")
    warnings.simplefilter("error")
    {textwrap.indent(CONVOLVE, "    ").lstrip()}
    from nbfftconv.paths import cache_directory
    print(convolve(), cache_directory(), os.listdir("."))
    """
    unset = {name: None for name in ("HOME", "XDG_CACHE_HOME", "NBFFTCONV_CACHE_DIR", "NBFFTCONV_PROFILE")}
    done = run_python(code, str(tmp_path / "here"), **unset)
    if "others cannot read" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.split() == ["9.0", "None", "[]"], done.stderr


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/cache", "~nobody-of-this-name"])
def test_a_home_that_nobody_has(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", folder)
    with no_warnings():
        assert paths.cache_directory() is None
        assert add(10) == 10
        with Document.in_cache("name.json").locked() as is_locked:
            assert not is_locked
    assert not list(tmp_path.iterdir())


def test_a_relative_folder_is_made_absolute_once(tmp_path, monkeypatch):
    name = f"cache-{tmp_path.name}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", name)
    assert paths.cache_directory() == tmp_path / name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert paths.cache_directory() == tmp_path / name


def test_warnings_point_to_the_caller(tmp_path, monkeypatch, caplog):
    """At the line that called the package; and where warnings are errors, nothing is raised."""
    bad = tmp_path / "profile.json"
    bad.write_text("garbage")
    for name in ("first", "second"):
        monkeypatch.setenv("NBFFTCONV_PROFILE", str(bad.rename(tmp_path / name)))
        if name == "first":
            with pytest.warns(UserWarning, match="damaged") as caught:
                nbfftconv.plan_conv2d((1, 1, 9, 9), (1, 1, 3, 3))
                line = inspect.currentframe().f_lineno - 1
            assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]
            bad.write_text("garbage")
        else:
            with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "nbfftconv"):
                warnings.simplefilter("error")
                nbfftconv.plan_conv2d((1, 1, 9, 9), (1, 1, 3, 3))
            assert [record.name for record in caplog.records] == ["nbfftconv"]
            assert "damaged" in caplog.text


def test_damaged_wisdom_is_reported_to_the_caller(cache, caplog):
    cache.mkdir(parents=True, mode=0o700)
    (cache / "fftw-wisdom.json").write_text(json.dumps({"single": 1}))
    with pytest.warns(UserWarning, match="no wisdom file") as caught:
        fftw.fftw(np.float32, 6, 22)
    assert [each.filename for each in caught] == [__file__]
    (cache / "fftw-wisdom.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fftw.fftw(np.float32, 6, 26)
        report("a message")
    assert "fftw-wisdom.json" in caplog.text and "a message" in caplog.text


@pytest.mark.parametrize("value", ["1", "2"])
def test_numba_without_compilation(value):
    code = "import sys, numpy as np, nbfftconv as nb" + CONVOLVE + "convolve()"
    done = run_python(code, NUMBA_DISABLE_JIT=value)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: ") and "NUMBA_DISABLE_JIT" in done.stderr
