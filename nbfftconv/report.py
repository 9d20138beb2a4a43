"""Messages on what is wrong on disk, which never break a call."""

import logging
import sys
import warnings
from types import FrameType

# Whose frames a user cannot do anything about: this package's, and of those that call it back.
_INSIDE = ("nbfftconv", "numba", "contextlib", "functools")


def _first_frame_outside() -> FrameType:
    frame = sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame = frame.f_back
    return frame


def report(message: str) -> None:
    """Warn, at the line that called the package; where warnings are errors, log the message instead."""
    frame = _first_frame_outside()
    place, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    try:
        warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, place, registry)
    except Exception:  # of a filter, or of whatever shows warnings here
        logging.getLogger("nbfftconv").warning(message)
