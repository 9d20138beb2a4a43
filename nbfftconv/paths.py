"""Where the package keeps files between processes: compiled kernels, wisdom, what was measured."""

import functools
import os
from pathlib import Path

from nbfftconv import environment
from nbfftconv.numba_internals import user_cache_folder

_chosen: str | None = None  # as set


@functools.cache
def _absolute(override: str | None) -> Path | None:
    path = os.path.expanduser(override or user_cache_folder("nbfftconv"))
    if override and not path.startswith("~"):
        path = os.path.abspath(path)  # once: the working directory may change
    return Path(path) if os.path.isabs(path) else None


def absolute(what: str, path: str | os.PathLike) -> str:
    """Return a path as it is from any working directory.

    Raises
    ------
    TypeError
        If it is no path of text.
    ValueError
        If it is empty, or begins with ~ and there is no such home.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a path, got {path!r}")
    expanded = os.path.expanduser(name)
    if not name or expanded.startswith("~"):
        raise ValueError(f"{what} must be a path, got {path!r}")
    return os.path.abspath(expanded)


def cache_directory() -> Path | None:
    """Return the folder of everything that is kept on disk; it need not exist, nor be writable.

    `set_cache_directory` and ``NBFFTCONV_CACHE_DIR`` override the platform's user cache folder.

    Returns
    -------
    pathlib.Path or None
        An absolute path; None for a user without a home.

    Examples
    --------
    >>> from nbfftconv.paths import cache_directory
    >>> folder = cache_directory()
    >>> folder is None or folder.is_absolute()
    True
    """
    return _absolute(_chosen or environment.text(environment.CACHE_DIR))


def set_cache_directory(path: str | os.PathLike | None) -> None:
    """Keep files in this folder from now on, in this process.

    What is in memory stays: what was compiled, the machine's figures and the profile, if they were needed before.

    Parameters
    ----------
    path : path-like or None
        Made when it is needed; None for what the environment says.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is empty, or in the home of a user that there is not.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.set_cache_directory("build/cache")
    >>> config.get_cache_directory().name
    'cache'
    >>> config.set_cache_directory(None)
    """
    global _chosen
    _chosen = None if path is None else absolute("the cache folder", path)


def cache_source() -> str:
    """Return where the folder's place comes from: "set", "environment" or "default"."""
    return environment.source(_chosen, environment.CACHE_DIR)
