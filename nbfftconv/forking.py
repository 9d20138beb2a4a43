"""Locks that a forked child finds free, whatever another thread of its parent was doing.

A fork takes locks in the reverse order of their registration, so a lock is registered after those that its holders may
wait for.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from nbfftconv.numba_internals import global_compiler_lock, llvm_lock


def _hold_over_fork(acquire: Callable[[], Any], release: Callable[[], Any]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=acquire, after_in_parent=release, after_in_child=release)


def fork_safe_lock() -> "threading.RLock":
    """Return a reentrant lock; a fork waits for its holder, so what it guards is whole in the child too."""
    lock = threading.RLock()
    _hold_over_fork(lock.acquire, lock.release)
    return lock


# Whoever compiles holds both, and a thread that frees what LLVM has made, at any time, the first: a child that
# inherited it from such a thread hung at its next compilation.
_hold_over_fork(llvm_lock.__enter__, llvm_lock.__exit__)
_hold_over_fork(global_compiler_lock.acquire, global_compiler_lock.release)
