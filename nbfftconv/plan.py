"""ConvPlan: what the planner decided for one convolution."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from nbfftconv.geometry import ConvGeometry
from nbfftconv.tiling import TileGrid, axis_tiles

DIRECTIONS = ("forward", "grad_weight", "grad_input")


def filters_of_share(filters: int, depth: int, lanes: int | np.ndarray) -> int | np.ndarray:
    """Filters of a group that a fused pass convolves with what it transformed of `depth` channels.

    So many that it hardly matters that every share transforms the input anew, in whole units of lanes.
    """
    return np.minimum(filters, -(-8 * depth // lanes) * lanes)


class KernelForm(NamedTuple):
    """The form in which a plan needs the kernels: plans of the same one, for the same weight, share them.

    Attributes
    ----------
    dtype : numpy.dtype
    groups : int
    transform : str or None
    tile : tuple of int or None
    phases : tuple of int or None
        Distances of neighbouring taps, one for each axis. Where there is but one output, they do not depend on strides.
    is_transposed : bool
    packed : tuple or None
        Direction and bytes, of direct convolution: a gradient does not read kernels as the forward pass does, and that
        not of all sizes in the same order.
    """

    dtype: np.dtype
    groups: int
    transform: str | None
    tile: tuple[int, int] | None
    phases: tuple[int, int] | None
    is_transposed: bool
    packed: tuple[str, int] | None


@dataclass(frozen=True)
class ConvPlan:
    """How one pass of one convolution is computed. Made by `nbfftconv.plan_conv2d`; immutable, usable from any thread.

    Attributes
    ----------
    geometry : ConvGeometry
        The convolution.
    direction : str
        "forward", "grad_weight" or "grad_input".
    dtype : numpy.dtype
        Of all arrays, float32 or float64.
    algorithm : str
        "fft" or "direct".
    transform : str or None
        "codelet", "planar" or "fftw"; None for direct convolution.
    grid : TileGrid or None
        The tiles; None for direct convolution.
    fused : bool
        Whether a thread takes a block of tiles from input to output, in the cache of its core, instead of all threads
        one stage after the other.
    block_tiles : int
        Tiles whose spectra are in memory at once; of each thread, if fused.
    scratch_bytes : int
        Bytes of memory for the spectra of a block of tiles; the spectra of the kernels come on top of it. Of direct
        convolution, memory of each thread for the pixels that it gathers.
    weight_spectra_bytes : int
        Bytes of memory for the spectra of the kernels, or of their gradient. Of direct convolution, for the packed
        kernels, or for sums of their gradient that are added up at the end.
    reason : str
        Why this was chosen.
    seconds : float
        Time of a call that the cost model expects on one core.
    transposed : ConvPlan or None
        Of "grad_input", if it is run as a forward pass: that pass's plan, for `ConvGeometry.transposed`, from which
        all attributes are but geometry and direction.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 5, 5), algorithm="fft", transform="fftw", tile=(24, 40))
    >>> plan.geometry.output_size, plan.tile, plan.tiles
    ((1, 8, 36, 36), (24, 40), (2, 1))
    """

    geometry: ConvGeometry
    direction: str
    dtype: np.dtype
    algorithm: str
    transform: str | None
    grid: TileGrid | None
    fused: bool
    block_tiles: int
    scratch_bytes: int
    weight_spectra_bytes: int
    reason: str
    seconds: float
    transposed: "ConvPlan | None" = None

    def __hash__(self) -> int:
        """Of a part: that of all attributes takes longer than what is looked up by it."""
        return hash((self.geometry, self.direction, self.block_tiles, self.scratch_bytes))

    def as_grad_input(self, geometry: ConvGeometry) -> "ConvPlan":
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
        return replace(self, geometry=geometry, direction="grad_input", transposed=self)

    def resized(self, geometry: ConvGeometry) -> "ConvPlan":
        """Return the plan for images of another size, with the same tile and the same kernels' spectra.

        Parameters
        ----------
        geometry : ConvGeometry
            The same convolution of other images.

        Returns
        -------
        ConvPlan
            A plan of the same direction.
        """
        if geometry == self.geometry or self.grid is None:
            return replace(self, geometry=geometry)
        vertical, horizontal = (axis_tiles(geometry, axis, side) for axis, side in enumerate(self.tile))
        return replace(self, geometry=geometry, grid=TileGrid(vertical, horizontal, geometry.input_size[0]))

    @functools.cached_property
    def kernel_form(self) -> KernelForm:
        """The form in which it needs the kernels."""
        phases = packed = None
        if self.grid is None:
            packed = self.direction, self.weight_spectra_bytes
        else:
            phases = self.grid.vertical.tap_step, self.grid.horizontal.tap_step
        is_transposed = self.transposed is not None
        return KernelForm(self.dtype, self.geometry.groups, self.transform, self.tile, phases, is_transposed, packed)

    @property
    def tile(self) -> tuple[int, int] | None:
        """Samples of a tile, (height, width); None for direct convolution."""
        return None if self.grid is None else (self.grid.vertical.tile, self.grid.horizontal.tile)

    @property
    def tiles(self) -> tuple[int, int] | None:
        """Tiles that cover an image, (rows, columns); None for direct convolution."""
        return None if self.grid is None else (self.grid.vertical.count, self.grid.horizontal.count)

    def __repr__(self) -> str:
        g = self.geometry
        head = (
            f"ConvPlan({self.direction}, {self.dtype}: input {g.input_size}, weight {g.weight_size}, "
            f"stride {g.stride}, padding {g.padding}, dilation {g.dilation}, groups {g.groups}"
        )
        if self.transposed is not None:
            head += "\n  run as the forward pass of the transposed problem"
        if self.grid is None:
            return (
                f"{head}\n  algorithm direct, scratch {self.scratch_bytes} bytes a thread, kernels "
                f"{self.weight_spectra_bytes} bytes\n  because {self.reason})"
            )
        rows, columns = self.tiles
        kind = "fused blocks" if self.fused else "blocks"
        return (
            f"{head}\n  algorithm fft, transform {self.transform}, tile {self.tile[0]}x{self.tile[1]}, "
            f"tiles {rows}x{columns} an image ({self.grid.tiles} in all, {kind} of {self.block_tiles})"
            f"\n  scratch {self.scratch_bytes} bytes, kernels' spectra {self.weight_spectra_bytes} bytes"
            f"\n  because {self.reason})"
        )


@dataclass(frozen=True)
class StepPlan:
    """How a training step of one convolution is computed. Made by `nbfftconv.planner.make_step_plan`.

    Attributes
    ----------
    forward, grad_weight, grad_input : ConvPlan
    shares_spectra : bool
        Whether one tile grid serves all three passes: the kernels' spectra are made once, and those of the output's
        gradient.
    keeps_input_spectra : bool
        Whether those of the input are, too, and kept from the forward pass on.
    """

    forward: ConvPlan
    grad_weight: ConvPlan
    grad_input: ConvPlan
    shares_spectra: bool = False
    keeps_input_spectra: bool = False
