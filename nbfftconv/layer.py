"""Conv2d: a convolution layer that keeps its kernels' spectra, or its packed kernels, from call to call."""

import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv import engine, scratch
from nbfftconv import padding as padding_modes
from nbfftconv.arrays import as_float4, check_shape, compact, result_type
from nbfftconv.forking import fork_safe_lock
from nbfftconv.functional import (
    check_activation,
    check_bias,
    run_backward,
    run_forward,
    run_grad_input,
    run_grad_weight,
)
from nbfftconv.geometry import ConvGeometry, Padding, layer_numbers
from nbfftconv.plan import ConvPlan, KernelForm, StepPlan
from nbfftconv.planner import ALGORITHMS, make_plan, make_plan_for_kept, make_step_plan

#: Bytes that a layer keeps of its kernels' spectra, and of kernels that are packed or transposed, unless those that it
#: used last take more.
KEPT_BYTES = 512 * 2**20
# Sizes of images whose plan a layer remembers.
_CHOSEN = 512

_kept_lock = fork_safe_lock()  # for moments


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
        # Replaced, never changed to another weight's: a pass that is under way keeps the kernels that it began with.
        self._kernels = KeptKernels(self._weight)

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
        bias, kernels = self._bias, self._kernels
        weight = kernels.weight
        geometry = ConvGeometry.from_arguments(
            x.shape, weight.shape, self.stride, self.padding, self.dilation, self.groups
        )
        padding_modes.check(geometry, self.padding_mode)
        dtype = result_type(x, weight) if bias is None else result_type(x, weight, bias)
        self._last.forward = None  # before there is more to keep
        step = self._step(geometry, dtype) if self.training else None
        plan = step.forward if step else kernels.plan(geometry, dtype, self._algorithm)
        result, kept = run_forward(
            plan,
            x,
            kernels.of(plan),
            bias,
            self.padding_mode,
            self.activation,
            keep=step is not None and step.keeps_input_spectra,
        )
        if step:
            passed = _passed(result) if self.activation == "relu" else None
            self._last.forward = geometry, dtype, x, step, kept, passed, kernels
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
        geometry, dtype, x, forward_step, kept, passed, kernels = last
        g = as_float4("grad_output", grad_output)
        check_shape("grad_output", g, geometry.output_size, "the last forward pass")
        result_dtype = np.promote_types(dtype, result_type(g))
        g = compact(g, result_dtype)
        if passed is not None:
            g = _masked(g, passed)
        step = self._step(geometry, result_dtype)
        transformed = kernels.of(step.grad_input)
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


class KeptKernels:
    """A layer's kernels, in the forms that its plans need: transformed, transposed or packed.

    Those that were used last are kept, as far as they fit `KEPT_BYTES`. Any number of threads may ask at once; of those
    that need the same new form, each may make it.

    Attributes
    ----------
    weight : numpy.ndarray
    forms : dict from KernelForm to nbfftconv.engine.Kernels or None
        Kept, the one that was used last at the end; None if a plan needs it that is about to be run.
    """

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight
        self.forms: dict[KernelForm, engine.Kernels | None] = {}
        self._chosen: dict[ConvPlan, ConvPlan] = {}  # from the best plan to the one in force

    def plan(self, geometry: ConvGeometry, dtype: np.dtype, algorithm: str) -> ConvPlan:
        """Plan a forward pass, for kernels in a form that is kept if that is nearly as fast as the best plan.

        The plan for a size stays, so that its results do, as long as these kernels are kept.
        """
        best = make_plan(geometry, "forward", dtype, algorithm, weight_is_transformed=True)
        with _kept_lock:
            chosen = self._chosen.get(best)
            if chosen is None:
                chosen = self._chosen[best] = make_plan_for_kept(geometry, dtype, algorithm, self.forms.keys())
                self.forms.setdefault(chosen.kernel_form, None)
                while len(self._chosen) > _CHOSEN:
                    del self._chosen[next(iter(self._chosen))]
        return chosen

    def of(self, plan: ConvPlan) -> engine.Kernels:
        """Return the kernels as `plan` needs them."""
        form, dropped = plan.kernel_form, {}
        with _kept_lock:
            kernels = self.forms.pop(form, None)
            self.forms[form] = kernels
        if kernels is not None:
            return kernels
        kernels = engine.Kernels.of(plan, compact(self.weight, plan.dtype))
        with _kept_lock:
            kernels = self.forms.pop(form, None) or kernels
            self.forms[form] = kernels
            while len(self.forms) > 1 and sum(map(self._nbytes, self.forms.values())) > KEPT_BYTES:
                oldest = next(iter(self.forms))
                dropped[oldest] = self.forms.pop(oldest)
            if dropped:
                self._chosen = {
                    best: chosen for best, chosen in self._chosen.items() if chosen.kernel_form in self.forms
                }
        return kernels

    def _nbytes(self, kernels: engine.Kernels | None) -> int:
        """Bytes that kernels in one form take, on top of the layer's weight."""
        if kernels is None:
            return 0
        arrays = [kernels.packed, kernels.spectra and kernels.spectra.array]
        if kernels.weight is not self.weight:
            arrays.append(kernels.weight)
        return self._nbytes(kernels.transposed) + sum(array.nbytes for array in arrays if array is not None)
