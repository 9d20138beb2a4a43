"""JSON documents that processes of one machine share: named for it, checked when read, replaced in one step."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding

from nbfftconv import simd
from nbfftconv.paths import cache_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


def file_of_machine(name: str) -> Path:
    """Return the file of the cache folder for a document of this machine: machines may share the folder."""
    return cache_directory() / f"{name}-{hashlib.sha256(fingerprint().encode()).hexdigest()[:8]}.json"


@contextlib.contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Keep other processes out meanwhile; tell whether the folder of `file` can be written.

    Hold a lock of `nbfftconv.forking` around it: a child forked meanwhile would keep the file's lock for life.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        guard = open(file.with_name(f"{file.name}.lock"), "w")  # noqa: SIM115
    except OSError:
        yield False
        return
    with guard:
        if fcntl is not None:
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield True


def read(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged: {error!r}") from error


def replace(file: Path, document: Any) -> None:
    """Write a JSON file; whoever reads it meanwhile finds the old one or the new one, whole."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_of_machine(file: Path, format: str) -> dict[str, Any]:
    """Return a document of `replace_of_machine`.

    Raises
    ------
    OSError, ValueError
        As `read` does; ValueError also if it has another format, or is of another machine.
    """
    document = read(file)
    found = document.get("format") if isinstance(document, dict) else None
    if found != format:
        raise ValueError(f"{os.fspath(file)!r} has the format {found!r}, not {format!r}")
    if document.get("machine") != fingerprint():
        raise ValueError(f"{os.fspath(file)!r} is of the machine {document.get('machine')!r}, not {fingerprint()!r}")
    return document


def replace_of_machine(file: Path, format: str, content: dict[str, Any]) -> None:
    """Write a document with its format and this machine's fingerprint."""
    replace(file, {"format": format, "machine": fingerprint(), **content})
