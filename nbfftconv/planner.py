"""Geometry to plan: algorithm, tile, transform and blocking, by a cost model.

1×1 kernels are left to direct convolution. Else the cheapest tile is taken whose block of at least one tile fits the
scratch limit and whose kernels' spectra fit `WEIGHT_SPECTRA_LIMIT`. Nothing here depends on the number of threads, so
that results do not either. A gradient at the input may be planned as the forward pass of its transposed problem: direct
convolution always is where it can be, by FFT the cheaper of the two.

Candidates may be measured instead; then the automatic choice is the winner that the profile remembers.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nbfftconv import measure as measuring
from nbfftconv import profile
from nbfftconv.costs import (
    Choices,
    FftCost,
    blocked,
    choices_for,
    choices_of,
    direct_cost,
    fft_cost,
    transposition_cost,
)
from nbfftconv.direct import grad_weight_bytes, packed_bytes, scratch_bytes
from nbfftconv.geometry import ConvGeometry, Padding, pair
from nbfftconv.machine import Machine, get_machine
from nbfftconv.plan import DIRECTIONS, ConvPlan, KernelForm, StepPlan
from nbfftconv.report import report
from nbfftconv.scratch import get_scratch_limit
from nbfftconv.tiling import axis_tiles, problem_sizes
from nbfftconv.transforms import Transform, registry

ALGORITHMS = ("auto", "fft", "direct")

#: The automatic choice never needs more memory for the spectra of the kernels, in bytes.
WEIGHT_SPECTRA_LIMIT = 2**32
# Worth measuring are the cheapest tiles of each transform, if the model expects at most this multiple of its best.
_MEASURED_TILES = 8
_MEASURED_FACTOR = 4
# Kernels in a form that a layer has already are used again, if the model expects at most this multiple of the best
# plan's time.
_KEPT_FACTOR = 1.1


def plan_conv2d(
    input_size: Any,
    weight_size: Any,
    stride: Any = 1,
    padding: Padding = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    direction: str = "forward",
    dtype: Any = np.float32,
    algorithm: str = "auto",
    transform: str = "auto",
    tile: Any = None,
    weight_is_transformed: bool = False,
    measure: bool = False,
) -> ConvPlan:
    """Plan one pass of a convolution, to look at the decision or to pass it as `plan`.

    Parameters
    ----------
    input_size : sequence of int
        Shape of the input: (batch, channels, height, width).
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel height, kernel width).
    stride : int or tuple of int, default 1
        As in `nbfftconv.conv2d`, in pixels: one number, or (vertical, horizontal).
    padding : int, tuple or str, default 0
        As in `nbfftconv.conv2d`: in pixels, or a name.
    dilation : int or tuple of int, default 1
        As in `nbfftconv.conv2d`, in pixels: one number, or (vertical, horizontal).
    groups : int, default 1
        As in `nbfftconv.conv2d`.
    direction : {"forward", "grad_weight", "grad_input"}, default "forward"
        The pass: that of `nbfftconv.conv2d`, `nbfftconv.conv2d_weight` or `nbfftconv.conv2d_input`.
    dtype : dtype, default numpy.float32
        What the arrays hold, float32 or float64.
    algorithm : {"auto", "fft", "direct"}, default "auto"
        What computes it.
    transform : str, default "auto"
        What transforms the tiles: one of ``nbfftconv.transforms.registry.names()``.
    tile : int or pair of int, optional
        Size of the tiles in samples, one number or (height, width), instead of the planner's choice. At least as large
        as the kernel; with strides, as the kernel's longest phase.
    weight_is_transformed : bool, default False
        The kernels' spectra are kept from call to call, as `nbfftconv.Conv2d` does while it is not `training`.
    measure : bool, default False
        Run the promising candidates on random data, with the current numbers of threads, and remember the fastest in
        the profile, for all automatic plans from now on: `Conv2d`'s, and those of later processes. Both with the
        kernels' spectra kept and made anew. It takes seconds, half a minute for the largest layers, and the memory of
        the arrays.

    Returns
    -------
    ConvPlan
        Printed, it says what is computed how, and why.

    Raises
    ------
    TypeError
        If a size is not an integer, `dtype` is neither float32 nor float64, or a flag is no bool.
    ValueError
        If the sizes do not make a convolution, a name is unknown, `tile` is too small, given with
        ``algorithm="direct"`` or not of the sides that the transform has, or not even one tile
        fits the scratch limit; if `measure` is given a choice.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((2, 8, 40, 40), (8, 8, 5, 5), algorithm="fft", transform="codelet", tile=16)
    >>> plan.algorithm, plan.tile, plan.tiles  # tiles of 16 × 16 samples give 12 × 12 outputs each
    ('fft', (16, 16), (3, 3))
    >>> x, w = np.ones((2, 8, 40, 40), np.float32), np.ones((8, 8, 5, 5), np.float32)
    >>> nbfftconv.conv2d(x, w, plan=plan).shape
    (2, 8, 36, 36)
    """
    geometry = ConvGeometry.from_arguments(input_size, weight_size, stride, padding, dilation, groups)
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = None
    if kind not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("algorithm", algorithm, ALGORITHMS),
        ("transform", transform, ("auto", *registry.names())),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    size = None if tile is None else pair("tile", tile, 1)
    if size is not None and algorithm == "direct":
        raise ValueError(f"direct convolution has no tiles, got tile={tile!r}")
    for name, value in (("weight_is_transformed", weight_is_transformed), ("measure", measure)):
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    dtype = kind.newbyteorder("=")
    if measure:
        if not (algorithm == "auto" and transform == "auto" and size is None):
            raise ValueError(
                "measure=True is for the automatic choice, "
                f"got algorithm={algorithm!r}, transform={transform!r}, tile={tile!r}"
            )
        _measure(geometry, direction, dtype)
    return make_plan(geometry, direction, dtype, algorithm, transform, size, bool(weight_is_transformed))


def _measure(geometry: ConvGeometry, direction: str, dtype: np.dtype) -> None:
    """Measure what is promising, and remember the winners."""
    candidates = {
        profile.Problem.of(geometry, direction, dtype, is_kept): _promising(geometry, direction, dtype, is_kept)
        for is_kept in (False, True)
    }
    if any(len(plans) > 1 for plans in candidates.values()):
        profile.remember(winners=measuring.find_winners(candidates))


def _promising(geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_transformed: bool) -> list[ConvPlan]:
    """Return the plans that are worth measuring, first what the cost model chooses."""
    limit, machine = get_scratch_limit(), get_machine()
    transforms = registry.candidates()
    problem = geometry, direction, dtype, "auto", transforms, None, weight_is_transformed, True, limit, machine
    first = _make_plan(*problem)
    if geometry.weight_size[2:] == (1, 1):
        return [first]
    plans = [_direct_plan(geometry, direction, dtype, True, weight_is_transformed, machine, "")]
    costed = _costed(*problem)
    costs = np.concatenate([of_way.seconds for of_way in costed])
    places = [(of_way.choices, index) for of_way in costed for index in range(len(of_way.seconds))]
    most = _MEASURED_FACTOR * min(plans[0].seconds, costs.min(initial=math.inf))
    tiles = defaultdict(set)
    for at in np.argsort(costs, kind="stable"):
        if costs[at] > most:
            break
        choices, index = places[at]
        transform, *tile = (int(of_tiles[index]) for of_tiles in choices.tiles[:3])
        # fused or not, transposed or not, as the plan for a tile is chosen
        if len(tiles[transform]) < _MEASURED_TILES and tuple(tile) not in tiles[transform]:
            tiles[transform].add(tuple(tile))
            plans.append(_fft_plan(geometry, direction, choices, index, costs[at], ""))
    return [first, *(plan for plan in plans if plan.seconds <= most)]


def make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str = "auto",
    transform: str = "auto",
    tile: tuple[int, int] | None = None,
    weight_is_transformed: bool = False,
    transposes: bool = True,
) -> ConvPlan:
    """Return the plan for a validated geometry, from memory if it was made before.

    `weight_is_transformed` says that the kernels' spectra are kept from call to call, so that none pays for them;
    `transposes`, that a gradient at the input may be planned as a forward pass, of other spectra than those of the
    geometry's own.
    """
    winner = None
    if algorithm == "auto" and not (transform == "auto" and tile is None):
        algorithm = "fft"  # which has transforms and tiles
    if transposes and algorithm == "auto":
        winner = _winner(geometry, direction, dtype, weight_is_transformed)
    transforms = registry.candidates(transform)
    problem = geometry, direction, dtype, algorithm, transforms, tile, weight_is_transformed, transposes
    return _make_plan(*problem, get_scratch_limit(), get_machine(), winner)


def _winner(
    geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_transformed: bool
) -> profile.Winner | None:
    """Return what the profile remembers."""
    winners = profile.get_profile().winners
    return winners.get(profile.Problem.of(geometry, direction, dtype, weight_is_transformed)) if winners else None


def make_plan_for_kept(best: ConvPlan, algorithm: str, kept: Collection[KernelForm]) -> ConvPlan:
    """Return the plan of a forward pass for a layer that keeps the kernels in some forms, given the best plan.

    It is the cheapest that needs no other form, unless the best is much cheaper: else a layer that meets images of many
    sizes would make spectra for each. What was measured goes first.
    """
    geometry, dtype = best.geometry, best.dtype
    if best.kernel_form in kept or (algorithm == "auto" and _winner(geometry, "forward", dtype, True) is not None):
        return best
    plan = _plan_for_kept(geometry, dtype, algorithm, kept, registry.candidates(), get_scratch_limit(), get_machine())
    if plan is None or plan.seconds > _KEPT_FACTOR * best.seconds:
        return best
    figures = f"the model expects {plan.seconds * 1e3:.3g} ms with kernels that the layer has already, "
    return replace(plan, reason=f"{figures}{best.seconds * 1e3:.3g} ms with others, on one core")


def _plan_for_kept(
    geometry: ConvGeometry,
    dtype: np.dtype,
    algorithm: str,
    kept: Collection[KernelForm],
    transforms: tuple[Transform, ...],
    limit: int,
    machine: Machine,
) -> ConvPlan | None:
    """Return the cheapest plan for kernels in one of the forms, None if there is none."""
    phases = tuple(axis_tiles(geometry, axis, taps).tap_step for axis, (_, taps) in enumerate(problem_sizes(geometry)))
    tiles = [
        (form.transform, form.tile)
        for form in kept
        if (form.dtype, form.groups, form.phases, form.is_transposed) == (dtype, geometry.groups, phases, False)
    ]
    plan = None
    if tiles and algorithm != "direct":
        choices = choices_of(geometry, dtype, transforms, tiles, machine)
        costed = [_Costed.of(each, 0.0, True, algorithm, machine) for each in blocked(choices, "forward", limit)]
        cost, *place = _cheapest(costed)
        plan = None if cost == math.inf else _fft_plan(geometry, "forward", *place, cost, "")
    if algorithm == "auto":
        direct = _direct_plan(geometry, "forward", dtype, True, True, machine, "")
        if direct.kernel_form in kept and (plan is None or direct.seconds <= plan.seconds):
            return direct
    return plan


@functools.lru_cache(maxsize=1024)
def _make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str,
    transforms: tuple[Transform, ...],
    tile: tuple[int, int] | None,
    weight_is_transformed: bool,
    transposes: bool,
    limit: int,
    machine: Machine,
    winner: profile.Winner | None = None,
) -> ConvPlan:
    problem = geometry, direction, dtype
    direct_problem = *problem, transposes, weight_is_transformed, machine
    if algorithm == "direct":
        return _direct_plan(*direct_problem, "it was asked for")
    if winner is not None:
        try:
            return _plan_of_winner(*problem, winner, weight_is_transformed, limit, machine)
        except ValueError as error:
            report(f"ignored in the profile: {winner} for {geometry}: {error}")
    if algorithm == "auto" and geometry.weight_size[2:] == (1, 1):
        return _direct_plan(*direct_problem, "an FFT cannot save anything with a 1x1 kernel")
    costed = _costed(*problem, algorithm, transforms, tile, weight_is_transformed, transposes, limit, machine)
    cost, *place = _cheapest(costed)
    if cost == math.inf:
        if algorithm != "auto":
            raise ValueError(
                f"the spectra of one tile{f' of {tile}' if tile else ''} for input {geometry.input_size} and weight "
                f"{geometry.weight_size} do not fit the scratch limit of {limit} bytes; "
                "see nbfftconv.config.set_scratch_limit"
            )
        return _direct_plan(*direct_problem, "no tile fits the limits of memory")
    if algorithm != "auto":
        return _fft_plan(geometry, direction, *place, cost, "it was asked for")
    direct = _direct_plan(*direct_problem, "")
    figures = f"the model expects {cost * 1e3:.3g} ms by FFT, {direct.seconds * 1e3:.3g} ms direct, on one core"
    if direct.seconds <= cost:
        return replace(direct, reason=figures)
    return _fft_plan(geometry, direction, *place, cost, figures)


def _plan_of_winner(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    winner: profile.Winner,
    weight_is_transformed: bool,
    limit: int,
    machine: Machine,
) -> ConvPlan:
    """Return the plan that the profile asks for; raise ValueError if it cannot be."""
    reason = (
        f"it was measured: {winner.seconds * 1e3:.3g} ms on {winner.threads} thread{'s' * (winner.threads > 1)}, "
        f"the cost model's choice took {winner.model_seconds * 1e3:.3g} ms"
    )
    if winner.algorithm == "direct":
        return _direct_plan(geometry, direction, dtype, True, weight_is_transformed, machine, reason)
    registry.get(winner.transform)  # one, not all
    chosen = "fft", registry.candidates(winner.transform), winner.tile
    plan = _make_plan(geometry, direction, dtype, *chosen, weight_is_transformed, True, limit, machine)
    if plan.weight_spectra_bytes > WEIGHT_SPECTRA_LIMIT:
        raise ValueError(f"the kernels' spectra take {plan.weight_spectra_bytes} bytes")
    return replace(plan, reason=reason)


def make_step_plan(geometry: ConvGeometry, dtype: np.dtype, algorithm: str, spectra_limit: int) -> StepPlan:
    """Return the plan of a training step, from memory if it was made before.

    `spectra_limit` is the number of bytes that the input's spectra may take between the passes.
    """
    is_measured = algorithm == "auto" and any(_winner(geometry, each, dtype, False) for each in DIRECTIONS)
    problem = geometry, dtype, algorithm, registry.candidates(), spectra_limit, get_scratch_limit(), get_machine()
    if is_measured or (step := _shared_step(*problem)) is None:
        return StepPlan(*(make_plan(geometry, direction, dtype, algorithm) for direction in DIRECTIONS))
    return step


@functools.lru_cache(maxsize=256)
def _shared_step(
    geometry: ConvGeometry,
    dtype: np.dtype,
    algorithm: str,
    transforms: tuple[Transform, ...],
    spectra_limit: int,
    limit: int,
    machine: Machine,
) -> StepPlan | None:
    """Return the cheapest step of passes that share spectra, None if passes that share nothing are cheaper."""
    if algorithm == "direct" or (algorithm == "auto" and geometry.weight_size[2:] == (1, 1)):
        return None
    rest = dtype, algorithm, transforms, None, False, True, limit, machine
    no_winner = None  # said, so that `make_plan` finds them
    apart = sum(_make_plan(geometry, direction, *rest, no_winner).seconds for direction in DIRECTIONS)
    forward, grad_weight, grad_input = step = [_costed(geometry, direction, *rest)[-1] for direction in DIRECTIONS]
    keeps = forward.choices.input_bytes <= spectra_limit
    shared = grad_weight.cost.output + grad_input.cost.weight + keeps * grad_weight.cost.input
    seconds = forward.seconds + grad_weight.seconds + grad_input.seconds - shared
    index = int(seconds.argmin())
    if not seconds[index] < apart:
        return None
    reason = f"the model expects {seconds[index] * 1e3:.3g} ms for a step that shares spectra, "
    reason += f"{apart * 1e3:.3g} ms for one that does not, on one core"
    plans = (
        _fft_plan(geometry, direction, of_pass.choices, index, of_pass.seconds[index], reason)
        for direction, of_pass in zip(DIRECTIONS, step, strict=True)
    )
    return StepPlan(*plans, shares_spectra=True, keeps_input_spectra=bool(keeps[index]))


_Way = tuple[ConvGeometry, str]


def _ways(geometry: ConvGeometry, direction: str, transposes: bool) -> list[_Way]:
    """Return the passes, each a geometry and a direction, that compute the result; first that of direct convolution."""
    transposed = geometry.transposed() if transposes and direction == "grad_input" else None
    return [*([] if transposed is None else [(transposed, "forward")]), (geometry, direction)]


def _direct_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    transposes: bool,
    weight_is_packed: bool,
    machine: Machine,
    reason: str,
) -> ConvPlan:
    way = _ways(geometry, direction, transposes)[0]
    scratch, weight = 0, 0
    if way[1] == "forward":
        scratch, weight = scratch_bytes(way[0], dtype), packed_bytes(way[0], dtype)
    elif direction == "grad_weight":
        scratch, weight = grad_weight_bytes(geometry, dtype)
    seconds = direct_cost(*way, dtype, weight_is_packed, machine)
    plan = ConvPlan(*way, dtype, "direct", None, None, False, 0, scratch, weight, reason, seconds)
    return plan if way[1] == direction else plan.as_grad_input(geometry)


def _fft_plan(
    geometry: ConvGeometry, direction: str, choices: Choices, index: int, seconds: float, reason: str
) -> ConvPlan:
    plan = choices.plan(index, float(seconds), reason)
    return plan if choices.direction == direction else plan.as_grad_input(geometry)


class _Costed(NamedTuple):
    """Choices for a pass, what each costs, and the sum of that in seconds, infinite where it does not fit."""

    choices: Choices
    cost: FftCost
    seconds: np.ndarray

    @classmethod
    def of(
        cls, choices: Choices, fixed: float, weight_is_transformed: bool, algorithm: str, machine: Machine
    ) -> "_Costed":
        """Return the choices with their costs, on top of `fixed` seconds."""
        cost = fft_cost(choices, weight_is_transformed, machine)
        fits = choices.fits & (choices.weight <= WEIGHT_SPECTRA_LIMIT) if algorithm == "auto" else choices.fits
        return cls(choices, cost, np.where(fits, fixed + sum(cost), math.inf))


@functools.lru_cache(maxsize=4)
def _costed(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str,
    transforms: tuple[Transform, ...],
    tile: tuple[int, int] | None,
    weight_is_transformed: bool,
    transposes: bool,
    limit: int,
    machine: Machine,
) -> list[_Costed]:
    """Return all that there is to choose from, last the stages of the pass itself; kept for a moment, for a step."""
    costed = []
    for way in _ways(geometry, direction, transposes):
        is_transposed = way[1] != direction and not weight_is_transformed
        fixed = transposition_cost(geometry, dtype, machine) if is_transposed else 0.0
        for choices in blocked(choices_for(way[0], dtype, transforms, tile, machine), way[1], limit):
            costed.append(_Costed.of(choices, fixed, weight_is_transformed, algorithm, machine))
    return costed


def _cheapest(costed: list[_Costed]) -> tuple[float, Choices, int]:
    """Return the least cost, where it is, and whose; infinity if there is nothing to choose from."""
    each = ((of_way, int(of_way.seconds.argmin())) for of_way in costed if len(of_way.seconds))
    found = ((float(of_way.seconds[index]), of_way.choices, index) for of_way, index in each)
    return min(found, key=lambda candidate: candidate[0], default=(math.inf, None, 0))
