"""Locks that a forked child finds free, whatever another thread of its parent was doing."""

import os
import threading


def fork_safe_lock() -> "threading.RLock":
    """Return a reentrant lock; a fork waits for its holder, so what it guards is whole in the child too."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
