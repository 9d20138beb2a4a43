"""Where the package keeps files between processes: compiled kernels, FFTW's wisdom, what was measured."""

import os
from pathlib import Path

from numba.misc.appdirs import AppDirs


def cache_directory() -> Path:
    """Return the folder of everything that is kept on disk; it need not exist, nor be writable.

    ``NBFFTCONV_CACHE_DIR`` overrides the platform's user cache folder.
    """
    override = os.environ.get("NBFFTCONV_CACHE_DIR")
    return Path(override or AppDirs(appname="nbfftconv", appauthor=False).user_cache_dir)
