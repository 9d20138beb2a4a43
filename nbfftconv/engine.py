"""Runs a plan on validated arrays: by FFT, with outliers put right afterwards, or direct.

Arrays are C-contiguous, aligned, of the plan's dtype and of the sizes of `geometry`, which is the plan's or the same
with the padding applied beforehand.
"""

from dataclasses import dataclass

import numpy as np

from nbfftconv import direct, outliers
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.backward import backward as fft_backward
from nbfftconv.passes.context import Spectra
from nbfftconv.passes.forward import forward as fft_forward
from nbfftconv.passes.grad_input import grad_input as fft_grad_input
from nbfftconv.passes.grad_weight import grad_weight as fft_grad_weight
from nbfftconv.passes.to_spectra import TransformedWeight, transform_weight
from nbfftconv.plan import ConvPlan
from nbfftconv.transpose import transpose


@dataclass(frozen=True)
class Kernels:
    """Kernels as a plan needs them: with their spectra for its tiles, or in the order that direct convolution reads.

    Where direct convolution reads them as they are, `packed` is None. For a plan with a transposed one, `transposed`
    has the kernels that this one needs, unless its direct convolution would multiply values that are not finite by the
    zeros of its padding, which are not in the gradient.
    """

    weight: np.ndarray
    transformed: TransformedWeight | None = None
    packed: np.ndarray | None = None
    transposed: "Kernels | None" = None

    @classmethod
    def of(cls, plan: ConvPlan, weight: np.ndarray) -> "Kernels":
        """Transpose, transform or pack `weight` for `plan`."""
        if plan.transposed is not None:
            if plan.algorithm == "direct" and not np.isfinite(weight).all():
                return cls(weight)
            return cls(weight, transposed=cls.of(plan.transposed, transpose(weight, plan.geometry.groups)))
        if plan.algorithm == "direct":
            is_read_packed = plan.direction == "forward"
            return cls(weight, packed=direct.pack(plan.geometry, weight) if is_read_packed else None)
        return cls(weight, transform_weight(plan, weight))


@dataclass(frozen=True)
class KeptInput:
    """The input's spectra, kept for the backward pass, and whether outliers were taken as zero."""

    spectra: Spectra
    has_outliers: bool


def _convolve(
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    kernels: Kernels,
    bias: np.ndarray | None,
    relu: bool,
    output: np.ndarray,
    keep: bool = False,
) -> tuple[bool, KeptInput | None]:
    """Convolve as `forward`; tell whether outliers were taken as zero."""
    if plan.algorithm == "direct":
        direct.forward(geometry, input, kernels.weight, kernels.packed, bias, relu, output)
        return False, None
    has_outliers, spectra = fft_forward(plan, geometry, input, kernels.transformed, bias, relu, output, keep)
    return has_outliers or kernels.transformed.has_outliers, KeptInput(spectra, has_outliers) if keep else None


def forward(
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    kernels: Kernels,
    bias: np.ndarray | None,
    relu: bool,
    output: np.ndarray,
    keep: bool = False,
) -> KeptInput | None:
    """Convolve `input` into `output`, add the bias, and clip negative values if `relu`.

    With `keep`, return the input's spectra; `plan` is then one of a step that shares them.
    """
    has_outliers, kept = _convolve(plan, geometry, input, kernels, bias, relu, output, keep)
    if not has_outliers:
        return kept
    corrections = outliers.of_forward(geometry, input, kernels.weight)
    if corrections is None:
        direct.forward(geometry, input, kernels.weight, kernels.packed, bias, relu, output)
        return kept
    if relu:  # what is to be added comes before the clipping
        _convolve(plan, geometry, input, kernels, bias, False, output)
    corrections.add_to(output)
    if relu:
        np.maximum(output, 0, out=output)
    return kept


def grad_input(
    plan: ConvPlan, geometry: ConvGeometry, kernels: Kernels, grad_output: np.ndarray, result: np.ndarray
) -> None:
    """Compute the gradient with respect to the input into `result`."""
    transposed = kernels.transposed
    if transposed is not None:
        forward_plan = plan.transposed.resized(geometry.transposed())
        pass_geometry = forward_plan.geometry
        has_outliers, _ = _convolve(forward_plan, pass_geometry, grad_output, transposed, None, False, result)
    elif plan.algorithm == "direct":
        direct.grad_input(geometry, result, kernels.weight, grad_output)
        return
    else:
        has_outliers = fft_grad_input(plan, geometry, kernels.transformed, grad_output, result)
        has_outliers = has_outliers or kernels.transformed.has_outliers
    if has_outliers:
        _correct_grad_input(geometry, kernels, grad_output, result)


def _correct_grad_input(geometry: ConvGeometry, kernels: Kernels, grad_output: np.ndarray, result: np.ndarray) -> None:
    """Add the products of outliers, or convolve directly where these are many."""
    corrections = outliers.of_grad_input(geometry, kernels.weight, grad_output)
    transposed = geometry.transposed()
    if corrections is not None:
        corrections.add_to(result)
    elif transposed is not None and np.isfinite(kernels.weight).all():
        weight = transpose(kernels.weight, geometry.groups)
        direct.forward(transposed, grad_output, weight, None, None, False, result)
    else:
        direct.grad_input(geometry, result, kernels.weight, grad_output)


def grad_weight(
    plan: ConvPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> None:
    """Compute the gradient with respect to the kernels into `result`."""
    if plan.algorithm == "direct":
        direct.grad_weight(geometry, input, result, grad_output)
    elif fft_grad_weight(plan, geometry, input, grad_output, result):
        _correct_grad_weight(geometry, input, grad_output, result)


def _correct_grad_weight(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> None:
    """Add the products of outliers, or convolve directly where these are many."""
    corrections = outliers.of_grad_weight(geometry, input, grad_output)
    if corrections is None:
        direct.grad_weight(geometry, input, result, grad_output)
    else:
        corrections.add_to(result)


def backward(
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    kept: KeptInput | None,
    kernels: Kernels,
    grad_output: np.ndarray,
    grad_input: np.ndarray,
    grad_weight: np.ndarray,
) -> np.ndarray:
    """Compute the gradients with respect to input and kernels, and return that with respect to the bias, in float64.

    `plan` is that for the kernels, whose blocks are larger, of a step that shares spectra.
    """
    has_outliers, grad_bias = fft_backward(
        plan, geometry, input, kept and kept.spectra, kernels.transformed, grad_output, grad_input, grad_weight
    )
    if has_outliers or kernels.transformed.has_outliers:
        _correct_grad_input(geometry, kernels, grad_output, grad_input)
    if has_outliers or (kept is not None and kept.has_outliers):
        _correct_grad_weight(geometry, input, grad_output, grad_weight)
    if has_outliers:
        with np.errstate(all="ignore"):  # inf - inf is NaN
            grad_bias = grad_output.sum(axis=(0, 2, 3), dtype=np.float64)
    return grad_bias
