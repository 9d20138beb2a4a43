"""Direct convolution: products of pixels and taps, no transform. Its loops are in `nbfftconv.direct`.

A gradient at the input is the forward pass of the transposed problem wherever there is one.

In seconds of one core, it costs 2 operations a multiply-add, lanes without a pixel included, and the arrays once; for
groups of many filters, also the pixels gathered for every tap, and packing the kernels; its gradients, a fixed time for
every row of pixels under every tap, or, with respect to the kernels of groups of many filters, what is gathered. Rates
are fitted as those of `fft_costs`.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nbfftconv import direct, simd
from nbfftconv.direct import dense_grad_weight, depthwise
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Candidates, Implementation, Kernels, Request
from nbfftconv.machine import Machine
from nbfftconv.plan import ConvPlan
from nbfftconv.rounding import round_up
from nbfftconv.transpose import transpose

# Fractions of the machine's `flops`, as measured where that is 165e9.
_DENSE_RATE = 145 / 165
_WINDOW_RATE = 115 / 165
_GRADIENT_RATE = 9 / 165
_GRAD_WEIGHT_RATE = 152 / 165
# Scalars that are gathered or packed, as well.
_GATHER_RATE = 5 / 165
_GRAD_WEIGHT_GATHER_RATE = 3.7 / 165
_PACK_RATE = 0.7 / 165
# Fractions of its `bandwidth`, as measured where that is 25e9: of input and output, and of a gradient that is written.
_DENSE_MOVE_RATE = 5 / 25
_WINDOW_MOVE_RATE = 4 / 25
_WRITE_RATE = 10 / 25
# Seconds.
_CALL = 60e-6
_GRADIENT_ROW = 8e-9


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

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 1, 1))
    >>> plan.algorithm, plan.reason
    ('direct', 'an FFT cannot save anything with a 1x1 kernel')
    """

    algorithm: ClassVar[str] = "direct"

    __hash__ = ConvPlan.__hash__

    def _kernel_layout(self) -> Hashable:
        # a gradient does not read kernels as the forward pass does, and that not of all sizes in the same order
        return self.direction, self.weight_bytes

    def _details(self) -> str:
        memory = f"scratch {self.scratch_bytes} bytes a thread, kernels {self.weight_bytes} bytes"
        return f"algorithm {self.algorithm}, {memory}"


@dataclass(frozen=True)
class DirectKernels(Kernels):
    """Kernels in the order of the loops that read them.

    Attributes
    ----------
    weight : numpy.ndarray
        As they came.
    source : numpy.ndarray
        The same, or, for a gradient that is run as a forward pass, those of the transposed problem.
    packed : numpy.ndarray or None
        What is read instead of `source`; None if that is read as it is.
    """

    source: np.ndarray
    packed: np.ndarray | None

    @property
    def is_transposed(self) -> bool:
        """Whether they are those of the transposed problem."""
        return self.source is not self.weight

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return all arrays that are held."""
        held = self.weight, self.source, self.packed
        return tuple({id(array): array for array in held if array is not None}.values())


class Direct(Implementation[DirectPlan, DirectKernels]):
    """Direct convolution, as the planner and the public functions see it."""

    name = DirectPlan.algorithm
    phrase = "direct"

    def candidates(self, request: Request) -> Candidates:
        """Return the one plan that there is."""
        geometry, dtype = request.geometry, request.dtype
        transposed = request.transposed()
        run, direction = (geometry, request.direction) if transposed is None else (transposed, "forward")
        scratch, weight = 0, 0
        if direction == "forward":
            scratch, weight = direct.scratch_bytes(run, dtype), direct.packed_bytes(run, dtype)
        elif direction == "grad_weight":
            scratch, weight = direct.grad_weight_bytes(geometry, dtype)
        plan = DirectPlan(
            geometry=geometry,
            direction=request.direction,
            dtype=dtype,
            scratch_bytes=scratch,
            weight_bytes=weight,
            reason="",
            seconds=cost(run, direction, dtype, request.weight_is_transformed, request.machine),
            is_transposed=transposed is not None,
        )
        return Candidates(plan)

    def prepare(self, plan: DirectPlan, weight: np.ndarray) -> DirectKernels:
        """Pack kernels, or transpose and pack them.

        For the transposed problem, unless its padding's zeros would be multiplied by values that are not finite:
        these products are not in the gradient.
        """
        if plan.is_transposed and np.isfinite(weight).all():
            source = transpose(weight, plan.geometry.groups)
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

    def grad_input(
        self,
        plan: DirectPlan,
        geometry: ConvGeometry,
        kernels: DirectKernels,
        grad_output: np.ndarray,
        result: np.ndarray,
    ) -> None:
        """Compute the gradient with respect to the input into `result`."""
        if kernels.is_transposed:
            run = plan.run_geometry(geometry)
            direct.forward(run, grad_output, kernels.source, kernels.packed, None, False, result)
        else:
            direct.grad_input(geometry, result, kernels.weight, grad_output)

    def grad_weight(
        self, plan: DirectPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        """Compute the gradient with respect to the kernels into `result`."""
        direct.grad_weight(geometry, input, result, grad_output)


def cost(geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_packed: bool, machine: Machine) -> float:
    """Return the seconds of a pass."""
    flops, slow = machine.flops, dtype.itemsize / 4
    images, filters, height, width = geometry.output_size
    if direction == "grad_weight" and dense_grad_weight.fits(geometry, dtype):
        products, gathered = dense_grad_weight.work(geometry, dtype)
        return (
            _CALL
            + 2 * slow * products / (flops * _GRAD_WEIGHT_RATE)
            + slow * gathered / (flops * _GRAD_WEIGHT_GATHER_RATE)
            + dtype.itemsize * math.prod(geometry.weight_size) / (machine.bandwidth * _WRITE_RATE)
        )
    if direction != "forward":
        rows = geometry.multiply_adds / width
        return _CALL + slow * (2 * geometry.multiply_adds / (flops * _GRADIENT_RATE) + _GRADIENT_ROW * rows)
    taps = math.prod(geometry.weight_size[1:])
    lanes = simd.lanes(dtype.type)
    moved = slow * (math.prod(geometry.input_size) + math.prod(geometry.output_size))
    if depthwise.fits(geometry, dtype):
        products = 2 * slow * images * filters * taps * round_up(height, 4) * round_up(width, lanes)
        return _CALL + products / (flops * _WINDOW_RATE) + moved / (machine.bandwidth * _WINDOW_MOVE_RATE)
    pixels = images * round_up(height * width, lanes)
    products = 2 * slow * pixels * filters * taps
    gathered = slow * pixels * geometry.groups * taps * (1 + lanes / width)
    packed = 0 if weight_is_packed else slow * filters * taps
    return (
        _CALL
        + products / (flops * _DENSE_RATE)
        + gathered / (flops * _GATHER_RATE)
        + packed / (flops * _PACK_RATE)
        + moved / (machine.bandwidth * _DENSE_MOVE_RATE)
    )


IMPLEMENTATION = Direct()
