"""The record that every stage of a pass reads: addresses, sizes and the tile grid of one call."""

import math
from collections.abc import Iterator

import numpy as np

from nbfftconv import jit, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.plan import ConvPlan
from nbfftconv.transforms import plane_stride
from nbfftconv.transforms.fftw import fftw

_TILE_FIELDS = (
    "tile", "taps", "core", "count", "image_phases", "channel_phases", "input_step", "output_step", "tap_step",
)  # fmt: skip
_AXIS_FIELDS = (*_TILE_FIELDS, "stride", "dilation", "before", "input", "output", "kernel")

_RECORD = np.dtype(
    [
        # C-contiguous arrays; `output` is grad_output in the backward passes, whatever is not used is 0
        *((name, np.int64) for name in ("input", "weight", "output", "bias")),
        # spectra, `spectrum` bytes each, the imaginary plane `imaginary` bytes behind the real one
        *((name, np.int64) for name in ("input_spectra", "weight_spectra", "output_spectra", "spectrum", "imaginary")),
        # the transform; `scratch` has `slot` bytes a thread, a tile and `work` bytes behind its start the transform's
        # work
        *((name, np.int64) for name in ("forward", "inverse", "context", "scratch", "slot", "work")),
        # `outliers[slot]` is set where a stage met an outlier
        ("outliers", np.int64),
        # those of all groups; every channel has `channel_phases` spectra
        *((name, np.int64) for name in ("channels", "filters", "channel_phases", "relu")),
        # the block of tiles under way
        *((name, np.int64) for name in ("first_tile", "tiles")),
        *((f"{axis}_{name}", np.int64) for axis in "yx" for name in _AXIS_FIELDS),
    ]
)

stage = jit.stage(_RECORD)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Uninitialised array that begins at a cache line, as FFTW's plans expect it."""
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype)


class Call:
    """One pass under way: its record, and what keeps the record's addresses alive.

    Parameters
    ----------
    plan : ConvPlan
    geometry : ConvGeometry
        The plan's, or the same with the padding applied beforehand.

    Attributes
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    groups, group_depth, group_filters : int
        Groups, and the channels (with their phases) and filters of one.
    depth, filters : int
        Channels (with their phases) and filters of all groups: the spectra of a tile.
    plane : int
        Scalars of a plane of a spectrum.
    slots : int
        Threads to use at most.
    """

    def __init__(self, plan: ConvPlan, geometry: ConvGeometry) -> None:
        grid = plan.grid
        itemsize = plan.dtype.itemsize
        self.plan = plan
        self.real = plan.dtype.type
        self.slots = threads.get_num_threads()
        self.groups = geometry.groups
        self.depth = geometry.input_size[1] * grid.channel_phases
        self.filters = geometry.weight_size[0]
        self.group_depth, self.group_filters = self.depth // self.groups, self.filters // self.groups
        transform = fftw(self.real, *plan.tile)
        self.plane = plane_stride(transform.frequencies, itemsize)

        self._kept: list[np.ndarray] = []
        self._outliers = np.zeros(self.slots, np.int64)
        self.record = record = np.zeros((), _RECORD)
        for index, (axis, tiles) in enumerate((("y", grid.vertical), ("x", grid.horizontal))):
            for name in _TILE_FIELDS:
                record[f"{axis}_{name}"] = getattr(tiles, name)
            # A larger step leaves the image at the first sample all the same.
            record[f"{axis}_input_step"] = min(tiles.input_step, 2**33)
            record[f"{axis}_stride"] = geometry.stride[index]
            record[f"{axis}_dilation"] = geometry.dilation[index]
            record[f"{axis}_before"] = geometry.padding[index][0]
            record[f"{axis}_input"] = geometry.input_size[2 + index]
            record[f"{axis}_output"] = geometry.output_size[2 + index]
            record[f"{axis}_kernel"] = geometry.weight_size[2 + index]
        record["channels"], record["filters"] = geometry.input_size[1], self.filters
        record["channel_phases"] = grid.channel_phases
        record["spectrum"], record["imaginary"] = 2 * self.plane * itemsize, self.plane * itemsize
        record["forward"], record["inverse"], record["context"] = (
            transform.forward,
            transform.inverse,
            transform.context,
        )
        work = _whole_lines(plan.tile[0] * plan.tile[1] * itemsize)
        slot = work + _whole_lines(transform.work_items * itemsize)
        record["work"], record["slot"] = work, slot
        self.point("outliers", self._outliers)
        self.point("scratch", _aligned(self.slots * slot // itemsize, plan.dtype))

    @property
    def met_outliers(self) -> bool:
        """Whether a stage met outliers, which it took as zero."""
        return bool(self._outliers.any())

    def point(self, name: str, array: np.ndarray) -> None:
        """Point a field of the record to an array's memory."""
        self._kept.append(array)
        self.record[name] = array.ctypes.data

    def run(self, stage: jit.Callback, items: int) -> None:
        """Run a stage over its work items."""
        threads.run(stage.address(self.real), self.record.ctypes.data, items, self.slots)

    def empty_spectra(self, name: str, *shape: int) -> np.ndarray:
        """Point a field to uninitialised memory for spectra, returned with the given shape and one axis more."""
        spectra = _aligned(math.prod(shape) * 2 * self.plane, self.plan.dtype)
        self.point(name, spectra)
        return spectra.reshape(*shape, 2 * self.plane)

    def empty_block(self) -> tuple[np.ndarray, np.ndarray]:
        """Make room for the input's and the output's spectra of a block of tiles, ``[tile, channel, scalar]``."""
        block = self.plan.block_tiles
        return self.empty_spectra("input_spectra", block, self.depth), self.empty_spectra(
            "output_spectra", block, self.filters
        )

    def blocks(self) -> Iterator[int]:
        """Set the record to one block of tiles after the other, yielding the number of its tiles."""
        for first in range(0, self.plan.grid.tiles, self.plan.block_tiles):
            tiles = min(self.plan.block_tiles, self.plan.grid.tiles - first)
            self.record["first_tile"], self.record["tiles"] = first, tiles
            yield tiles
