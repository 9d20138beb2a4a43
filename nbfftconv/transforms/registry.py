"""The transforms that there are: the one place that names them all."""

from nbfftconv.transforms import Transform, codelets, fftw, four_step
from nbfftconv.transforms.fftw import (
    get_planning_effort,
    load_wisdom,
    planning_effort_source,
    save_wisdom,
    set_planning_effort,
)

__all__ = [
    "candidates",
    "get",
    "get_planning_effort",
    "load_wisdom",
    "names",
    "planning_effort_source",
    "register",
    "remove",
    "save_wisdom",
    "set_planning_effort",
]

_transforms: dict[str, Transform] = {}
_available: tuple[Transform, ...] = ()


def register(transform: Transform) -> None:
    """Let plans choose a transform; of equal costs, that of the one that was registered first.

    Raises
    ------
    ValueError
        If its name is taken.
    """
    if transform.name in ("auto", *_transforms):
        raise ValueError(f"the name {transform.name!r} is taken")
    _transforms[transform.name] = transform
    _list_available()


def remove(name: str) -> None:
    """Take a transform away again; plans that name it cannot be run any more.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    get(name)
    del _transforms[name]
    _list_available()


def _list_available() -> None:
    global _available
    _available = tuple(transform for transform in _transforms.values() if transform.is_available)


def get(name: str) -> Transform:
    """Return the transform of a name.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return _transforms[name]
    except KeyError:
        raise ValueError(f"transform must be one of {', '.join(_transforms)}, got {name!r}") from None


def candidates(name: str = "auto") -> tuple[Transform, ...]:
    """Return the transforms that a plan may choose from: the one of a name, or, for "auto", all that are available.

    Raises
    ------
    ValueError
        If there is none of this name, or it is not available.
    """
    if name == "auto":
        return _available
    transform = get(name)
    if not transform.is_available:
        raise ValueError(f"the {name} transform is not available here")
    return (transform,)


def names() -> tuple[str, ...]:
    """Return the names of all transforms."""
    return tuple(_transforms)


for _transform in (fftw.TRANSFORM, codelets.TRANSFORM, four_step.TRANSFORM):
    register(_transform)
