"""Convolution by transforms, tile by tile: runs the passes of `nbfftconv.passes`, and puts outliers right afterwards.

1×1 kernels are left to others. Else the cheapest tile is taken whose block of at least one tile fits the scratch limit.
A gradient at the input may be run as the forward pass of its transposed problem; the cheaper of the two is. Of which
transforms, is what implementations differ in: `fft` and `winograd`.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nbfftconv import direct, outliers
from nbfftconv.geometry import FLAT, ConvGeometry, pair
from nbfftconv.implementations import (
    BoundForward,
    Candidates,
    Implementation,
    Inapplicable,
    Kernels,
    Request,
)
from nbfftconv.implementations.tiled_costs import (
    BlockedChoices,
    TiledCost,
    blocked,
    choices_for,
    choices_of,
    interleaving_cost,
    tiled_cost,
    transposition_cost,
)
from nbfftconv.passes.backward import backward as backward_pass
from nbfftconv.passes.context import Spectra
from nbfftconv.passes.forward import Forward
from nbfftconv.passes.forward import forward as forward_pass
from nbfftconv.passes.grad_input import grad_input as grad_input_pass
from nbfftconv.passes.grad_weight import grad_weight as grad_weight_pass
from nbfftconv.passes.plan import SpectraLayout, TiledPlan
from nbfftconv.passes.to_spectra import TransformedWeight, transform_weight
from nbfftconv.plan import Choices, ConvPlan, KernelForm, StepPlan
from nbfftconv.tiling import axis_tiles, problem_sizes
from nbfftconv.transforms import registry
from nbfftconv.transpose import bias_of_phases, interleave, room_for_phases, transpose
from nbfftconv.volumes import fold_input, unfold_output, unfolded

# Worth measuring are the cheapest tiles of each transform.
_MEASURED_TILES = 8


class CostedChoices(NamedTuple):
    """Choices for a pass, what each costs, and the sum of that in seconds, infinite where it does not fit."""

    choices: BlockedChoices
    cost: TiledCost
    seconds: np.ndarray

    @classmethod
    def of(cls, choices: BlockedChoices, fixed: float, request: Request) -> "CostedChoices":
        """Return the choices with their costs, on top of `fixed` seconds."""
        cost = tiled_cost(choices, request.weight_is_transformed, request.machine)
        fits = choices.fits if request.is_asked else choices.fits & (choices.weight <= request.weight_limit)
        return cls(choices, cost, np.where(fits, fixed + sum(cost), math.inf))


@functools.lru_cache(maxsize=4)
def costed_choices(request: Request, algorithm: str) -> list[CostedChoices]:
    """Return all that there is to choose from, last the stages of the pass itself; kept for a moment, for a step."""
    options = dict(request.choices)
    transforms, is_named = request.transforms, "transform" in options
    if is_named:
        registry.get(options["transform"])  # one of a name, not all
        transforms = registry.candidates(options["transform"])
    transforms = tuple(transform for transform in transforms if transform.algorithm == algorithm)
    if not transforms:
        raise Inapplicable(f"the {options['transform']} transform is not for algorithm {algorithm}")
    passes = [(request.geometry, request.direction, 0.0)]
    if (transposed := request.transposed()) is not None:
        is_free = request.weight_is_transformed
        fixed = 0.0 if is_free else transposition_cost(request.geometry, request.dtype, request.machine)
        fixed += interleaving_cost(request.geometry, request.dtype, request.machine)
        passes.insert(0, (transposed, "forward", fixed))
    return [
        CostedChoices.of(choices, fixed, request)
        for geometry, direction, fixed in passes
        for choices in blocked(
            choices_for(geometry, request.dtype, transforms, is_named, options.get("tile"), request.machine),
            direction,
            request.limit,
        )
    ]


class TiledCandidates(Candidates):
    """Tiles of a request in their blockings; of the best one, and of what is worth measuring, plans are made."""

    def __init__(self, request: Request, costed: list[CostedChoices]) -> None:
        self._request, self._costed = request, costed
        each = [(of_pass, int(of_pass.seconds.argmin())) for of_pass in costed if len(of_pass.seconds)]
        self._cheapest = min(each, key=lambda place: place[0].seconds[place[1]], default=(None, 0))
        of_pass, index = self._cheapest
        self.seconds = math.inf if of_pass is None else float(of_pass.seconds[index])

    def best(self, reason: str) -> TiledPlan:
        """Return the plan of the cheapest tile."""
        of_pass, index = self._cheapest
        if of_pass is None:
            raise ValueError(f"no tile is known for {self._request.geometry}")
        return self._plan_of(of_pass.choices, index, reason, self.seconds)

    def promising(self, most: float) -> list[ConvPlan]:
        """Return plans of the cheapest tiles of each transform, each tile in its cheapest blocking."""
        costs = np.concatenate([of_pass.seconds for of_pass in self._costed])
        places = [(of_pass.choices, index) for of_pass in self._costed for index in range(len(of_pass.seconds))]
        plans: list[ConvPlan] = []
        tiles = defaultdict[int, set[tuple[int, ...]]](set)
        for at in np.argsort(costs, kind="stable"):
            if costs[at] > most:
                break
            choices, index = places[at]
            transform, *tile = (int(of_tiles[index]) for of_tiles in choices.tiles[:3])
            # fused or not, transposed or not, as the plan for a tile is chosen
            if len(tiles[transform]) < _MEASURED_TILES and tuple(tile) not in tiles[transform]:
                tiles[transform].add(tuple(tile))
                plans.append(self._plan_of(choices, index, "", float(costs[at])))
        return plans

    def _plan_of(self, choices: BlockedChoices, index: int, reason: str, seconds: float) -> TiledPlan:
        plan = choices.plan(index, reason, seconds)
        return plan if choices.direction == self._request.direction else plan.as_grad_input(self._request.geometry)


@dataclass(frozen=True)
class TiledKernels(Kernels):
    """Kernels with their spectra, or, for a gradient that is run as a forward pass, those of the transposed problem."""

    transformed: TransformedWeight

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return all arrays that are held."""
        transformed = self.transformed
        source = () if transformed.array is self.weight else (transformed.array,)
        return (self.weight, *source, transformed.spectra.array)


@dataclass(frozen=True)
class KeptInput:
    """The input's spectra, kept for the backward pass, and whether outliers were taken as zero."""

    spectra: Spectra
    has_outliers: bool


class _BoundTiled(BoundForward[TiledPlan, TiledKernels]):
    def __init__(self, has_bias: bool, *bound: Any) -> None:
        super().__init__(*bound)
        transformed = self.kernels.transformed
        self._forward = Forward(self.plan, self.geometry, transformed, has_bias, self.relu)
        self._has_outliers = transformed.has_outliers

    def run(self, input: int, bias: int, output: int) -> Any:
        left = self._forward.run(input, bias, output)
        return () if left is None and self._has_outliers else left

    def finish(self, left: Any, input: np.ndarray, bias: np.ndarray | None, output: np.ndarray) -> None:
        if (left and self._forward.finish(left, input, bias, output)) or self._has_outliers:
            _correct_forward(self.plan, self.geometry, input, self.kernels, bias, self.relu, output)


class Tiled(Implementation[TiledPlan, TiledKernels]):
    """Convolution by the transforms of one algorithm, as the planner and the public functions see it."""

    options = ("transform", "tile")

    def candidates(self, request: Request) -> TiledCandidates:
        """Return the tiles to choose from."""
        if not request.is_asked and request.geometry.weight_size[2:] == (1, 1):
            raise Inapplicable("a transform cannot save anything with a 1x1 kernel")
        candidates = TiledCandidates(request, costed_choices(request, self.name))
        if candidates.seconds < math.inf:
            return candidates
        if not request.is_asked:
            raise Inapplicable("no tile fits the limits of memory")
        geometry, tile = request.geometry, dict(request.choices).get("tile")
        raise Inapplicable(
            f"the spectra of one tile{f' of {tile}' if tile else ''} for input {geometry.input_size} and weight "
            f"{geometry.weight_size} do not fit the scratch limit of {request.limit} bytes; "
            "see nbfftconv.config.set_scratch_limit"
        )

    def candidates_for_kept(self, request: Request, forms: Collection[KernelForm]) -> TiledCandidates | None:
        """Return the tiles whose spectra are there."""
        geometry, dtype = request.geometry, request.dtype
        sizes = enumerate(problem_sizes(geometry))
        phases = tuple(axis_tiles(geometry, axis, taps).tap_step for axis, (_, taps) in sizes)
        wanted = self.name, dtype, geometry.groups, False, geometry.weight_size
        layouts = [form.layout for form in forms if form[:-1] == wanted]
        tiles = [
            (layout.transform, layout.tile)
            for layout in layouts
            if isinstance(layout, SpectraLayout) and layout.phases == phases
        ]
        if not tiles:
            return None
        transforms = tuple(transform for transform in request.transforms if transform.algorithm == self.name)
        choices = choices_of(geometry, dtype, transforms, tiles, request.machine)
        costed = [CostedChoices.of(each, 0.0, request) for each in blocked(choices, request.direction, request.limit)]
        candidates = TiledCandidates(request, costed)
        return candidates if candidates.seconds < math.inf else None

    def step(self, requests: Sequence[Request], forward: ConvPlan, spectra_limit: int, below: float) -> StepPlan | None:
        """Return the best step of passes of one tile grid, or of gradients of one after a forward pass of another."""
        geometry = requests[0].geometry
        if geometry.depth != FLAT or (not requests[0].is_asked and geometry.weight_size[2:] == (1, 1)):
            return None
        of_grid, grad_weight, grad_input = step = [costed_choices(request, self.name)[-1] for request in requests]
        keeps = of_grid.choices.input_bytes <= spectra_limit
        gradients = grad_weight.seconds + grad_input.seconds - grad_weight.cost.output
        of_all = of_grid.seconds + gradients - grad_input.cost.weight - keeps * grad_weight.cost.input
        seconds = np.minimum(of_all, forward.seconds + gradients)
        index = int(seconds.argmin()) if len(seconds) else 0
        if not len(seconds) or not seconds[index] < below:
            return None
        is_of_all = bool(of_all[index] <= seconds[index])
        reason = f"the model expects {seconds[index] * 1e3:.3g} ms for a step "
        reason += f"{'that shares' if is_of_all else 'whose gradients share'} spectra, "
        reason += f"{below * 1e3:.3g} ms for one that does not, on one core"
        plans = [of_pass.choices.plan(index, reason, float(of_pass.seconds[index])) for of_pass in step]
        return StepPlan.of(
            plans if is_of_all else [forward, *plans[1:]],
            seconds=float(seconds[index]),
            shares_spectra=True,
            keeps_input_spectra=is_of_all and bool(keeps[index]),
        )

    def read_choices(self, written: dict[str, Any]) -> Choices:
        """Return transform and tile, of which a file has both."""
        if set(written) != set(self.options) or not isinstance(written["transform"], str):
            raise ValueError(f"{self.name} needs a transform and a tile")
        return ("transform", written["transform"]), ("tile", pair("tile", written["tile"], 1))

    def prepare(self, plan: TiledPlan, weight: np.ndarray) -> TiledKernels:
        """Transform kernels, or transpose and transform them."""
        source = transpose(weight, plan.geometry) if plan.is_transposed else weight
        return TiledKernels(weight, transform_weight(plan.run_as, source))

    def forward(
        self,
        plan: TiledPlan,
        geometry: ConvGeometry,
        input: np.ndarray,
        kernels: TiledKernels,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
        keep: bool = False,
    ) -> KeptInput | None:
        """Convolve `input` into `output`; with `keep`, return the input's spectra."""
        transformed = kernels.transformed
        has_outliers, spectra = forward_pass(plan, geometry, input, transformed, bias, relu, output, keep)
        if has_outliers or transformed.has_outliers:
            _correct_forward(plan, geometry, input, kernels, bias, relu, output)
        return KeptInput(spectra, has_outliers) if spectra is not None else None

    def bind(
        self, plan: TiledPlan, geometry: ConvGeometry, kernels: TiledKernels, has_bias: bool, relu: bool
    ) -> BoundForward:
        """Return what does the same as `forward` that keeps nothing, for many calls."""
        return _BoundTiled(has_bias, self, plan, geometry, kernels, relu)

    def grad_input(
        self,
        plan: TiledPlan,
        geometry: ConvGeometry,
        kernels: TiledKernels,
        grad_output: np.ndarray,
        result: np.ndarray,
    ) -> None:
        """Compute the gradient with respect to the input into `result`."""
        transformed = kernels.transformed
        if geometry.depth != FLAT and not plan.is_transposed:
            images, g = unfolded(geometry), unfold_output(geometry, grad_output)
            of_images = np.empty(images.input_size, plan.dtype)
            self.grad_input(replace(plan, geometry=images), images, kernels, g, of_images)
            fold_input(geometry, of_images, result)
            return
        if plan.is_transposed:
            has_outliers = self._run_transposed(plan, geometry, kernels, grad_output, None, False, result)
        else:
            has_outliers = grad_input_pass(plan, geometry, transformed, grad_output, result)
        if has_outliers or transformed.has_outliers:
            _correct_grad_input(geometry, kernels.weight, grad_output, result)

    def conv_transpose(
        self,
        plan: TiledPlan,
        geometry: ConvGeometry,
        kernels: TiledKernels,
        input: np.ndarray,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
    ) -> None:
        """Compute a transposed convolution; bias and clipping are the transposed problem's, if that does it all."""
        is_done = False
        if plan.is_transposed and not kernels.transformed.has_outliers:
            is_done = not self._run_transposed(plan, geometry, kernels, input, bias, relu, output)
        if not is_done:
            super().conv_transpose(plan, geometry, kernels, input, bias, relu, output)

    @staticmethod
    def _run_transposed(
        plan: TiledPlan,
        geometry: ConvGeometry,
        kernels: TiledKernels,
        input: np.ndarray,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
    ) -> bool:
        """Run the transposed problem; tell whether there were outliers, taken as zero."""
        run, of_phases = plan.run_as.resized(plan.run_geometry(geometry)), bias_of_phases(geometry, bias)
        phases = room_for_phases(geometry, run.geometry, output)
        has_outliers, _ = forward_pass(run, run.geometry, input, kernels.transformed, of_phases, relu, phases)
        interleave(geometry, run.geometry, phases, output)
        return has_outliers

    def grad_weight(
        self, plan: TiledPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        """Compute the gradient with respect to the kernels into `result`."""
        if grad_weight_pass(plan, geometry, input, grad_output, result):
            _correct_grad_weight(geometry, input, grad_output, result)

    def backward(
        self,
        plan: TiledPlan,
        geometry: ConvGeometry,
        input: np.ndarray,
        kept: KeptInput | None,
        kernels: TiledKernels,
        grad_output: np.ndarray,
        grad_input: np.ndarray,
        grad_weight: np.ndarray,
    ) -> np.ndarray:
        """Compute the gradients with respect to input and kernels, and return that with respect to the bias.

        `plan` is that for the kernels, whose blocks are larger.
        """
        spectra = None if kept is None else kept.spectra
        has_outliers, grad_bias = backward_pass(
            plan, geometry, input, spectra, kernels.transformed, grad_output, grad_input, grad_weight
        )
        if has_outliers or kernels.transformed.has_outliers:
            _correct_grad_input(geometry, kernels.weight, grad_output, grad_input)
        if has_outliers or (kept is not None and kept.has_outliers):
            _correct_grad_weight(geometry, input, grad_output, grad_weight)
        if has_outliers:
            with np.errstate(all="ignore"):  # inf - inf is NaN
                grad_bias = grad_output.sum(axis=(0, 2, 3), dtype=np.float64)
        return grad_bias


def _correct_forward(
    plan: TiledPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    kernels: TiledKernels,
    bias: np.ndarray | None,
    relu: bool,
    output: np.ndarray,
) -> None:
    """Add the products of outliers, or convolve directly where these are many."""
    corrections = outliers.of_forward(geometry, input, kernels.weight) if geometry.depth == FLAT else None
    if corrections is None:
        direct.forward(geometry, input, kernels.weight, None, bias, relu, output)
        return
    if relu:  # what is to be added comes before the clipping
        forward_pass(plan, geometry, input, kernels.transformed, bias, False, output)
    corrections.add_to(output)
    if relu:
        np.maximum(output, 0, out=output)


def _correct_grad_input(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> None:
    """Add the products of outliers, or convolve directly where these are many."""
    corrections = outliers.of_grad_input(geometry, weight, grad_output) if geometry.depth == FLAT else None
    transposed = geometry.transposed()
    if corrections is not None:
        corrections.add_to(result)
    elif transposed is not None and np.isfinite(weight).all():
        phases = room_for_phases(geometry, transposed, result)
        direct.forward(transposed, grad_output, transpose(weight, geometry), None, None, False, phases)
        interleave(geometry, transposed, phases, result)
    else:
        direct.grad_input(geometry, result, weight, grad_output)


def _correct_grad_weight(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> None:
    """Add the products of outliers, or convolve directly where these are many."""
    corrections = outliers.of_grad_weight(geometry, input, grad_output) if geometry.depth == FLAT else None
    if corrections is None:
        direct.grad_weight(geometry, input, result, grad_output)
    else:
        corrections.add_to(result)
