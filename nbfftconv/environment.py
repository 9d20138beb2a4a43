"""Environment variables that the package heeds: all of them are read here. Nonsense in its own ones is reported."""

import os

from nbfftconv.report import report

#: Folder of what is kept on disk.
CACHE_DIR = "NBFFTCONV_CACHE_DIR"
#: File of the profile.
PROFILE = "NBFFTCONV_PROFILE"
#: Bound on scratch memory, in bytes.
SCRATCH_BYTES = "NBFFTCONV_SCRATCH_BYTES"
#: Bound on what is kept between calls, in bytes.
MEMORY_BYTES = "NBFFTCONV_MEMORY_BYTES"
#: Threads of any OpenMP program, and of any Numba program.
OPENMP_THREADS, NUMBA_THREADS = "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"


def text(name: str) -> str | None:
    """Return the value of a variable as it is; None if there is none, or an empty one."""
    return os.environ.get(name) or None


def source(chosen: str | None, name: str) -> str:
    """Return where a setting comes from that is chosen by a call, or a variable: "set", "environment" or "default"."""
    return "set" if chosen else "environment" if text(name) else "default"


def _positive(text: str) -> int | None:
    """Return the number of at least 1 that a text of digits stands for, else None."""
    return int(text) if text.isdecimal() and len(text) < 19 and int(text) > 0 else None


def number_of_bytes(name: str) -> int | None:
    """Return a variable's number of bytes; None if there is none. Anything else is reported and ignored."""
    found = os.environ.get(name, "").strip()
    number = _positive(found)
    if found and number is None:
        report(f"ignored: {name}={found!r}; it must be a number of bytes of at least 1, digits only")
    return number


def number_of_threads(name: str) -> int | None:
    """Return a variable's first number, None if that is not at least 1; further ones are those of nested loops."""
    return _positive(os.environ.get(name, "").partition(",")[0].strip())
