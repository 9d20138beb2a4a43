"""Conv2d: a convolution layer that keeps its kernels' spectra, or its packed kernels, from call to call."""

import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv import engine, scratch
from nbfftconv import padding as padding_modes
from nbfftconv.arrays import as_float4, check_shape, compact, result_type
from nbfftconv.functional import (
    check_activation,
    check_bias,
    run_backward,
    run_forward,
    run_grad_input,
    run_grad_weight,
)
from nbfftconv.geometry import ConvGeometry, Padding, layer_numbers
from nbfftconv.plan import ConvPlan, StepPlan
from nbfftconv.planner import ALGORITHMS, make_plan, make_step_plan


class Conv2d:
    """A two-dimensional convolution layer, for training and for inference.

    ``layer(x)`` is the forward pass; ``layer.backward(grad_output)`` the gradients at the input that this thread
    passed last.

    Parameters
    ----------
    weight : array_like, shape (out channels, channels / groups, kernel height, kernel width)
        float32 or float64; copied.
    bias : array_like, shape (out channels,), optional
        Copied.
    stride, padding, dilation, groups, padding_mode, activation
        As in `nbfftconv.conv2d`.

    Attributes
    ----------
    weight, bias : numpy.ndarray
        Read-only. Assign a new array to change them, which renews the spectra.
    weight_grad, bias_grad : numpy.ndarray or None
        Gradients of the last `backward`.
    algorithm : str
        "auto", "fft" or "direct"; at first "auto".
    training : bool
        At first True. If False, a forward pass keeps nothing for `backward`.
    spectra_limit : int
        Bytes that the spectra of an input may take between a forward pass and `backward`, at first 256 MiB. If they
        would take more, or with 0, only the input itself is kept, and transformed again.

    Raises
    ------
    TypeError, ValueError
        As `nbfftconv.conv2d` does.
    """

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        padding_mode: str = "zeros",
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        padding_modes.check_mode(padding_mode)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode, self.activation = padding_mode, activation
        self.training = True
        self._spectra_limit = 2**28
        self.weight_grad: np.ndarray | None = None
        self.bias_grad: np.ndarray | None = None
        self._algorithm = "auto"
        self._last = threading.local()  # of each Python thread: the arguments and result of its forward pass
        self.weight = weight
        self.bias = bias

    @property
    def weight(self) -> np.ndarray:
        """Kernels, read-only."""
        return self._weight

    @weight.setter
    def weight(self, value: ArrayLike) -> None:
        weight = as_float4("weight", value)
        layer_numbers(weight.shape, self.stride, self.padding, self.dilation, self.groups)
        self._weight = _frozen(weight)
        # Replaced, never changed: a pass that is under way keeps the spectra that it began with.
        self._kernels: dict[tuple, engine.Kernels] = {}

    @property
    def bias(self) -> np.ndarray | None:
        """Bias, read-only."""
        return self._bias

    @bias.setter
    def bias(self, value: ArrayLike | None) -> None:
        bias = check_bias(value, self._weight.shape[0])
        self._bias = None if bias is None else _frozen(bias)

    @property
    def algorithm(self) -> str:
        """What computes the passes: "auto", "fft" or "direct"."""
        return self._algorithm

    @algorithm.setter
    def algorithm(self, value: str) -> None:
        if value not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {value!r}")
        self._algorithm = value

    @property
    def spectra_limit(self) -> int:
        """Bytes that the spectra of an input may take between a forward pass and `backward`."""
        return self._spectra_limit

    @spectra_limit.setter
    def spectra_limit(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"spectra_limit must be an integer number of bytes, got {value!r}")
        if value < 0:
            raise ValueError(f"spectra_limit must be at least 0 bytes, got {value}")
        self._spectra_limit = int(value)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: neither spectra nor what a thread keeps for `backward`."""
        return {name: value for name, value in vars(self).items() if name not in ("_kernels", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._last = threading.local()
        self.weight, self.bias = self._weight, self._bias

    def __repr__(self) -> str:
        return (
            f"Conv2d(weight {self._weight.shape} {self._weight.dtype}, bias {'no' if self._bias is None else 'yes'}, "
            f"stride={self.stride!r}, padding={self.padding!r}, dilation={self.dilation!r}, groups={self.groups!r}, "
            f"padding_mode={self.padding_mode!r}, activation={self.activation!r}, algorithm={self._algorithm!r})"
        )

    def __call__(self, input: ArrayLike) -> np.ndarray:
        """Convolve.

        Parameters
        ----------
        input : array_like, shape (batch, channels, height, width)
            Kept for `backward` while `training`; do not change it in between.

        Returns
        -------
        numpy.ndarray, shape (batch, out channels, out height, out width)
        """
        x = as_float4("input", input)
        weight, bias, kernels = self._weight, self._bias, self._kernels
        geometry = ConvGeometry.from_arguments(
            x.shape, weight.shape, self.stride, self.padding, self.dilation, self.groups
        )
        padding_modes.check(geometry, self.padding_mode)
        dtype = result_type(x, weight) if bias is None else result_type(x, weight, bias)
        self._last.forward = None  # before there is more to keep
        step = self._step(geometry, dtype) if self.training else None
        plan = (
            step.forward if step else make_plan(geometry, "forward", dtype, self._algorithm, weight_is_transformed=True)
        )
        result, kept = run_forward(
            plan,
            x,
            _transformed(kernels, plan, weight),
            bias,
            self.padding_mode,
            self.activation,
            keep=step is not None and step.keeps_input_spectra,
        )
        if step:
            passed = _passed(result) if self.activation == "relu" else None
            self._last.forward = geometry, dtype, x, step, kept, passed, weight, kernels
        return result

    def backward(self, grad_output: ArrayLike) -> np.ndarray:
        """Set `weight_grad` and `bias_grad`, at the last input, and return the gradient of the input.

        Parameters
        ----------
        grad_output : array_like, shape (batch, out channels, out height, out width)
            Gradient of the loss with respect to what the forward pass returned.

        Returns
        -------
        numpy.ndarray, of the shape of the last input

        Raises
        ------
        RuntimeError
            If this thread made no forward pass while `training`.
        """
        last = getattr(self._last, "forward", None)
        if last is None:
            raise RuntimeError("backward needs a forward pass of the same thread, made with training = True")
        geometry, dtype, x, forward_step, kept, passed, weight, kernels = last
        g = as_float4("grad_output", grad_output)
        check_shape("grad_output", g, geometry.output_size, "the last forward pass")
        result_dtype = np.promote_types(dtype, result_type(g))
        g = compact(g, result_dtype)
        if passed is not None:
            g = _masked(g, passed)
        step = self._step(geometry, result_dtype)
        transformed = _transformed(kernels, step.grad_input, weight)
        if step.shares_spectra:
            # of other tiles if the dtype or any setting has changed since
            kept = kept if step == forward_step else None
            grad_input, self.weight_grad, grad_bias = run_backward(
                step.grad_weight, x, kept, transformed, g, self.padding_mode
            )
        else:
            grad_input = run_grad_input(step.grad_input, transformed, g, self.padding_mode)
            self.weight_grad = run_grad_weight(step.grad_weight, x, g, self.padding_mode)
            with np.errstate(all="ignore"):  # inf - inf is NaN
                grad_bias = None if self._bias is None else g.sum(axis=(0, 2, 3))
        self.bias_grad = None if self._bias is None else grad_bias
        return grad_input

    def _step(self, geometry: ConvGeometry, dtype: np.dtype) -> StepPlan:
        return make_step_plan(geometry, dtype, self._algorithm, self.spectra_limit)


def _passed(result: np.ndarray) -> np.ndarray:
    """Return which values ReLU has not clipped, as int8: -1, all bits, or 0. A NaN passes."""
    return (result <= 0).view(np.int8) - np.int8(1)


def _masked(gradient: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """Return the gradient where ReLU passed, else 0; by bits: 2 ms for 13 MB, where `numpy.where` takes 17."""
    result = scratch.result(gradient.shape, gradient.dtype)
    bits = np.dtype(f"i{gradient.itemsize}")
    np.bitwise_and(gradient.view(bits), passed, out=result.view(bits))
    return result


def _frozen(array: np.ndarray) -> np.ndarray:
    copy = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    copy.flags.writeable = False
    return copy


def _transformed(cache: dict[tuple, engine.Kernels], plan: ConvPlan, weight: np.ndarray) -> engine.Kernels:
    """Return the kernels as `plan` needs them, from `cache` if they were transformed or packed before."""
    key: tuple[Any, ...] = (plan.dtype, plan.algorithm, plan.transform, plan.tile, plan.transposed is None)
    if plan.algorithm == "direct":  # a gradient does not read them as the forward pass does
        key += (plan.direction,)
    kernels = cache.get(key)
    if kernels is None:
        kernels = cache[key] = engine.Kernels.of(plan, compact(weight, plan.dtype))
    return kernels
