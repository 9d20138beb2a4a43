"""TiledPlan: what passes by transforms are told, a transform, the tiles and how many of them are in memory at once."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from nbfftconv.geometry import ConvGeometry
from nbfftconv.plan import Choices, ConvPlan
from nbfftconv.rounding import round_up
from nbfftconv.tiling import TileGrid, axis_tiles
from nbfftconv.transforms import registry

_Plan = TypeVar("_Plan", bound="TiledPlan")


def filters_of_block(filters: int, depth: int, lanes: Any) -> Any:
    """Return the size of a filter block: so many a fused pass convolves with what it transformed of `depth` channels.

    So many, in whole units of lanes, that it hardly matters that every block transforms the input anew. Of an array of
    lanes, one of sizes.
    """
    return np.minimum(filters, round_up(8 * depth, lanes))


class SpectraLayout(NamedTuple):
    """What kernels' spectra depend on.

    Attributes
    ----------
    transform : str
    tile : tuple of int
    phases : tuple of int
        Distances of neighbouring taps, one for each axis. Where there is but one output, they do not depend on strides.
    """

    transform: str
    tile: tuple[int, int]
    phases: tuple[int, int]


@dataclass(frozen=True, kw_only=True, repr=False)
class TiledPlan(ConvPlan):
    """How a pass is computed by products of transforms, tile by tile.

    Attributes
    ----------
    geometry : ConvGeometry
        The convolution.
    direction : str
        "forward", "grad_weight" or "grad_input".
    dtype : numpy.dtype
        Of all arrays, float32 or float64.
    scratch_bytes : int
        Bytes of memory for the spectra of a block of tiles; the spectra of the kernels come on top of it.
    weight_bytes : int
        Bytes of memory for the spectra of the kernels, or of their gradient.
    reason : str
        Why this was chosen.
    seconds : float
        Time of a call that the cost model expects on one core.
    is_transposed : bool
        Of "grad_input", whether it is run as a forward pass, that of the transposed problem, to which the tiles belong.
    transform : str
        What transforms tiles, one of ``nbfftconv.transforms.registry.names()``.
    grid : TileGrid
        The tiles.
    fused : bool
        Whether a thread takes a block of tiles from input to output, in the cache of its core, instead of all threads
        one stage after the other.
    block_tiles : int
        Tiles whose spectra are in memory at once; of each thread, if fused.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 5, 5), algorithm="fft", transform="fftw", tile=(24, 40))
    >>> plan.geometry.output_size, plan.tile, plan.tiles
    ((1, 8, 36, 36), (24, 40), (2, 1))
    """

    transform: str
    grid: TileGrid
    fused: bool
    block_tiles: int

    __hash__ = ConvPlan.__hash__

    @property
    def tile(self) -> tuple[int, int]:
        """Samples of a tile, (height, width)."""
        return self.grid.vertical.tile, self.grid.horizontal.tile

    @property
    def taps(self) -> tuple[int, int]:
        """Taps of the kernel's longest phase, (height, width)."""
        return self.grid.vertical.taps, self.grid.horizontal.taps

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles that cover an image, (rows, columns)."""
        return self.grid.vertical.count, self.grid.horizontal.count

    def resized(self: _Plan, geometry: ConvGeometry) -> _Plan:
        """Return the plan for images of another size, with the same tile and the same kernels' spectra.

        Parameters
        ----------
        geometry : ConvGeometry
            The same convolution of other images.

        Returns
        -------
        TiledPlan
            A plan of the same direction.
        """
        if geometry == self.geometry:
            return self
        vertical, horizontal = (axis_tiles(geometry, axis, side) for axis, side in enumerate(self.tile))
        return replace(self, geometry=geometry, grid=TileGrid(vertical, horizontal, geometry.input_size[0]))

    def _kernel_layout(self) -> Hashable:
        phases = self.grid.vertical.tap_step, self.grid.horizontal.tap_step
        return SpectraLayout(self.transform, self.tile, phases)

    @property
    def choices(self) -> Choices:
        """Transform and tile."""
        return ("transform", self.transform), ("tile", self.tile)

    @property
    def uses_library(self) -> bool:
        """Whether its transform is a library's."""
        return registry.get(self.transform).is_library

    @property
    def summary(self) -> str:
        """Transform and tile in a few words."""
        return f"{self.transform} {self.tile[0]}×{self.tile[1]}"

    def _details(self) -> str:
        rows, columns = self.tiles
        kind = "fused blocks" if self.fused else "blocks"
        return (
            f"algorithm {self.algorithm}, transform {self.transform}, tile {self.tile[0]}x{self.tile[1]}, "
            f"tiles {rows}x{columns} an image ({self.grid.tiles} in all, {kind} of {self.block_tiles})"
            f"\n  scratch {self.scratch_bytes} bytes, kernels' spectra {self.weight_bytes} bytes"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class FftPlan(TiledPlan):
    """How a pass is computed by FFT, tile by tile. Its attributes are those of `TiledPlan`.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 5, 5), algorithm="fft", transform="fftw", tile=(24, 40))
    >>> plan.algorithm, plan.tile, plan.tiles
    ('fft', (24, 40), (2, 1))
    """

    algorithm: ClassVar[str] = "fft"

    __hash__ = ConvPlan.__hash__


@dataclass(frozen=True, kw_only=True, repr=False)
class WinogradPlan(TiledPlan):
    """How a pass is computed by Winograd's minimal filtering, tile by tile. Its attributes are those of `TiledPlan`.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 3, 3), algorithm="winograd", tile=6)
    >>> plan.algorithm, plan.tile, plan.tiles  # of 6 samples a side, 4 outputs
    ('winograd', (6, 6), (10, 10))
    """

    algorithm: ClassVar[str] = "winograd"

    __hash__ = ConvPlan.__hash__


#: The kind of plan of each algorithm that goes by tiles.
PLANS: dict[str, type[TiledPlan]] = {kind.algorithm: kind for kind in (FftPlan, WinogradPlan)}
