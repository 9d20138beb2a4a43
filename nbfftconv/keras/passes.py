"""The passes of one convolution of a layer on NumPy arrays, in the order in which Keras has them."""

from typing import Any

import numpy as np

from nbfftconv.arrays import compact
from nbfftconv.channels_last import to_channels_first, to_channels_last
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Kernels, registry
from nbfftconv.kept_kernels import KeptKernels
from nbfftconv.keras.setting import Setting
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan, plan_channels_last
from nbfftconv.run import run_conv_transpose, run_forward, run_grad_weight


def _have_same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays that are compact, of one shape and dtype, have the same bits."""
    as_bits = np.dtype(f"i{a.itemsize}")
    return np.array_equal(a.view(as_bits), b.view(as_bits))


class Convolution:
    """One convolution of a layer, in its three passes.

    Kernels are kept in the form that passes need once two calls in a row bring the same values: while it trains, a
    layer brings new ones with each step. Any number of threads may call.

    Parameters
    ----------
    setting : Setting
    relu : bool
        Whether `forward` clips its results at zero.

    Attributes
    ----------
    setting : Setting
    relu : bool
    arranged
        What the module for PyTorch keeps instead of kernels.
    """

    arranged: Any = None

    def __init__(self, setting: Setting, relu: bool) -> None:
        self.setting, self.relu = setting, relu
        # Values, as they were, and what is kept of them, if anything is: replaced as a whole, never changed.
        self._last: tuple[np.ndarray, KeptKernels | None] | None = None

    def forward(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """Return the output."""
        return self._forward(x, kernel, bias, self._kept(kernel))

    def forward_once(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """Return the output; keep nothing of a kernel that is about to change."""
        return self._forward(x, kernel, bias, None)

    def grad_input(self, x_shape: tuple[int, ...], kernel: np.ndarray, g: np.ndarray) -> np.ndarray:
        """Return the gradient at an input of that shape, given that at the output before it is clipped."""
        geometry, g = self.setting.geometry(x_shape, kernel.shape), self._first(g)
        direction = "forward" if self.setting.is_transposed else "grad_input"
        return self._as_given(self._run(direction, geometry, g, kernel, None, False, None))

    def grad_kernel(self, x: np.ndarray, kernel_size: tuple[int, ...], g: np.ndarray) -> np.ndarray:
        """Return the gradient at a kernel of that shape, given that at the output before it is clipped."""
        setting = self.setting
        geometry = setting.geometry(x.shape, kernel_size)
        source, gradient = self._first(x), self._first(g)
        if setting.is_transposed:
            source, gradient = gradient, source
        images, dtype = geometry.of_images, source.dtype
        if 0 in images.input_shape:
            return np.zeros(kernel_size, dtype)
        plan = make_plan(images, "grad_weight", dtype)
        source, gradient = source.reshape(images.input_shape), gradient.reshape(images.output_shape)
        result = run_grad_weight(plan, source, gradient, "zeros")
        order = setting.order()
        result = result.reshape([kernel_size[each] for each in order])
        return np.ascontiguousarray(result.transpose(np.argsort(order)))

    def _forward(
        self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, kept: KeptKernels | None
    ) -> np.ndarray:
        geometry = self.setting.geometry(x.shape, kernel.shape)
        if self.setting.is_transposed:
            return self._as_given(self._run("grad_input", geometry, self._first(x), kernel, bias, self.relu, kept))
        plan = self._plan(geometry, x.dtype, kept)
        if not plan.geometry.channels_last:
            return self._as_given(self._run("forward", geometry, self._first(x), kernel, bias, self.relu, kept))
        x = compact(x, x.dtype).reshape(plan.geometry.input_shape)
        kernels = self._kernels(plan, kernel, kept)
        result, _ = run_forward(plan, x, kernels, bias, "zeros", "relu" if self.relu else None)
        batch, filters, *space = geometry.output_size
        return result.reshape(batch, *space, filters)

    def _plan(self, geometry: ConvGeometry, dtype: np.dtype, kept: KeptKernels | None) -> ConvPlan:
        """Plan a forward pass."""
        is_last = self.setting.channels_last
        if kept is not None:
            return kept.plan(geometry.of_images, dtype, "auto", is_last)
        plan = make_plan(geometry.of_images, "forward", dtype)
        return plan_channels_last(plan, "auto", weight_is_transformed=False) if is_last else plan

    def _run(
        self,
        direction: str,
        geometry: ConvGeometry,
        array: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None,
        relu: bool,
        kept: KeptKernels | None,
    ) -> np.ndarray:
        """Run the pass that takes the input to the output, or the other way round."""
        images, dtype, activation = geometry.of_images, array.dtype, "relu" if relu else None
        if direction == "forward":
            plan = make_plan(images, direction, dtype) if kept is None else kept.plan(images, dtype, "auto")
            kernels = self._kernels(plan, kernel, kept)
            x = array.reshape(images.input_shape)
            result, _ = run_forward(plan, x, kernels, bias, "zeros", activation)
            return result.reshape(geometry.output_size)
        plan = make_plan(images, direction, dtype, weight_is_transformed=kept is not None)
        kernels = self._kernels(plan, kernel, kept)
        result = run_conv_transpose(plan, kernels, array.reshape(images.output_shape), bias, activation)
        return result.reshape(geometry.input_size)

    def _kernels(self, plan: ConvPlan, kernel: np.ndarray, kept: KeptKernels | None) -> Kernels:
        if kept is not None:
            return kept.of(plan)
        weight = compact(self._weight(kernel), plan.dtype).reshape(plan.geometry.weight_size)
        return registry.get(plan.algorithm).prepare(plan, weight)

    def _kept(self, kernel: np.ndarray) -> KeptKernels | None:
        """Return what is kept of a kernel, if the last one had the same values."""
        kernel, last = np.ascontiguousarray(kernel), self._last
        if last is None or last[0].dtype != kernel.dtype or not _have_same_bits(last[0], kernel):
            self._last = kernel.copy(), None
            return None
        values, kept = last
        if kept is None:
            kept = KeptKernels(self._weight(values))
            self._last = values, kept
        return kept

    def _weight(self, kernel: np.ndarray) -> np.ndarray:
        """Return a kernel in this package's order, in the same memory."""
        return kernel.transpose(self.setting.order()).reshape(self.setting.weight_size(kernel.shape))

    def _first(self, array: np.ndarray) -> np.ndarray:
        if self.setting.channels_last:
            return to_channels_first(array)
        return np.ascontiguousarray(array)

    def _as_given(self, array: np.ndarray) -> np.ndarray:
        return to_channels_last(array) if self.setting.channels_last else array
