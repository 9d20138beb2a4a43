"""Where the package keeps files between processes: compiled kernels, FFTW's wisdom, what was measured."""

import functools
import os
from pathlib import Path

from numba.misc.appdirs import AppDirs


@functools.cache
def _absolute(override: str | None) -> Path | None:
    path = override or AppDirs(appname="nbfftconv", appauthor=False).user_cache_dir
    path = os.path.expanduser(path)
    if override and not path.startswith("~"):
        path = os.path.abspath(path)  # once: the working directory may change
    return Path(path) if os.path.isabs(path) else None


def cache_directory() -> Path | None:
    """Return the folder of everything that is kept on disk; it need not exist, nor be writable.

    ``NBFFTCONV_CACHE_DIR`` overrides the platform's user cache folder.

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
    return _absolute(os.environ.get("NBFFTCONV_CACHE_DIR"))
