"""The implementations that there are: the one place that names them all."""

from typing import Any

from nbfftconv.implementations import Implementation, direct, fft, winograd
from nbfftconv.registry import Registry

_registry = Registry[Implementation[Any, Any]]("algorithm")
register, remove, get = _registry.register, _registry.remove, _registry.get
candidates, names = _registry.candidates, _registry.names

for _implementation in (fft.IMPLEMENTATION, winograd.IMPLEMENTATION, direct.IMPLEMENTATION):
    register(_implementation)


def algorithms() -> tuple[str, ...]:
    """Return what users may ask for: "auto", and the names of all implementations."""
    return ("auto", *names())
