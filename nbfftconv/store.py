"""Files that processes share: put in place in one step, checked when read, never in the way of a call.

Machine code is loaded from the cache folder, so whoever may write there may run code here: the folder, what is between
it and a file, and every file have to belong to this user or to root, and nobody else may write them. All is done
relative to folders that were opened and checked, where the platform can do that. Files that a user names are JSON only,
and taken as they are.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding

from nbfftconv import simd
from nbfftconv.paths import cache_directory
from nbfftconv.report import report

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Errors of a file that is not there, or that has no folder to be in.
ABSENT = FileNotFoundError, NotADirectoryError

# Seconds that a process waits for another one's lock, which may be stopped.
_PATIENCE = 5.0
# Temporary files so old, in seconds, are of processes that were killed.
_LEFT_OVER = 3600.0
#: Names of temporary files, and of the folders of machine code.
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
# Folders for other sources, or other versions of what they are compiled with, which are kept beside the one in use.
_KEPT_STAMPS = 3
STAMP = re.compile(r"[0-9a-f]{16}")

_HAS_DESCRIPTORS = {os.open, os.mkdir, os.chmod, os.stat, os.unlink, os.rename} <= os.supports_dir_fd
_FILE = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))  # a pipe would wait for a writer
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)

_refused: set[str] = set()
_timed_out: set[Path] = set()  # locks that were waited for in vain
_used: set[Path] = set()  # folders of the cache that this process has been in


class Refused(FileNotFoundError):
    """A folder or file that others may have written: as if there were none."""


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Raise `Refused` if somebody else could have written what has this status, and report that once."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid not in (os.geteuid(), 0):
        reason = f"it belongs to user {status.st_uid}, not to user {os.geteuid()} or root"
    elif not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = f"others may write it (mode {stat.S_IMODE(status.st_mode):o})"
    else:
        return
    message = f"{os.fspath(path)!r} is not used as a cache: {reason}"
    if message not in _refused:
        _refused.add(message)
        report(message)
    raise Refused(errno.ENOENT, message)


@dataclass(frozen=True)
class Folder:
    """A folder in use; `descriptor` is None where the platform has none for folders.

    In a private one, files have to be ours alone, and links are not followed.
    """

    path: Path
    descriptor: int | None
    is_private: bool

    def _at(self, name: str) -> str:
        return name if self.descriptor is not None else os.path.join(self.path, name)

    def _open(self, name: str, flags: int, mode: int = 0) -> int:
        flags |= _FILE | (_NO_LINK if self.is_private else 0)
        descriptor = os.open(self._at(name), flags, mode, dir_fd=self.descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "no regular file", os.fspath(self.path / name))
            if self.is_private and not flags & os.O_EXCL:
                _check_owner(self.path / name, status)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str) -> bytes:
        """Return what a file holds; OSError if there is none that can be read, and is ours."""
        with open(self._open(name, os.O_RDONLY), "rb") as file:
            return file.read()

    def replace(self, name: str, content: bytes) -> None:
        """Write a file; whoever reads it meanwhile, or when this process is killed, finds the old one or the new one.

        Raises
        ------
        OSError
            If that is not possible; there is the old one then.
        """
        temporary = f".{os.urandom(8).hex()}.tmp"
        mode = 0o600 if self.is_private else 0o666
        descriptor = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            try:
                if self.is_private and hasattr(os, "fchmod"):
                    os.fchmod(descriptor, mode)  # whatever the umask
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
            source, target = self._at(temporary), self._at(name)
            os.replace(source, target, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(self._at(temporary), dir_fd=self.descriptor)
            raise

    def rename(self, name: str, new: str) -> None:
        """Rename a file, over one that has the name."""
        source, target = self._at(name), self._at(new)
        os.replace(source, target, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def names(self) -> list[str]:
        """Return the names of what is in the folder, sorted."""
        return sorted(os.listdir(self.path if self.descriptor is None else self.descriptor))

    def size(self, name: str) -> int | None:
        """Return the bytes of a regular file; None of a link, a folder, and of what is not there any more."""
        try:
            status = os.stat(self._at(name), dir_fd=self.descriptor, follow_symlinks=False)
        except ABSENT:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self._at(name), dir_fd=self.descriptor)

    def remove_folder(self, name: str) -> None:
        """Remove a folder in this one; OSError if there is something in it."""
        os.rmdir(self._at(name), dir_fd=self.descriptor)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Keep other processes out meanwhile; False if the folder cannot be written, or that would take too long.

        Where the file system has no locks, processes go on without: files are whole all the same.
        Hold a lock of `nbfftconv.forking` around it: a child forked meanwhile would keep the file's lock for life.
        """
        try:
            guard = self._open(name, os.O_RDWR | os.O_CREAT, 0o600 if self.is_private else 0o666)
        except OSError:
            yield False
            return
        try:
            yield self._lock(guard, self.path / name)
        finally:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a child about to run another program has the descriptor as well
                    fcntl.flock(guard, fcntl.LOCK_UN)
            os.close(guard)

    @staticmethod
    def _lock(guard: int, path: Path) -> bool:
        if fcntl is None:
            return True
        end = time.monotonic() + (0 if path in _timed_out else _PATIENCE)
        while True:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= end:
                    _timed_out.add(path)
                    return False
            except OSError:  # a file system without locks
                return True
            time.sleep(0.01)


def _enter(path: Path, parent: int | None, make: bool = True) -> tuple[int | None, bool]:
    """Open a folder that must be ours, made if there is none and `make`; tell whether it was made."""
    name = path.name if parent is not None else path
    is_new = False
    if not _HAS_DESCRIPTORS:
        is_new = not path.is_dir()
        if is_new and not make:
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", os.fspath(path))
        path.mkdir(parents=True, exist_ok=True)
        return None, is_new
    try:
        descriptor = os.open(name, _FOLDER | _NO_LINK, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
        is_new = _make(path, name, parent)
        descriptor = os.open(name, _FOLDER | _NO_LINK, dir_fd=parent)
    except OSError:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            raise
        _check_owner(path, status)
        descriptor = os.open(name, _FOLDER, dir_fd=parent)
    try:
        _check_owner(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, is_new


def _make(path: Path, name: str | Path, parent: int | None) -> bool:
    """Make a folder that only we can enter, whatever the umask; False if another process was faster."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if parent is not None or path == path.parent:
            raise
        _make(path.parent, path.parent, None)
        return _make(path, name, parent)
    os.chmod(name, 0o700, dir_fd=parent)
    return True


@contextlib.contextmanager
def cache_folder(*names: str) -> Iterator[Folder]:
    """Open the folder of the cache that these names lead to; it is made if there is none.

    Raises
    ------
    OSError
        If there is no such folder, and none can be made; FileNotFoundError also if others may write it.
    """
    with _cache_folder(names, make=True) as (folder, is_new):
        if folder.path not in _used:
            _used.add(folder.path)
            _tidy(folder.path)
            if is_new and STAMP.fullmatch(folder.path.name):
                _prune(folder.path)
        yield folder


@contextlib.contextmanager
def existing_folder(*names: str) -> Iterator[Folder]:
    """Open the folder of the cache that these names lead to, and change nothing.

    Raises
    ------
    OSError
        If there is none; `Refused` if others may write it.
    """
    with _cache_folder(names, make=False) as (folder, _):
        yield folder


@contextlib.contextmanager
def _cache_folder(names: tuple[str, ...], make: bool) -> Iterator[tuple[Folder, bool]]:
    """Open a folder of the cache; tell whether it was made."""
    path = cache_directory()
    if path is None:
        raise FileNotFoundError(errno.ENOENT, "there is no cache folder")
    descriptor, is_new = _enter(path, None, make)
    try:
        for name in names:
            outer, path = descriptor, path / name
            try:
                descriptor, is_new = _enter(path, outer, make)
            finally:
                if outer is not None and outer != descriptor:
                    os.close(outer)
        yield Folder(path, descriptor, is_private=True), is_new
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _tidy(path: Path) -> None:
    """Mark a folder as used, and remove what killed processes have left in it."""
    with contextlib.suppress(OSError):
        os.utime(path)
        for name in filter(TEMPORARY.fullmatch, os.listdir(path)):
            if time.time() - os.lstat(path / name).st_mtime > _LEFT_OVER:
                os.unlink(path / name)


def _prune(path: Path) -> None:
    """Remove the folders beside a new one that have not been used for the longest time."""
    with contextlib.suppress(OSError):
        others = [path.parent / name for name in os.listdir(path.parent) if STAMP.fullmatch(name)]
        others = sorted((other for other in others if other != path), key=lambda other: -os.lstat(other).st_mtime)
        for other in others[_KEPT_STAMPS:]:
            shutil.rmtree(other, ignore_errors=True)  # which takes no link for a folder


@functools.cache
def fingerprint() -> str:
    """Return what figures of this machine depend on: its CPU, and the width of vectors here."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {llvmlite.binding.get_host_cpu_name()}, vectors of {simd.VECTOR_BYTES} bytes"


@dataclass(frozen=True)
class Document:
    """A JSON file that processes share: `in_cache`, `of_machine`, or one that the user names.

    Attributes
    ----------
    path : Path
        Of a document of the cache the name alone, where there is no cache folder.
    is_cached : bool
        It is in the cache folder.
    """

    path: Path
    is_cached: bool = False

    @classmethod
    def in_cache(cls, name: str) -> "Document":
        """Return the document of this name in the cache folder."""
        return cls((cache_directory() or Path()) / name, is_cached=True)

    @classmethod
    def of_machine(cls, name: str) -> "Document":
        """Return a document of this machine in the cache folder, which machines may share."""
        return cls.in_cache(f"{name}-{hashlib.sha256(fingerprint().encode()).hexdigest()[:8]}.json")

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Folder]:
        if self.is_cached:
            with cache_folder() as folder:
                yield folder
        else:
            yield Folder(self.path.parent, None, is_private=False)

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep other processes out meanwhile; False if the folder cannot be written, or that would take too long."""
        with contextlib.ExitStack() as stack:
            is_locked = False
            with contextlib.suppress(OSError):
                if not self.is_cached:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(self._folder())
                is_locked = stack.enter_context(folder.locked(f"{self.path.name}.lock"))
            yield is_locked

    def read(self) -> Any:
        """Return what the file holds.

        Raises
        ------
        OSError
            If it cannot be read; one of `ABSENT` if there is none, or others may have written it.
        ValueError
            If it is not JSON.
        """
        with self._folder() as folder:
            content = folder.read(self.path.name)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(self.path)!r} is damaged: {error!r}") from error

    def replace(self, content: Any) -> None:
        """Write the file in one step; OSError if that is not possible."""
        with self._folder() as folder:
            folder.replace(self.path.name, (json.dumps(content, indent=1) + "\n").encode())

    def set_aside(self) -> None:
        """Rename the file, to end in ".ignored"."""
        with self._folder() as folder:
            folder.rename(self.path.name, f"{self.path.name}.ignored")

    def read_of_machine(self, format: str) -> dict[str, Any]:
        """Return what `replace_of_machine` wrote.

        Raises
        ------
        OSError, ValueError
            As `read` does; ValueError also if it has another format, or is of another machine.
        """
        content, name = self.read(), os.fspath(self.path)
        found = content.get("format") if isinstance(content, dict) else None
        if found != format:
            raise ValueError(f"{name!r} has the format {found!r}, not {format!r}")
        if content.get("machine") != fingerprint():
            raise ValueError(f"{name!r} is of the machine {content.get('machine')!r}, not {fingerprint()!r}")
        return content

    def replace_of_machine(self, format: str, content: dict[str, Any]) -> None:
        """Write a format, this machine's fingerprint and the content."""
        self.replace({"format": format, "machine": fingerprint(), **content})
