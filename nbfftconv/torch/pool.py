"""PyTorch's pool of threads, in which stages run as well once this package for PyTorch is imported."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from nbfftconv.threads import HostPool, run_in


def share() -> bool:
    """Let stages run in the pool of PyTorch, if it is GNU's and there is a way to it; return whether it is."""
    if sys.platform != "linux":
        return False
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)  # none that it has not loaded itself
            run_in(HostPool(library))
        except (OSError, AttributeError):
            continue
        return True
    return False
