"""Geometry to plan: asks the implementations what they offer, and takes what the cost model finds cheapest.

Nothing here depends on the number of threads, so that results do not either. Candidates may be measured instead; then
the automatic choice is the winner that the profile remembers.
"""

import functools
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from nbfftconv import autotune, profile
from nbfftconv.channels_last import exchange_seconds
from nbfftconv.geometry import ConvGeometry, Padding, check_flag, numbers, pair
from nbfftconv.implementations import WEIGHT_LIMIT, Candidates, Implementation, Inapplicable, Request, registry
from nbfftconv.machine import get_machine
from nbfftconv.memory import given_memory_limit
from nbfftconv.plan import DIRECTIONS, Choices, ConvPlan, KernelForm, StepPlan
from nbfftconv.report import report
from nbfftconv.scratch import get_scratch_limit
from nbfftconv.transforms import registry as transforms

# Worth measuring is what the model expects to take at most this multiple of its best time.
_MEASURED_FACTOR = 4
# Kernels in a form that a layer has already are used again, if the model expects at most this multiple of the best
# plan's time.
_KEPT_FACTOR = 1.1


def plan_conv1d(
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
        Shape of the input: (batch, channels, length).
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel length).
    stride : int or tuple of int, default 1
        As in `nbfftconv.conv1d`, in samples.
    padding : int, tuple or str, default 0
        As in `nbfftconv.conv1d`: in samples, or a name.
    dilation : int or tuple of int, default 1
        As in `nbfftconv.conv1d`, in samples.
    groups : int, default 1
        As in `nbfftconv.conv1d`.
    direction : {"forward", "grad_weight", "grad_input"}, default "forward"
        The pass: that of `nbfftconv.conv1d`, `nbfftconv.conv1d_weight` or `nbfftconv.conv1d_input`.
    dtype : dtype, default numpy.float32
        What the arrays hold, float32 or float64.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        What computes it.
    transform : str, default "auto"
        What transforms the tiles: one of ``nbfftconv.transforms.registry.names()``.
    tile : int, optional
        Length of the tiles in samples, instead of the planner's choice. At least that of the kernel; with a stride, of
        the kernel's longest phase.
    weight_is_transformed : bool, default False
        The kernels' spectra are kept from call to call, as `nbfftconv.Conv1d` does while it is not `training`.
    measure : bool, default False
        Run the promising candidates on random data, with the current numbers of threads, and remember the fastest in
        the profile, for all automatic plans from now on: `Conv1d`'s, and those of later processes. Both with the
        kernels' spectra kept and made anew. It takes seconds, half a minute for the largest layers, and the memory of
        the arrays.

    Returns
    -------
    ConvPlan
        That of images of one row. Printed, it says what is computed how, and why.

    Raises
    ------
    TypeError
        If a size is not an integer, `dtype` is neither float32 nor float64, or a flag is no bool.
    ValueError
        If the sizes do not make a convolution, a name is unknown, `transform` or `tile` is given with
        ``algorithm="direct"``, `tile` is too small or not of the sides that the transform has, or not even one tile
        fits the scratch limit; if `measure` is given a choice.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv1d((2, 1, 48000), (1, 1, 4800), padding=(4799, 0))
    >>> plan.algorithm, plan.geometry.input_size
    ('fft', (2, 1, 1, 48000))
    """
    passed = direction, dtype, algorithm, transform, tile, weight_is_transformed, measure
    return _plan(1, input_size, weight_size, stride, padding, dilation, groups, *passed)


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
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
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
        If the sizes do not make a convolution, a name is unknown, `transform` or `tile` is given with
        ``algorithm="direct"``, `tile` is too small or not of the sides that the transform has, or not even one tile
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
    passed = direction, dtype, algorithm, transform, tile, weight_is_transformed, measure
    return _plan(2, input_size, weight_size, stride, padding, dilation, groups, *passed)


def plan_conv3d(
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
        Shape of the input: (batch, channels, depth, height, width).
    weight_size : sequence of int
        Shape of the kernels: (out channels, channels / groups, kernel depth, kernel height, kernel width).
    stride : int or tuple of int, default 1
        As in `nbfftconv.conv3d`, in voxels.
    padding : int, tuple or str, default 0
        As in `nbfftconv.conv3d`: in voxels, or a name.
    dilation : int or tuple of int, default 1
        As in `nbfftconv.conv3d`, in voxels.
    groups : int, default 1
        As in `nbfftconv.conv3d`.
    direction : {"forward", "grad_weight", "grad_input"}, default "forward"
        The pass: that of `nbfftconv.conv3d`, `nbfftconv.conv3d_weight` or `nbfftconv.conv3d_input`.
    dtype : dtype, default numpy.float32
        What the arrays hold, float32 or float64.
    algorithm : {"auto", "fft", "winograd", "direct"}, default "auto"
        What computes it.
    transform : str, default "auto"
        What transforms the tiles: one of ``nbfftconv.transforms.registry.names()``.
    tile : int or tuple of int, optional
        Size of the tiles, which are those of planes, as in `plan_conv2d`.
    weight_is_transformed : bool, default False
        The kernels' spectra are kept from call to call, as `nbfftconv.Conv3d` does while it is not `training`.
    measure : bool, default False
        Run the promising candidates on random data, with the current numbers of threads, and remember the fastest in
        the profile, for all automatic plans from now on: `Conv3d`'s, and those of later processes. Both with the
        kernels' spectra kept and made anew. It takes seconds, half a minute for the largest layers, and the memory of
        the arrays.

    Returns
    -------
    ConvPlan
        That of the images that planes of the volumes are. Printed, it says what is computed how, and why.

    Raises
    ------
    TypeError
        If a size is not an integer, `dtype` is neither float32 nor float64, or a flag is no bool.
    ValueError
        If the sizes do not make a convolution, a name is unknown, `transform` or `tile` is given with
        ``algorithm="direct"``, `tile` is too small or not of the sides that the transform has, or not even one tile
        fits the scratch limit; if `measure` is given a choice.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv3d((1, 1, 64, 64, 64), (48, 1, 7, 7, 7), padding=3)
    >>> plan.algorithm, plan.geometry.input_size, plan.geometry.depth.taps
    ('fft', (64, 7, 64, 64), 7)
    """
    passed = direction, dtype, algorithm, transform, tile, weight_is_transformed, measure
    return _plan(3, input_size, weight_size, stride, padding, dilation, groups, *passed)


def _plan(
    axes: int,
    input_size: Any,
    weight_size: Any,
    stride: Any,
    padding: Padding,
    dilation: Any,
    groups: int,
    direction: str,
    dtype: Any,
    algorithm: str,
    transform: str,
    tile: Any,
    weight_is_transformed: bool,
    measure: bool,
) -> ConvPlan:
    """Plan one pass of a convolution of so many spatial axes."""
    given = input_size, weight_size, stride, padding, dilation, groups
    asked = ConvGeometry.from_arguments(*given, axes)
    geometry = asked.of_images
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = None
    if kind not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("algorithm", algorithm, registry.algorithms()),
        ("transform", transform, ("auto", *transforms.names())),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    size = None
    if tile is not None:
        size = (1, *numbers("tile", tile, 1, ("horizontal",))) if axes == 1 else pair("tile", tile, 1)
        if axes == 2 and geometry is not asked:
            size = size[::-1]  # of an image of one column, which is one of a row
    choices: Choices = (
        *((("transform", transform),) if transform != "auto" else ()),
        *((("tile", size),) if size is not None else ()),
    )
    if algorithm != "auto":
        for name, _ in choices:
            if name not in registry.get(algorithm).options:
                value = {"transform": transform, "tile": tile}[name]
                raise ValueError(f"{algorithm} convolution has no {name}s, got {name}={value!r}")
    for name, flag in (("weight_is_transformed", weight_is_transformed), ("measure", measure)):
        check_flag(name, flag)
    dtype = kind.newbyteorder("=")
    if measure:
        if algorithm != "auto" or choices:
            raise ValueError(
                "measure=True is for the automatic choice, "
                f"got algorithm={algorithm!r}, transform={transform!r}, tile={tile!r}"
            )
        race_plans(geometry, direction, dtype)
    return make_plan(geometry, direction, dtype, algorithm, choices, bool(weight_is_transformed))


def race_plans(geometry: ConvGeometry, direction: str, dtype: np.dtype) -> None:
    """Measure what is promising, and remember the winners."""
    candidates = {
        profile.Problem.of(geometry, direction, dtype, is_kept): promising_plans(geometry, direction, dtype, is_kept)
        for is_kept in (False, True)
    }
    if any(len(plans) > 1 for plans in candidates.values()):
        profile.remember(winners=autotune.find_winners(candidates))


def promising_plans(
    geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_transformed: bool
) -> list[ConvPlan]:
    """Return the plans that are worth measuring, first what the cost model chooses."""
    request = Request(*_fields(geometry, direction, dtype, (), False, weight_is_transformed, True))
    found, _ = _offers(request, registry.candidates())
    most = _MEASURED_FACTOR * min(candidates.seconds for _, candidates in found)
    first = _make_plan(registry.candidates(), None, *request)
    plans = [plan for _, candidates in found for plan in candidates.promising(most)]
    return [first, *(plan for plan in plans if (plan.algorithm, plan.choices) != (first.algorithm, first.choices))]


def make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str = "auto",
    choices: Choices = (),
    weight_is_transformed: bool = False,
    transposes: bool = True,
    weight_limit: int = WEIGHT_LIMIT,
) -> ConvPlan:
    """Return the plan for a validated geometry, from memory if it was made before.

    `choices` are options of the implementation, with their values, such as a transform or a tile.
    `weight_is_transformed` says that the kernels are kept as the plan needs them from call to call, so that none pays
    for that; `transposes`, that a gradient at the input may be planned as a forward pass, of other kernels than the
    geometry's own; `weight_limit` is how many bytes they may take in another form, unless `algorithm` is asked for.
    """
    is_asked = algorithm != "auto" or bool(choices)
    implementations, winner = registry.candidates(algorithm), None
    if choices:
        options = dict(choices)
        implementations = tuple(each for each in implementations if set(options).issubset(each.options))
        if "transform" in options:
            name = transforms.get(options["transform"]).algorithm
            implementations = tuple(each for each in implementations if each.name == name) or implementations
    elif transposes and not is_asked and weight_limit >= WEIGHT_LIMIT and not geometry.channels_last:
        winner = _winner(geometry, direction, dtype, weight_is_transformed)
    fields = _fields(geometry, direction, dtype, choices, is_asked, weight_is_transformed, transposes, weight_limit)
    return _make_plan(implementations, winner, *fields)


def plan_channels_last(best: ConvPlan, algorithm: str, weight_is_transformed: bool = True) -> ConvPlan:
    """Return the plan of a forward pass of arrays whose channels come last, given the best one for channels first.

    It is one that reads and writes them as they are, if there is one that costs less than `best` with the exchange of
    both arrays.
    """
    geometry = best.geometry
    try:
        plan = make_plan(
            replace(geometry, channels_last=True),
            "forward",
            best.dtype,
            algorithm,
            weight_is_transformed=weight_is_transformed,
        )
    except ValueError:
        return best
    return plan if plan.seconds < best.seconds + exchange_seconds(geometry, best.dtype) else best


def planning_state() -> tuple[Any, ...]:
    """Return all that plans depend on besides their arguments; it is equal as long as plans are the same."""
    return (
        registry.candidates(),
        transforms.candidates(),
        get_scratch_limit(),
        get_machine(),
        profile.get_profile(),
        given_memory_limit(),
    )


def _fields(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    choices: Choices,
    is_asked: bool,
    weight_is_transformed: bool,
    transposes: bool,
    weight_limit: int = WEIGHT_LIMIT,
) -> tuple[Any, ...]:
    """Return the fields of a `Request`, with all else that a plan depends on.

    A plan is found again by these, which takes less time than to make a request of them.
    """
    return (
        geometry,
        direction,
        dtype,
        choices,
        transforms.candidates(),
        weight_is_transformed,
        transposes,
        is_asked,
        get_scratch_limit(),
        get_machine(),
        weight_limit,
    )


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
    request = Request(*_fields(geometry, "forward", dtype, (), algorithm != "auto", True, True))
    each = (_candidates_for_kept(request, implementation, kept) for implementation in registry.candidates(algorithm))
    cheapest = min(filter(None, each), key=lambda candidates: candidates.seconds, default=None)
    if cheapest is None or cheapest.seconds > _KEPT_FACTOR * best.seconds:
        return best
    figures = f"the model expects {cheapest.seconds * 1e3:.3g} ms with kernels that the layer has already, "
    return cheapest.best(f"{figures}{best.seconds * 1e3:.3g} ms with others, on one core")


def _candidates_for_kept(
    request: Request, implementation: Implementation[Any, Any], kept: Collection[KernelForm]
) -> Candidates | None:
    try:
        return implementation.candidates_for_kept(request, kept)
    except Inapplicable:
        return None


_Offer = tuple[Implementation[Any, Any], Candidates]


def _offers(request: Request, implementations: tuple[Implementation[Any, Any], ...]) -> tuple[list[_Offer], str]:
    """Return the implementations that have plans, with these, and why others have none; ValueError if none has any."""
    found, refusals = [], []
    for implementation in implementations:
        try:
            if request.geometry.channels_last and not implementation.reads_channels_last:
                raise Inapplicable(f"{implementation.name} convolution reads channels first")
            found.append((implementation, implementation.candidates(request)))
        except Inapplicable as reason:
            refusals.append(str(reason))  # not the exception: its frames hold this list, and the arrays of all callers
    why = "; ".join(dict.fromkeys(refusals))
    if not found:
        raise ValueError(why)
    return found, why


@functools.lru_cache(maxsize=1024)
def _make_plan(
    implementations: tuple[Implementation[Any, Any], ...], winner: profile.Winner | None, *fields: Any
) -> ConvPlan:
    request = Request(*fields)
    if winner is not None:
        try:
            return _plan_of_winner(request, winner)
        except ValueError as error:
            report(f"ignored in the profile: {winner} for {request.geometry}: {error}")
    found, why_not = _offers(request, implementations)
    _, cheapest = min(found, key=lambda offer: offer[1].seconds)
    if request.is_asked and len(implementations) == 1:
        return cheapest.best("it was asked for")
    if len(found) == 1 and why_not:
        return cheapest.best(why_not)
    times = (f"{candidates.seconds * 1e3:.3g} ms {implementation.phrase}" for implementation, candidates in found)
    return cheapest.best(f"the model expects {', '.join(times)}, on one core")


def _plan_of_winner(request: Request, winner: profile.Winner) -> ConvPlan:
    """Return the plan that the profile asks for; raise ValueError if it cannot be."""
    request = request._replace(choices=winner.choices, is_asked=True)
    plan = _make_plan(registry.candidates(winner.algorithm), None, *request)
    if plan.weight_bytes > WEIGHT_LIMIT:
        raise ValueError(f"the kernels take {plan.weight_bytes} bytes")
    reason = (
        f"it was measured: {winner.seconds * 1e3:.3g} ms on {winner.threads} thread{'s' * (winner.threads > 1)}, "
        f"the cost model's choice took {winner.model_seconds * 1e3:.3g} ms"
    )
    return replace(plan, reason=reason)


def make_step_plan(geometry: ConvGeometry, dtype: np.dtype, algorithm: str, spectra_limit: int) -> StepPlan:
    """Return the plan of a training step, from memory if it was made before.

    `spectra_limit` is the number of bytes that the input's spectra may take between the passes.
    """
    if algorithm == "auto" and any(_winner(geometry, direction, dtype, False) for direction in DIRECTIONS):
        plans = [make_plan(geometry, direction, dtype) for direction in DIRECTIONS]
        return StepPlan.of(plans, seconds=sum(plan.seconds for plan in plans))
    fields = _fields(geometry, DIRECTIONS[0], dtype, (), algorithm != "auto", False, True)
    return _make_step_plan(registry.candidates(algorithm), spectra_limit, *fields)


@functools.lru_cache(maxsize=256)
def _make_step_plan(
    implementations: tuple[Implementation[Any, Any], ...], spectra_limit: int, *fields: Any
) -> StepPlan:
    """Return the cheapest step: of passes or gradients that share spectra, or of the best plans of each."""
    requests = [Request(*fields)._replace(direction=direction) for direction in DIRECTIONS]
    plans = [_make_plan(implementations, None, *request) for request in requests]
    best = StepPlan.of(plans, seconds=sum(plan.seconds for plan in plans))
    for implementation in implementations:
        best = implementation.step(requests, plans[0], spectra_limit, best.seconds) or best
    return best
