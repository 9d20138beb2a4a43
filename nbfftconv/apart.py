"""Work that no signal handler may end in its midst, such as compilation by Numba.

An exception that a handler raises there could leave locks of others held, or be dropped, as Python does in finalizers.
Handlers run in the main thread only, so such work is done in another one, for which the main thread waits. Whoever
interrupts it goes on at once; the work is finished all the same.
"""

import _thread
import atexit
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def run(lock: AbstractContextManager, function: Callable[[], Any]) -> Any:
    """Return what the function returns, called under a lock, and not in the main thread."""
    if threading.get_ident() != threading.main_thread().ident:
        with lock:
            return function()
    results: list[Any] = []
    errors: list[BaseException] = []
    finished = _thread.allocate_lock()
    finished.acquire()

    def work() -> None:
        try:
            with lock:
                results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            finished.release()

    try:  # not by a `threading.Thread`, whose methods an exception could leave half done
        _thread.start_new_thread(work, ())
    except RuntimeError:  # there are too many, or the interpreter ends
        work()
    with finished:  # an operation of a lock waits until it is released, or a handler raises an exception
        pass
    if errors:
        raise errors.pop()
    return results.pop()


def finish_at_exit(lock: AbstractContextManager) -> None:
    """Let the interpreter end after the work under a lock, which may be in libraries that are unloaded then."""

    def wait() -> None:
        with lock:
            pass

    atexit.register(wait)
