"""ConvPlan: what the planner decided for one pass of one convolution. Each implementation has its own kind of plan."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from nbfftconv.forking import cached_property
from nbfftconv.geometry import ConvGeometry

DIRECTIONS = ("forward", "grad_weight", "grad_input")

#: What a caller, or a race, has chosen of an implementation's options: names, each with its value.
Choices = tuple[tuple[str, Any], ...]

_Plan = TypeVar("_Plan", bound="ConvPlan")


class KernelForm(NamedTuple):
    """The form in which a plan needs the kernels: plans of the same one, for the same weight, share them.

    Attributes
    ----------
    algorithm : str
    dtype : numpy.dtype
    groups : int
    is_transposed : bool
    weight_size : tuple of int
        Of the kernels of images: those of volumes may be seen in two ways.
    layout : Hashable
        What else tells forms of this algorithm apart.
    """

    algorithm: str
    dtype: np.dtype
    groups: int
    is_transposed: bool
    weight_size: tuple[int, ...]
    layout: Hashable


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvPlan:
    """How one pass of one convolution is computed. Made by `nbfftconv.plan_conv2d`; immutable, usable from any thread.

    What a plan holds beside this depends on `algorithm`, the name of what computes it.

    Attributes
    ----------
    geometry : ConvGeometry
        The convolution.
    direction : str
        "forward", "grad_weight" or "grad_input".
    dtype : numpy.dtype
        Of all arrays, float32 or float64.
    scratch_bytes : int
        Bytes of memory that a pass works in.
    weight_bytes : int
        Bytes of memory for the kernels in the form that a pass reads, or for their gradient before it is written.
    reason : str
        Why this was chosen.
    seconds : float
        Time of a call that the cost model expects on one core.
    is_transposed : bool
        Of "grad_input", whether it is run as a forward pass, that of the transposed problem.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 5, 5), direction="grad_input", algorithm="direct")
    >>> plan.algorithm, plan.geometry.output_size, plan.is_transposed
    ('direct', (1, 8, 36, 36), True)
    """

    #: The name of the implementation.
    algorithm: ClassVar[str]

    geometry: ConvGeometry
    direction: str
    dtype: np.dtype
    scratch_bytes: int
    weight_bytes: int
    reason: str
    seconds: float
    is_transposed: bool = False

    def __hash__(self) -> int:
        """Of a part: that of all attributes takes longer than what is looked up by it."""
        return hash((self.geometry, self.direction, self.scratch_bytes, self.weight_bytes))

    def as_grad_input(self: _Plan, geometry: ConvGeometry) -> _Plan:
        """Return the plan of the gradient at the input of `geometry`, whose transposed problem this plan is for.

        Parameters
        ----------
        geometry : ConvGeometry
            The convolution whose gradient it is.

        Returns
        -------
        ConvPlan
            A plan of direction "grad_input".
        """
        return replace(self, geometry=geometry, direction="grad_input", is_transposed=True)

    @cached_property
    def run_as(self: _Plan) -> _Plan:
        """The plan of the pass that is run: this one, or, if it is transposed, that of the forward pass."""
        if not self.is_transposed:
            return self
        return replace(self, geometry=_transposed(self.geometry), direction="forward", is_transposed=False)

    def run_geometry(self, geometry: ConvGeometry) -> ConvGeometry:
        """Return the geometry of the pass that is run.

        Parameters
        ----------
        geometry : ConvGeometry
            The plan's, or the same with the padding applied beforehand.

        Returns
        -------
        ConvGeometry
            The same, or that of its transposed problem.
        """
        if not self.is_transposed:
            return geometry
        return self.run_as.geometry if geometry is self.geometry else _transposed(geometry)

    @cached_property
    def kernel_form(self) -> KernelForm:
        """The form in which it needs the kernels."""
        geometry = self.geometry
        numbers = geometry.groups, self.is_transposed, geometry.weight_size
        return KernelForm(self.algorithm, self.dtype, *numbers, self._kernel_layout())

    def _kernel_layout(self) -> Hashable:
        """Return what tells the form of its kernels from others of the algorithm."""
        return None

    @property
    def choices(self) -> Choices:
        """What tells it from the algorithm's other plans for the same pass, as options that ask for it."""
        return ()

    @property
    def uses_library(self) -> bool:
        """Whether a library computes some of it, for which users may set a number of threads."""
        return False

    @property
    def summary(self) -> str:
        """The algorithm and its choices in a few words."""
        return self.algorithm

    def _details(self) -> str:
        """Return the lines of its `repr` that are of the algorithm."""
        return f"algorithm {self.algorithm}, scratch {self.scratch_bytes} bytes, kernels {self.weight_bytes} bytes"

    def __repr__(self) -> str:
        g = self.geometry
        lines = [
            f"{type(self).__name__}({self.direction}, {self.dtype}: input {g.input_size}, weight {g.weight_size}, "
            f"stride {g.stride}, padding {g.padding}, dilation {g.dilation}, groups {g.groups}",
            *(["run as the forward pass of the transposed problem"] if self.is_transposed else []),
            self._details(),
            f"because {self.reason})",
        ]
        return "\n  ".join(lines)


def _transposed(geometry: ConvGeometry) -> ConvGeometry:
    """Return the transposed problem, which a plan that is transposed says there is."""
    transposed = geometry.transposed()
    if transposed is None:
        raise ValueError(f"there is no transposed problem of {geometry}")
    return transposed


@dataclass(frozen=True)
class StepPlan:
    """How a training step of one convolution is computed. Made by `nbfftconv.planner.make_step_plan`.

    Attributes
    ----------
    forward, grad_weight, grad_input : ConvPlan
    seconds : float
        Time of a step that the cost model expects on one core.
    shares_spectra : bool
        Whether both gradients are computed at once and share what is made of the output's gradient: by FFT, one tile
        grid serves both. Where it serves the forward pass, too, the kernels' spectra are made once for all.
    keeps_input_spectra : bool
        Whether what is made of the input is shared, too, and kept from the forward pass on.
    """

    forward: ConvPlan
    grad_weight: ConvPlan
    grad_input: ConvPlan
    seconds: float
    shares_spectra: bool = False
    keeps_input_spectra: bool = False

    @classmethod
    def of(cls, plans: Iterable[ConvPlan], **rest: Any) -> "StepPlan":
        """Return the step of its passes' plans, in the order of `DIRECTIONS`."""
        forward, grad_weight, grad_input = plans
        return cls(forward, grad_weight, grad_input, **rest)
