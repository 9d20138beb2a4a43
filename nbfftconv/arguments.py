"""Arguments of the public functions and layers: arrays, names and plans, checked before any work is done."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv.arrays import as_float, as_weak_float, check_shape
from nbfftconv.channels_last import to_channels_first, to_channels_last
from nbfftconv.geometry import ConvGeometry, one_of
from nbfftconv.implementations import registry
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan

ACTIVATIONS = (None, "relu")


def check_activation(activation: Any) -> None:
    """Raise ValueError for an unknown activation."""
    one_of("activation", activation, ACTIVATIONS)


def check_algorithm(algorithm: Any) -> None:
    """Raise ValueError for an unknown algorithm."""
    one_of("algorithm", algorithm, registry.algorithms())


def check_bias(bias: ArrayLike | None, filters: int, dtype: np.dtype) -> np.ndarray | None:
    """Return the bias as an array of shape (filters,), or None; what is no array takes `dtype`."""
    if bias is None:
        return None
    array = as_weak_float("bias", bias, dtype)
    check_shape("bias", array, (filters,), f"{filters} out channels")
    return array


def as_batch(name: str, value: ArrayLike, axes: int, channels_last: bool = False) -> tuple[np.ndarray, bool]:
    """Return an array of `axes` spatial axes with a batch, of 1 if it had none, and whether it had one.

    Its channels come before the spatial axes, also if they came last.
    """
    array = as_float(name, value)
    is_batch = array.ndim == axes + 2
    if not is_batch and array.ndim != axes + 1:
        raise ValueError(
            f"{name} must have {axes + 2} dimensions, or {axes + 1} without a batch, got shape {array.shape}"
        )
    if not is_batch:
        array = array[None]
    return to_channels_first(array) if channels_last else array, is_batch


def first_size(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Return (batch, channels, height, width), given the shape of an array with a batch as its user sees it."""
    return (shape[0], shape[-1], *shape[1:-1]) if channels_last else shape


def size_of(shape: tuple[int, ...], is_batch: bool, channels_last: bool) -> tuple[int, ...]:
    """Return the shape of an array as its user sees it, given (batch, channels, height, width)."""
    batch, channels, *space = shape
    of_image = (*space, channels) if channels_last else (channels, *space)
    return (batch, *of_image) if is_batch else of_image


def without_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array (batch, channels, height, width) that has no channels."""
    batch, _, *space = shape
    return batch, 0, *space


def as_given(array: np.ndarray, is_batch: bool, channels_last: bool) -> np.ndarray:
    """Return an array (batch, channels, height, width) as its user sees it."""
    if channels_last:
        array = to_channels_last(array)
    return array if is_batch else array[0]


def as_kernels(name: str, value: ArrayLike, axes: int) -> np.ndarray:
    """Return kernels of `axes` spatial axes."""
    array = as_float(name, value)
    if array.ndim != axes + 2:
        raise ValueError(f"{name} must have {axes + 2} dimensions, got shape {array.shape}")
    return array


def geometry_for(
    input_size: Any, weight_size: Any, stride: Any, padding: Any, dilation: Any, groups: Any, axes: int
) -> tuple[ConvGeometry, bool]:
    """Return the geometry of arguments, and whether they agree that there is no channel.

    Then it is that of one channel a group, by which all other numbers are checked. The output has no channels either,
    whatever its geometry says: that is how PyTorch has it.
    """
    sizes = input_size, weight_size
    is_empty = all(isinstance(size, (tuple, list)) and len(size) == axes + 2 and size[1] == 0 for size in sizes)
    if is_empty:
        (batch, _, *space), (filters, _, *kernel) = sizes
        sizes = (batch, groups, *space), (filters, 1, *kernel)
    return ConvGeometry.from_arguments(*sizes, stride, padding, dilation, groups, axes), is_empty


def plan_for(
    plan: ConvPlan | None, algorithm: str, geometry: ConvGeometry, direction: str, dtype: np.dtype
) -> ConvPlan:
    """Return the plan that was given, after a check that it is for this, or one for the algorithm."""
    check_algorithm(algorithm)
    if plan is None:
        return make_plan(geometry, direction, dtype, algorithm)
    if not isinstance(plan, ConvPlan):
        raise TypeError(f"plan must be a ConvPlan, got {type(plan).__name__}")
    if algorithm != "auto":
        raise ValueError(f"a plan has its algorithm, {plan.algorithm!r}; with one, algorithm={algorithm!r} is too much")
    if plan.direction != direction:
        raise ValueError(f"the plan is for {plan.direction}, not for {direction}: {plan!r}")
    if plan.dtype != dtype:
        raise ValueError(f"the plan is for {plan.dtype}, the arrays are {dtype}: {plan!r}")
    if plan.geometry != geometry:
        raise ValueError(f"the plan is for another geometry, {plan.geometry}, than the arguments, {geometry}")
    return plan
