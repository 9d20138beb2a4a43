"""Implementations of convolution: what each has to be, for the planner to choose it and for a pass to be run.

An implementation is one object, in a file of this folder, with an entry in `registry`. Who plans, measures or runs asks
that, and knows no implementation by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from nbfftconv.geometry import ConvGeometry
from nbfftconv.machine import Machine
from nbfftconv.plan import Choices, ConvPlan, KernelForm, StepPlan
from nbfftconv.transforms import Transform

#: The automatic choice never needs more memory for the kernels in another form, in bytes.
WEIGHT_LIMIT = 2**32


class Inapplicable(ValueError):
    """Why an implementation has no plan for a request: the reason for another one's plan, or an error."""


class Request(NamedTuple):
    """What a plan is asked for.

    Attributes
    ----------
    geometry : ConvGeometry
    direction : str
    dtype : numpy.dtype
    choices : tuple
        Options of the implementation that are given, each with its value.
    transforms : tuple of Transform
        All that are available, for implementations that have some.
    weight_is_transformed : bool
        Whether the kernels are kept in the form that the plan needs, so that none pays for making it.
    transposes : bool
        Whether a gradient at the input may be planned as a forward pass.
    is_asked : bool
        Whether the implementation was asked for: then it is not refused for being slow, or for its kernels' memory.
    limit : int
        The scratch limit.
    machine : Machine
    weight_limit : int
        Bytes that the kernels may take in another form, unless the implementation was asked for.
    """

    geometry: ConvGeometry
    direction: str
    dtype: np.dtype
    choices: Choices
    transforms: tuple[Transform, ...]
    weight_is_transformed: bool
    transposes: bool
    is_asked: bool
    limit: int
    machine: Machine
    weight_limit: int = WEIGHT_LIMIT

    def transposed(self) -> ConvGeometry | None:
        """Return the problem whose forward pass is the gradient that is asked for, None if there is none."""
        return self.geometry.transposed() if self.transposes and self.direction == "grad_input" else None

    def transposed_phases(self) -> tuple[ConvGeometry, ...] | None:
        """Return the problems whose forward passes are the gradient's phases, None if there are none."""
        return self.geometry.transposed_phases() if self.transposes and self.direction == "grad_input" else None


class Candidates:
    """What an implementation offers for a request: one plan. Where there are many, a subclass makes the best one.

    Attributes
    ----------
    seconds : float
        Those that the cost model expects of the best plan.

    Parameters
    ----------
    plan : ConvPlan
    """

    def __init__(self, plan: ConvPlan) -> None:
        self.seconds = plan.seconds
        self._plan = plan

    def best(self, reason: str) -> ConvPlan:
        """Return the best plan, with the reason for which it is chosen."""
        return replace(self._plan, reason=reason)

    def promising(self, most: float) -> list[ConvPlan]:
        """Return the plans that are worth measuring, none of which is expected to take more than `most` seconds."""
        return [self.best("")] if self.seconds <= most else []


def add_bias(output: np.ndarray, bias: np.ndarray | None, relu: bool) -> None:
    """Add a bias of the filters to an output, and clip negative values if `relu`."""
    with np.errstate(all="ignore"):  # inf - inf is NaN here as everywhere
        if bias is not None:
            output += bias.reshape(-1, *[1] * (output.ndim - 2))
        if relu:
            np.maximum(output, 0, out=output)


@dataclass(frozen=True)
class Kernels:
    """Kernels as an implementation reads them.

    Attributes
    ----------
    weight : numpy.ndarray
        The kernels as they came.
    """

    weight: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return all arrays that are held."""
        return (self.weight,)


_Plan = TypeVar("_Plan", bound=ConvPlan)
_Kernels = TypeVar("_Kernels", bound=Kernels)


class BoundForward(Generic[_Plan, _Kernels]):
    """The forward pass of a plan, its kernels and its settings, for calls that differ in their arrays only.

    A call first does what needs no more than addresses, and mostly that is all. This one leaves everything to the
    `forward` of its implementation.

    Parameters
    ----------
    implementation : Implementation
    plan : ConvPlan
    geometry : ConvGeometry
    kernels : Kernels
    relu : bool
    """

    def __init__(
        self,
        implementation: "Implementation[_Plan, _Kernels]",
        plan: _Plan,
        geometry: ConvGeometry,
        kernels: _Kernels,
        relu: bool,
    ) -> None:
        self.implementation, self.plan, self.geometry = implementation, plan, geometry
        self.kernels, self.relu = kernels, relu

    def run(self, input: int, bias: int, output: int) -> Any:
        """Convolve what is at an address into what is at another one; `bias` is 0 if there is none.

        Return what `finish` needs if more is to be done, else None.
        """
        return True

    def finish(self, left: Any, input: np.ndarray, bias: np.ndarray | None, output: np.ndarray) -> None:
        """Do what `run` has left to do on these arrays."""
        self.implementation.forward(self.plan, self.geometry, input, self.kernels, bias, self.relu, output)


class Implementation(ABC, Generic[_Plan, _Kernels]):
    """A way to compute the three passes.

    The arrays of a pass are C-contiguous, aligned, of the plan's dtype and of the sizes of `geometry`, which is the
    plan's or the same with the padding applied beforehand. Results are those of direct convolution, up to rounding, for
    any values: not finite, or zero.

    Attributes
    ----------
    name : str
        As users ask for it, and plans call it.
    phrase : str
        What follows its seconds in a plan's reason.
    options : tuple of str
        What a caller may choose of a plan.
    is_available : bool
        Whether it is to be had in this process; if not, no plan is of it.
    reads_channels_last : bool
        Whether it may have a forward pass for geometries with `channels_last`.
    """

    name: str
    phrase: str
    options: tuple[str, ...] = ()
    is_available: bool = True
    reads_channels_last: bool = False

    @abstractmethod
    def candidates(self, request: Request) -> Candidates:
        """Return the plans to choose from; raise `Inapplicable` if there are none, ValueError for a wrong choice."""

    def candidates_for_kept(self, request: Request, forms: Collection[KernelForm]) -> Candidates | None:
        """Return the plans for kernels in one of the forms, None if there are none."""
        candidates = self.candidates(request)
        return candidates if candidates.best("").kernel_form in forms else None

    def step(self, requests: Sequence[Request], forward: ConvPlan, spectra_limit: int, below: float) -> StepPlan | None:
        """Return the best plan of a training step whose passes share what they make of the arrays.

        None if there is none of less than `below` seconds. `requests` are those of its passes, in the order of
        `DIRECTIONS`; `forward` is the best plan of the first, for steps whose gradients alone share. What is kept of
        the input between the passes may take `spectra_limit` bytes.
        """
        return None

    def read_choices(self, written: dict[str, Any]) -> Choices:
        """Return a plan's `choices` from what a file has of them, or raise TypeError or ValueError."""
        if written:
            raise ValueError(f"{self.name} has no {', '.join(written)}")
        return ()

    @abstractmethod
    def prepare(self, plan: _Plan, weight: np.ndarray) -> _Kernels:
        """Return the kernels in the form that `plan` needs."""

    @abstractmethod
    def forward(
        self,
        plan: _Plan,
        geometry: ConvGeometry,
        input: np.ndarray,
        kernels: _Kernels,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
        keep: bool = False,
    ) -> Any:
        """Convolve `input` into `output`, add the bias, and clip negative values if `relu`.

        With `keep`, return what `backward` needs of the input, else None; `plan` is then one of its `step`.
        """

    def bind(self, plan: _Plan, geometry: ConvGeometry, kernels: _Kernels, has_bias: bool, relu: bool) -> BoundForward:
        """Return what does the same as `forward` that keeps nothing, for many calls."""
        return BoundForward(self, plan, geometry, kernels, relu)

    @abstractmethod
    def grad_input(
        self, plan: _Plan, geometry: ConvGeometry, kernels: _Kernels, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        """Compute the gradient with respect to the input into `result`."""

    def conv_transpose(
        self,
        plan: _Plan,
        geometry: ConvGeometry,
        kernels: _Kernels,
        input: np.ndarray,
        bias: np.ndarray | None,
        relu: bool,
        output: np.ndarray,
    ) -> None:
        """Compute a transposed convolution: what `grad_input` does, then add a bias, and clip negative values."""
        self.grad_input(plan, geometry, kernels, input, output)
        add_bias(output, bias, relu)

    @abstractmethod
    def grad_weight(
        self, plan: _Plan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        """Compute the gradient with respect to the kernels into `result`."""

    def backward(
        self,
        plan: _Plan,
        geometry: ConvGeometry,
        input: np.ndarray,
        kept: Any,
        kernels: _Kernels,
        grad_output: np.ndarray,
        grad_input: np.ndarray,
        grad_weight: np.ndarray,
    ) -> np.ndarray:
        """Compute the gradients with respect to input and kernels, and return that to the bias, in float64.

        `plan` is that for the kernels of its `step`; `kept` is what the forward pass returned, or None.
        """
        raise NotImplementedError(f"{self.name} plans no steps")
