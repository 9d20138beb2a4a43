"""The transforms that there are: the one place that names them all."""

from nbfftconv.registry import Registry
from nbfftconv.transforms import Transform, codelets, fftw, four_step, row_codelets, row_four_step, winograd
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

_registry = Registry[Transform]("transform")
register, remove, get = _registry.register, _registry.remove, _registry.get
candidates, names = _registry.candidates, _registry.names

for _transform in (
    fftw.TRANSFORM,
    codelets.TRANSFORM,
    row_codelets.TRANSFORM,
    four_step.TRANSFORM,
    row_four_step.TRANSFORM,
    winograd.TRANSFORM,
):
    register(_transform)
