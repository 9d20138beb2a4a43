"""Direct convolution: products of pixels and taps, no transform. Its loops are in `nbfftconv.direct`.

A gradient at the input is the forward pass of the transposed problem wherever there is one, or of one for every phase
of its pixels.

In seconds of one core, it costs 2 operations a multiply-add, lanes without a pixel included, and the arrays once; for
groups of many filters, also what is gathered, and packing the kernels; its gradients, a
fixed time for every row of pixels under every tap, or, with respect to the kernels of groups of many filters, what is
gathered. Rates are fitted as those of `tiled_costs`.
"""

import functools
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nbfftconv import direct, rates, simd
from nbfftconv import scratch as scratch_memory
from nbfftconv.direct import dense, dense_grad_weight, depthwise, last, split_dense
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import BoundForward, Candidates, Implementation, Inapplicable, Kernels, Request
from nbfftconv.implementations.tiled_costs import interleaving_cost
from nbfftconv.machine import Machine
from nbfftconv.plan import ConvPlan
from nbfftconv.rounding import round_up
from nbfftconv.scratch import Memory
from nbfftconv.transpose import bias_of_phases, interleave, room_for_phases, transpose, transpose_phases

# Fractions of the machine's `flops`: of products for groups of many filters (`dense`), for depthwise windows and in
# gradients, and of scalars that are gathered or packed. Fractions of its `bandwidth`: of
# input and output, which are moved, and a gradient that is written. Seconds of a call, and of a row of pixels under a
# tap.
_RATES = rates.of("direct")


@dataclass(frozen=True, kw_only=True, repr=False)
class DirectPlan(ConvPlan):
    """How a pass is computed by direct convolution.

    Attributes
    ----------
    geometry : ConvGeometry
        The convolution.
    direction : str
        "forward", "grad_weight" or "grad_input".
    dtype : numpy.dtype
        Of all arrays, float32 or float64.
    scratch_bytes : int
        Bytes of memory of each thread, for the pixels that it gathers.
    weight_bytes : int
        Bytes of memory for the packed kernels, or for sums of their gradient that are added up at the end.
    reason : str
        Why this was chosen.
    seconds : float
        Time of a call that the cost model expects on one core.
    is_transposed : bool
        Of "grad_input", whether it is run as a forward pass, that of the transposed problem.
    by_phases : bool
        Of "grad_input", whether it is run as forward passes, one for each phase of the input's pixels.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 1, 1))
    >>> plan.algorithm, plan.reason
    ('direct', 'a transform cannot save anything with a 1x1 kernel')
    """

    algorithm: ClassVar[str] = "direct"

    by_phases: bool = False

    __hash__ = ConvPlan.__hash__

    def _kernel_layout(self) -> Hashable:
        # a gradient does not read kernels as the forward pass does, and that not of all sizes in the same order
        return self.direction, self.weight_bytes, self.geometry.channels_last, self.by_phases

    def _details(self) -> str:
        memory = f"scratch {self.scratch_bytes} bytes a thread, kernels {self.weight_bytes} bytes"
        phases = ", one pass for each phase of the input's pixels" if self.by_phases else ""
        return f"algorithm {self.algorithm}, {memory}{phases}"


@dataclass(frozen=True)
class DirectKernels(Kernels):
    """Kernels in the order of the loops that read them.

    Attributes
    ----------
    weight : numpy.ndarray
        As they came.
    source : numpy.ndarray
        The same, or, for a gradient that is run as a forward pass, those of the transposed problem.
    packed : Memory or None
        What is read instead of `source`; None if that is read as it is.
    phases : tuple of DirectKernels
        Those of each phase, if a gradient has a problem for each.
    """

    source: np.ndarray
    packed: Memory | None
    phases: tuple["DirectKernels", ...] = ()

    @property
    def is_transposed(self) -> bool:
        """Whether they are those of the transposed problem."""
        return self.source is not self.weight

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return all arrays that are held."""
        packed = () if self.packed is None else (self.packed.array,)
        held = itertools.chain((self.weight, self.source), packed, *(phase.arrays() for phase in self.phases))
        return tuple({id(array): array for array in held}.values())


class _BoundDirect(BoundForward[DirectPlan, DirectKernels]):
    def __init__(self, has_bias: bool, *bound: Any) -> None:
        super().__init__(*bound)
        kernels = self.kernels
        self._forward = direct.Forward(self.geometry, kernels.source, kernels.packed, has_bias, self.relu)

    def run(self, input: int, bias: int, output: int) -> bool | None:
        return self._forward.run(input, bias, output) or None

    def finish(self, left: Any, input: np.ndarray, bias: np.ndarray | None, output: np.ndarray) -> None:
        self._forward.convolve(input, bias, output)


class Direct(Implementation[DirectPlan, DirectKernels]):
    """Direct convolution, as the planner and the public functions see it."""

    name = DirectPlan.algorithm
    phrase = "direct"
    reads_channels_last = True

    def candidates(self, request: Request) -> Candidates:
        """Return the one plan that there is."""
        geometry, dtype = request.geometry, request.dtype
        if geometry.channels_last and not last.fits(geometry, dtype):
            raise Inapplicable("groups of few filters are read channels first")
        transposed = request.transposed()
        phases = request.transposed_phases() if transposed is None else None
        forward = phases or (() if transposed is None else (transposed,))
        if request.direction == "forward":
            forward = (geometry,)
        scratch, weight = 0, 0
        if forward:
            scratch = max(direct.scratch_bytes(run, dtype) for run in forward)
            weight = sum(direct.packed_bytes(run, dtype) for run in forward)
        elif request.direction == "grad_weight":
            scratch, weight = direct.grad_weight_bytes(geometry, dtype)
        passes = [(run, "forward") for run in forward] or [(geometry, request.direction)]
        seconds = sum(cost(*each, dtype, request.weight_is_transformed, request.machine) for each in passes)
        if forward and request.direction == "grad_input":
            seconds += interleaving_cost(geometry, dtype, request.machine)
        plan = DirectPlan(
            geometry=geometry,
            direction=request.direction,
            dtype=dtype,
            scratch_bytes=scratch,
            weight_bytes=weight,
            reason="",
            seconds=seconds,
            is_transposed=transposed is not None,
            by_phases=phases is not None,
        )
        return Candidates(plan)

    def prepare(self, plan: DirectPlan, weight: np.ndarray) -> DirectKernels:
        """Pack kernels, or transpose and pack them.

        For transposed problems, unless their padding's zeros would be multiplied by values that are not finite: these
        products are not in the gradient.
        """
        if plan.by_phases and np.isfinite(weight).all():
            sources = transpose_phases(weight, plan.geometry)
            runs = zip(sources, phases_of(plan.geometry), strict=True)
            phases = tuple(DirectKernels(weight, source, direct.pack(run, source)) for source, run in runs)
            return DirectKernels(weight, weight, None, phases)
        if plan.is_transposed and np.isfinite(weight).all():
            source = transpose(weight, plan.geometry)
            return DirectKernels(weight, source, direct.pack(plan.run_as.geometry, source))
        packed = direct.pack(plan.geometry, weight) if plan.direction == "forward" else None
        return DirectKernels(weight, weight, packed)

    def forward(
        self,
        plan: DirectPlan,
        geometry: ConvGeometry,
        input: np.ndarray,
        kernels: DirectKernels,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
        keep: bool = False,
    ) -> None:
        """Convolve `input` into `output`."""
        direct.forward(geometry, input, kernels.source, kernels.packed, bias, relu, output)

    def bind(
        self, plan: DirectPlan, geometry: ConvGeometry, kernels: DirectKernels, has_bias: bool, relu: bool
    ) -> BoundForward:
        """Return what does the same as `forward`, for many calls."""
        return _BoundDirect(has_bias, self, plan, geometry, kernels, relu)

    def grad_input(
        self,
        plan: DirectPlan,
        geometry: ConvGeometry,
        kernels: DirectKernels,
        grad_output: np.ndarray,
        result: np.ndarray,
    ) -> None:
        """Compute the gradient with respect to the input into `result`."""
        if kernels.is_transposed or kernels.phases:
            self.conv_transpose(plan, geometry, kernels, grad_output, None, False, result)
        else:
            direct.grad_input(geometry, result, kernels.weight, grad_output)

    def conv_transpose(
        self,
        plan: DirectPlan,
        geometry: ConvGeometry,
        kernels: DirectKernels,
        input: np.ndarray,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
    ) -> None:
        """Compute a transposed convolution; bias and clipping are the transposed problem's, if it is run."""
        if kernels.phases:
            runs = phases_of(geometry)
            results = scratch_memory.result((len(runs), *runs[0].output_shape), output.dtype)
            for run, of_phase, phase in zip(runs, kernels.phases, results, strict=True):
                direct.forward(run, input, of_phase.source, of_phase.packed, bias, relu, phase)
            interleave(geometry, runs[0], results, output, phases_first=True)
            return
        if not kernels.is_transposed:
            super().conv_transpose(plan, geometry, kernels, input, bias, relu, output)
            return
        run, of_phases = plan.run_geometry(geometry), bias_of_phases(geometry, bias)
        phases = room_for_phases(geometry, run, output)
        direct.forward(run, input, kernels.source, kernels.packed, of_phases, relu, phases)
        interleave(geometry, run, phases, output)

    def grad_weight(
        self, plan: DirectPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        """Compute the gradient with respect to the kernels into `result`."""
        direct.grad_weight(geometry, input, result, grad_output)


@functools.lru_cache(maxsize=256)
def phases_of(geometry: ConvGeometry) -> tuple[ConvGeometry, ...]:
    """Return the problem of each phase, which a plan says there are."""
    phases = geometry.transposed_phases()
    if phases is None:
        raise ValueError(f"there are no phases of {geometry}")
    return phases


def cost(geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_packed: bool, machine: Machine) -> float:
    """Return the seconds of a pass."""
    flops, slow = machine.flops, dtype.itemsize / 4
    images, filters, height, width = geometry.output_size
    if direction == "grad_weight" and dense_grad_weight.fits(geometry, dtype):
        products, gathered = dense_grad_weight.work(geometry, dtype)
        return (
            _RATES["call"]
            + 2 * slow * products / (flops * _RATES["grad_weight"])
            + slow * gathered / (flops * _RATES["grad_weight_gather"])
            + dtype.itemsize * math.prod(geometry.weight_size) / (machine.bandwidth * _RATES["write"])
        )
    if direction != "forward":
        rows = geometry.multiply_adds / width
        seconds = 2 * geometry.multiply_adds / (flops * _RATES["gradient"])
        return _RATES["call"] + slow * (seconds + _RATES["gradient_row"] * rows)
    taps = math.prod(geometry.weight_size[1:])
    moved = slow * (math.prod(geometry.input_size) + math.prod(geometry.output_size))
    if geometry.channels_last:
        return (
            _RATES["call"]
            + 2 * slow * last.products(geometry, dtype) / (flops * _RATES["dense"])
            + moved / (machine.bandwidth * _RATES["dense_move"])
        )
    if depthwise.fits(geometry, dtype):
        lanes = simd.lanes(dtype.type)
        rows = round_up(height, 4) if max(height, geometry.weight_size[2]) > 1 else 1
        products = 2 * slow * images * filters * taps * rows * round_up(width, lanes)
        moving = moved / (machine.bandwidth * _RATES["window_move"])
        return _RATES["call"] + products / (flops * _RATES["window"]) + moving
    work = dense.cut(geometry, dtype).work
    if split_dense.fits(geometry, dtype):
        # where the unit is hardly worth it, it takes as long as vectors would
        share = split_dense.share_of_vectors(geometry) / split_dense.WORTHWHILE
        work = dense.Work(int(share * work.products), int(share * work.gathered))
    packed = 0 if weight_is_packed else slow * filters * taps
    return (
        _RATES["call"]
        + 2 * slow * work.products / (flops * _RATES["dense"])
        + slow * work.gathered / (flops * _RATES["gather"])
        + packed / (flops * _RATES["pack"])
        + moved / (machine.bandwidth * _RATES["dense_move"])
    )


IMPLEMENTATION = Direct()
