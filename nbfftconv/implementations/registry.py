"""The implementations that there are: the one place that names them all."""

from typing import Any

from nbfftconv.implementations import Implementation, direct, fft

_implementations: dict[str, Implementation[Any, Any]] = {}
_all: tuple[Implementation[Any, Any], ...] = ()
_algorithms: tuple[str, ...] = ()


def register(implementation: Implementation[Any, Any]) -> None:
    """Let the planner choose an implementation, and users name it; of equal costs, the one that was registered first.

    Raises
    ------
    ValueError
        If its name is taken.
    """
    if implementation.name in ("auto", *_implementations):
        raise ValueError(f"the name {implementation.name!r} is taken")
    _implementations[implementation.name] = implementation
    _list()


def remove(name: str) -> None:
    """Take an implementation away again; its plans cannot be run any more.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    get(name)
    del _implementations[name]
    _list()


def _list() -> None:
    global _all, _algorithms
    _all, _algorithms = tuple(_implementations.values()), ("auto", *_implementations)


def get(name: str) -> Implementation[Any, Any]:
    """Return the implementation of a name, such as a plan's `algorithm`.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return _implementations[name]
    except KeyError:
        raise ValueError(f"algorithm must be one of {', '.join(_implementations)}, got {name!r}") from None


def candidates(algorithm: str = "auto") -> tuple[Implementation[Any, Any], ...]:
    """Return the implementations that a plan may choose from: the one of a name, or, for "auto", all.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    return _all if algorithm == "auto" else (get(algorithm),)


def algorithms() -> tuple[str, ...]:
    """Return what users may ask for: "auto", and the names of all implementations."""
    return _algorithms


for _implementation in (fft.IMPLEMENTATION, direct.IMPLEMENTATION):
    register(_implementation)
