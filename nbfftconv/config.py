"""Everything that can be set for a process, in one place: its setters, and what is in force, with where it comes from.

>>> from nbfftconv import config
>>> before = config.get_scratch_limit()
>>> config.set_scratch_limit(2**28)
>>> config.settings()["scratch_limit"]
Setting(value=268435456, source='set', change='config.set_scratch_limit(nbytes), NBFFTCONV_SCRATCH_BYTES')
>>> config.set_scratch_limit(before)

`show` prints all of it.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nbfftconv import environment, machine, memory, paths, profile, scratch, threads
from nbfftconv.machine import DEFAULT as DEFAULT_MACHINE
from nbfftconv.machine import Machine, get_machine, set_machine
from nbfftconv.memory import get_memory_limit, set_memory_limit
from nbfftconv.paths import cache_directory as get_cache_directory
from nbfftconv.paths import set_cache_directory
from nbfftconv.profile import profile_file as get_profile_file
from nbfftconv.profile import set_profile_file
from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
from nbfftconv.threads import get_num_threads, set_num_threads
from nbfftconv.transforms.registry import (
    get_planning_effort,
    load_wisdom,
    planning_effort_source,
    save_wisdom,
    set_planning_effort,
)

__all__ = [
    "DEFAULT_MACHINE",
    "Machine",
    "Setting",
    "get_cache_directory",
    "get_machine",
    "get_memory_limit",
    "get_num_threads",
    "get_planning_effort",
    "get_profile_file",
    "get_scratch_limit",
    "load_wisdom",
    "save_wisdom",
    "set_cache_directory",
    "set_machine",
    "set_memory_limit",
    "set_num_threads",
    "set_planning_effort",
    "set_profile_file",
    "set_scratch_limit",
    "settings",
    "show",
]


@dataclass(frozen=True)
class Setting:
    """What is in force, and where it comes from.

    Attributes
    ----------
    value : object
        None where there is none: no figures of the machine before the first plan, no cache folder without a home.
    source : {"default", "environment", "profile", "measured", "set"}
        A default of the package, an environment variable, the profile, a measurement of the machine, or a call.
    change : str
        The calls and environment variables that change it.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.settings()["machine"].change
    'config.set_machine(machine)'
    """

    value: Any
    source: str
    change: str


def settings() -> dict[str, Setting]:
    """Return everything in force. Nothing is measured for it; the profile is read.

    Returns
    -------
    dict from str to Setting
        "threads" of all loops, "library_threads" of the stages whose transforms are a library's; "scratch_limit" and
        "memory_limit" in bytes; "planning_effort"; "machine", a `Machine`, or None if nothing was measured yet;
        "profile" and "cache_directory", paths that need not exist.

    Examples
    --------
    >>> from nbfftconv import config
    >>> list(config.settings())[:4]
    ['threads', 'library_threads', 'scratch_limit', 'memory_limit']
    """
    (loops, library), from_where = threads.get_counts(), threads.counts_source()
    figures, measured = machine.known_machine()
    change_threads = f"config.set_num_threads(n, library=m), {environment.OPENMP_THREADS}, nbfftconv tune"
    return {
        "threads": Setting(loops, from_where, change_threads),
        "library_threads": Setting(library, from_where, change_threads),
        "scratch_limit": Setting(
            get_scratch_limit(),
            scratch.scratch_limit_source(),
            f"config.set_scratch_limit(nbytes), {environment.SCRATCH_BYTES}",
        ),
        "memory_limit": Setting(
            get_memory_limit(),
            memory.memory_limit_source(),
            f"config.set_memory_limit(nbytes), {environment.MEMORY_BYTES}",
        ),
        "planning_effort": Setting(
            get_planning_effort(), planning_effort_source(), "config.set_planning_effort(effort)"
        ),
        "machine": Setting(figures, measured, "config.set_machine(machine)"),
        "profile": Setting(
            get_profile_file(), profile.profile_source(), f"config.set_profile_file(path), {environment.PROFILE}"
        ),
        "cache_directory": Setting(
            get_cache_directory(), paths.cache_source(), f"config.set_cache_directory(path), {environment.CACHE_DIR}"
        ),
    }


def show(file: TextIO | None = None) -> None:
    """Print a table of what is in force, where it comes from, and what changes it.

    Parameters
    ----------
    file : text file, optional
        Where it is printed; standard output if it is left out.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.show()  # doctest: +ELLIPSIS
    setting ...value ...from ...changed by
    threads ...
    cache directory ...
    """
    rows = [("setting", "value", "from", "changed by")]
    for name, setting in settings().items():
        rows.append((name.replace("_", " "), _text(name, setting.value), setting.source, setting.change))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]), file=file or sys.stdout)


def _text(name: str, value: Any) -> str:
    if isinstance(value, Machine):
        return f"{value.flops / 1e9:.3g} GFLOP/s, {value.bandwidth / 1e9:.3g} GB/s of one core"
    if value is None:
        return "not measured yet" if name == "machine" else "none: there is no home"
    if name == "profile":
        return f"{os.fspath(value)} ({_content(value)})"
    if name.endswith("limit"):
        return f"{value / 2**20:g} MiB"
    return os.fspath(value) if isinstance(value, Path) else str(value)


def _content(path: Path) -> str:
    """Say what is known from the profile."""
    known = profile.get_profile()
    plans = f"{len(known.winners)} plan{'s' * (len(known.winners) != 1)}"
    if not known.winners and known.threads is None:
        return "nothing measured" if path.exists() else "no file"
    return plans if known.threads is None else f"{plans}, threads"
