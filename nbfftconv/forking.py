"""What a forked child finds free, whatever another thread of its parent was doing: locks, and properties without one.

A fork takes locks in the reverse order of their registration, so a lock is registered after those that its holders may
wait for.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbfftconv.numba_internals import global_compiler_lock, llvm_lock


def _hold_over_fork(acquire: Callable[[], Any], release: Callable[[], Any]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=acquire, after_in_parent=release, after_in_child=release)


def fork_safe_lock() -> "threading.RLock":
    """Return a reentrant lock; a fork waits for its holder, so what it guards is whole in the child too."""
    lock = threading.RLock()
    _hold_over_fork(lock.acquire, lock.release)
    return lock


if TYPE_CHECKING:
    cached_property = functools.cached_property
else:

    class cached_property(functools.cached_property):
        """That of functools without the lock that it has before Python 3.12, held while the value is computed.

        A child that was forked meanwhile waited for it for ever. Two threads may compute the value.
        """

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            return instance.__dict__.setdefault(self.attrname, self.func(instance))


# Whoever compiles holds both, and a thread that frees what LLVM has made, at any time, the first: a child that
# inherited it from such a thread hung at its next compilation.
_hold_over_fork(llvm_lock.__enter__, llvm_lock.__exit__)
_hold_over_fork(global_compiler_lock.acquire, global_compiler_lock.release)
