"""The record that every stage of a pass reads: addresses, sizes and the tile grid of one call."""

import math
from dataclasses import dataclass, field

import numpy as np

from nbfftconv import jit, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.plan import ConvPlan
from nbfftconv.transforms import Transform, plane_stride
from nbfftconv.transforms.fftw import fftw

_AXIS_FIELDS = (
    "tile", "taps", "core", "count", "image_phases", "channel_phases", "input_step", "output_step", "tap_step",
    "stride", "dilation", "before", "input", "output", "kernel",
)  # fmt: skip

_RECORD = np.dtype(
    [
        # C-contiguous arrays; `output` is grad_output in the backward passes, whatever is not used is 0
        *((name, np.int64) for name in ("input", "weight", "output", "bias")),
        # spectra, `spectrum` bytes each, the imaginary plane `imaginary` bytes behind the real one
        *((name, np.int64) for name in ("input_spectra", "weight_spectra", "output_spectra", "spectrum", "imaginary")),
        # the transform; `scratch` has `slot` bytes a thread, a tile and `work` bytes behind its start the transform's work
        *((name, np.int64) for name in ("forward", "inverse", "context", "scratch", "slot", "work")),
        # `outliers[slot]` is set where a stage met an outlier
        ("outliers", np.int64),
        # channels and filters are those of all groups, depth those of one filter, with channel phases
        *((name, np.int64) for name in ("channels", "filters", "depth", "channel_phases", "relu")),
        # the block of tiles under way
        *((name, np.int64) for name in ("first_tile", "tiles")),
        *((f"{axis}_{name}", np.int64) for axis in "yx" for name in _AXIS_FIELDS),
    ]
)

stage = jit.stage(_RECORD)


def _aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Uninitialised array that begins at a cache line, as FFTW's plans expect it."""
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype)


def spectra_shape(plan: ConvPlan) -> tuple[int, int, int]:
    """Return the shape (filters, depth, scalars) of the kernels' spectra."""
    filters, channels = plan.geometry.weight_size[:2]
    frequencies = plan.tile[0] * (plan.tile[1] // 2 + 1)
    return filters, channels * plan.grid.channel_phases, 2 * plane_stride(frequencies, plan.dtype.itemsize)


def empty_spectra(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return uninitialised memory for spectra."""
    return _aligned(math.prod(shape), dtype).reshape(shape)


@dataclass
class Call:
    """One pass under way: its record, and what keeps the record's addresses alive."""

    plan: ConvPlan
    real: type
    slots: int
    record: np.ndarray
    outliers: np.ndarray
    _kept: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def begin(cls, plan: ConvPlan, geometry: ConvGeometry) -> "Call":
        """Start a pass; `geometry` is the plan's, or the same with the padding applied beforehand."""
        real = plan.dtype.type
        grid = plan.grid
        itemsize = plan.dtype.itemsize
        transform: Transform = fftw(real, *plan.tile)
        plane = plane_stride(transform.frequencies, itemsize)
        slots = threads.get_num_threads()
        record = np.zeros((), _RECORD)
        for index, (axis, tiles) in enumerate((("y", grid.vertical), ("x", grid.horizontal))):
            for name in _AXIS_FIELDS[:9]:
                record[f"{axis}_{name}"] = getattr(tiles, name)
            # a larger step leaves the image at the first sample all the same
            record[f"{axis}_input_step"] = min(tiles.input_step, 2**33)
            record[f"{axis}_stride"] = geometry.stride[index]
            record[f"{axis}_dilation"] = geometry.dilation[index]
            record[f"{axis}_before"] = geometry.padding[index][0]
            record[f"{axis}_input"] = geometry.input_size[2 + index]
            record[f"{axis}_output"] = geometry.output_size[2 + index]
            record[f"{axis}_kernel"] = geometry.weight_size[2 + index]
        record["channels"] = geometry.input_size[1]
        record["filters"] = geometry.weight_size[0]
        record["channel_phases"] = grid.channel_phases
        record["depth"] = geometry.weight_size[1] * grid.channel_phases
        record["spectrum"] = 2 * plane * itemsize
        record["imaginary"] = plane * itemsize
        record["forward"], record["inverse"], record["context"] = transform.forward, transform.inverse, transform.context
        work = -(-plan.tile[0] * plan.tile[1] * itemsize // 64) * 64
        slot = work + -(-transform.work_items * itemsize // 64) * 64
        record["work"], record["slot"] = work, slot
        outliers = np.zeros(slots, np.int64)
        record["outliers"] = outliers.ctypes.data
        call = cls(plan, real, slots, record, outliers)
        call.point("scratch", _aligned(slots * slot // itemsize, plan.dtype))
        return call

    def point(self, name: str, array: np.ndarray) -> None:
        """Point a field of the record to an array's memory."""
        self._kept.append(array)
        self.record[name] = array.ctypes.data

    def run(self, stage: jit.Callback, items: int) -> None:
        """Run a stage over its work items."""
        threads.run(stage.address(self.real), self.record.ctypes.data, items, self.slots)

    def blocks(self):
        """Set the record to one block of tiles after the other, yielding the number of its tiles."""
        for first in range(0, self.plan.grid.tiles, self.plan.block_tiles):
            tiles = min(self.plan.block_tiles, self.plan.grid.tiles - first)
            self.record["first_tile"], self.record["tiles"] = first, tiles
            yield tiles
