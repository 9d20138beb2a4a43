"""The epoch: a number that changes whenever that does on which plans depend besides their arguments.

What was found out in the current epoch, such as the plan of a layer's next call, need not be found out again. Machine,
profile, thread counts, limits of memory and registries begin another one as they are changed.
"""

import itertools

_numbers = itertools.count(1)
#: The number of this epoch.
current = 0


def begin() -> None:
    """Begin another epoch."""
    global current
    current = next(_numbers)
