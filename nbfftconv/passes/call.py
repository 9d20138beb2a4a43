"""The record that every stage of a pass reads: addresses, sizes and the tile grid of one call."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nbfftconv import jit, scratch, threads
from nbfftconv.accumulate import ROWS, Matrix, panel_bytes
from nbfftconv.geometry import AXIS_NUMBERS, ConvGeometry
from nbfftconv.passes.plan import FftPlan, filters_of_block
from nbfftconv.scratch import Memory
from nbfftconv.transforms import COMPLEX_BYTES, TileTransform, place_bytes, registry, step_stride

_TILE_FIELDS = (
    "tile", "taps", "core", "count", "image_phases", "channel_phases", "input_step", "output_step", "tap_step",
)  # fmt: skip
_AXIS_FIELDS = (*_TILE_FIELDS, *AXIS_NUMBERS)

_RECORD = np.dtype(
    [
        # C-contiguous arrays; in the backward passes `output` is grad_output, and `sums`, in float64, its sums over
        # images and pixels; whatever is not used is 0
        *((name, np.int64) for name in ("input", "weight", "output", "bias", "sums")),
        # spectra; a unit is `lanes` tiles or filters, whose spectra for one channel are made together
        ("lanes", np.int64),
        ("steps", np.int64),
        *(
            (f"{array}_{name}", np.int64)
            for array in ("input", "weight", "output")
            for name in ("spectra", "unit", "step_bytes")  # address, and bytes from one to the next
        ),
        # of grad_input: parts of the tiles, and whether a part clears the gradient before it adds tiles; where a thread
        # sums up an image, `plane` bytes from one to the next, or 0
        *((name, np.int64) for name in ("parts", "clear", "planes", "plane")),
        # the transform; of `scratch`, `slot` bytes are a thread's: the tiles of a unit, `tile` bytes each with rows of
        # `pitch` scalars, `work` bytes behind them the transform's work, and a cache line for the factors of a row
        *((name, np.int64) for name in ("forward", "inverse", "context", "scratch", "slot", "tile", "pitch", "work")),
        ("factors", np.int64),
        # of transforms of many tiles: where they are (see `nbfftconv.passes.places`), `place` bytes a row; and, of
        # those side by side, strips of rows `strip_pitch` bytes apart, `strip_bytes` from one to the next
        *((name, np.int64) for name in ("places", "place", "strips", "strip_pitch", "strip_bytes")),
        # of the kernels: where each thread finishes a spectrum before it is written past the caches; 0 if it is not
        ("finished", np.int64),
        ("has_zeros", np.int64),  # of the kernels: for each filter, as uint8, whether one of its weights is zero
        ("largest", np.int64),  # a vector of the largest magnitudes of a unit
        # of a fused pass, in the scratch memory of a thread: spectra of a block of units for a share of the filters
        *((name, np.int64) for name in ("slot_input", "slot_output", "block_units", "share")),
        # `outliers[slot]` is set where a stage met an outlier
        ("outliers", np.int64),
        # those of all groups; every channel has `channel_phases` spectra
        *((name, np.int64) for name in ("groups", "channels", "filters", "channel_phases", "relu", "stream")),
        # units of filters of a group; tiles of the batch; the block of units of tiles under way
        *((name, np.int64) for name in ("group_units", "all_tiles", "first_unit", "units")),
        *((f"{axis}_{name}", np.int64) for axis in "yx" for name in _AXIS_FIELDS),
    ]
)

stage = jit.stage(_RECORD)

#: As much of a core's own cache may hold a spectrum until it is written.
_FINISHED_BYTES = 2**18


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@dataclass(frozen=True)
class Spectra:
    """Memory for the spectra of tiles or of kernels, and the distances in it.

    Attributes
    ----------
    array : numpy.ndarray
        Their bytes.
    address : int
        Of the first.
    unit, step : int
        Bytes from one unit (`lanes` tiles or filters), or one step, to the next.
    """

    array: np.ndarray
    address: int
    unit: int
    step: int

    def from_unit(self, first: int) -> "Spectra":
        """Return the spectra without those of the first units."""
        begin = first * self.unit
        return Spectra(self.array[begin:], self.address + begin, self.unit, self.step)


class _Numbers:
    """What all calls of a plan have in common.

    Parameters
    ----------
    plan, geometry
        As of `Call`.
    transform : TileTransform
        Of the plan's tiles.
    slots, transform_slots : int
        Threads to use at most; in stages that transform tiles.

    Attributes
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    groups, group_depth, group_filters : int
        Groups, and the channels (with their phases) and filters of one.
    depth, filters : int
        Channels (with their phases) and filters of all groups: the spectra of a tile.
    lanes : int
        Tiles, or filters, in a unit.
    group_units, block_units, all_units : int
        Units of filters of a group, and of tiles of a block and of the batch.
    steps : int
        Steps of a spectrum.
    slots, transform_slots : int
        Threads to use at most; in stages that transform tiles.
    areas : int
        Threads that have scratch memory.
    record : numpy.ndarray
        All numbers, and no address of an array.
    """

    def __init__(
        self, plan: FftPlan, geometry: ConvGeometry, transform: TileTransform, slots: int, transform_slots: int
    ) -> None:
        grid = plan.grid
        self.plan, self.transform = plan, transform  # whose addresses are in the record
        self.real = plan.dtype.type
        self.slots, self.transform_slots = slots, transform_slots
        self.areas = max(self.slots, self.transform_slots)
        self.groups = geometry.groups
        self.depth = geometry.input_size[1] * grid.channel_phases
        self.filters = geometry.weight_size[0]
        self.group_depth, self.group_filters = self.depth // self.groups, self.filters // self.groups
        layout = transform.layout
        self.lanes = layout.lanes
        self.group_units = -(-self.group_filters // self.lanes)
        self.block_units = -(-plan.block_tiles // self.lanes)
        self.all_units = -(-grid.tiles // self.lanes)
        self.steps = layout.steps

        self.record = record = np.zeros((), _RECORD)
        self._describe(geometry)
        record["forward"], record["inverse"], record["context"] = (
            transform.forward, transform.inverse, transform.context,
        )  # fmt: skip
        record["lanes"], record["pitch"], record["steps"] = layout.lanes, layout.pitch, layout.steps
        itemsize = plan.dtype.itemsize
        tile = plan.tile[0] * layout.pitch * itemsize
        work = _whole_lines(self.lanes * tile)
        factors = work + _whole_lines(transform.work_items * itemsize)
        record["tile"], record["work"], record["factors"] = tile, work, factors
        record["largest"] = largest = factors + 64
        record["places"] = end = largest + 64
        if self.lanes > 1:
            record["place"] = place = place_bytes(self.real, layout.pitch)
            record["strips"] = strips = end + _whole_lines(plan.tile[0] * place)
            end = strips + self._describe_strips()
        record["slot"] = end + (self._describe_fused(end) if plan.fused else 0)

    def _describe_strips(self) -> int:
        """Describe where tiles are put side by side; return the bytes."""
        vertical, horizontal = self.plan.grid.vertical, self.plan.grid.horizontal
        columns = min(self.lanes, horizontal.count) * horizontal.core
        if horizontal.output_step == 1 and horizontal.count <= self.lanes:  # as in the output: rows follow each other
            columns = int(self.record["x_output"])
        itemsize = self.plan.dtype.itemsize
        self.record["strip_pitch"] = pitch = columns * itemsize
        # what is written behind the last row of a strip hits the next one nowhere
        nbytes = _whole_lines(vertical.core * pitch + int(self.record["pitch"]) * itemsize)
        self.record["strip_bytes"] = nbytes
        # a row of tiles each, the first of which may begin before the unit; one for lanes without a tile
        return ((self.lanes - 2) // horizontal.count + 3) * nbytes

    def _describe_fused(self, begin: int) -> int:
        """Describe the spectra of a fused pass in a thread's memory from `begin`; return their bytes."""
        record, units = self.record, self.block_units
        record["block_units"], record["units"] = units, self.all_units
        record["share"] = share = filters_of_block(self.group_filters, self.group_depth, self.lanes)
        rows = min(ROWS, share)
        sizes: list[int] = []
        for name, channels in (("input", self.group_depth), ("output", rows)):
            record[f"slot_{name}"] = begin + sum(sizes)
            record[f"{name}_step_bytes"] = step_stride(channels)
            record[f"{name}_unit"] = unit = self.steps * step_stride(channels)
            sizes.append(units * unit)
        return sum(sizes)

    def _describe(self, geometry: ConvGeometry) -> None:
        record, grid = self.record, self.plan.grid
        for index, (axis, tiles) in enumerate((("y", grid.vertical), ("x", grid.horizontal))):
            for name in _TILE_FIELDS:
                record[f"{axis}_{name}"] = getattr(tiles, name)
            # A larger step leaves the image at the first sample all the same.
            record[f"{axis}_input_step"] = min(tiles.input_step, 2**33)
            for name, number in geometry.axis_numbers(index).items():
                record[f"{axis}_{name}"] = number
        record["groups"], record["channels"], record["filters"] = self.groups, geometry.input_size[1], self.filters
        record["channel_phases"] = grid.channel_phases
        record["group_units"], record["all_tiles"] = self.group_units, grid.tiles


_numbers = functools.lru_cache(maxsize=256)(_Numbers)


class Call(_Numbers):
    """One pass under way: its record, and what keeps the record's addresses alive.

    Parameters
    ----------
    plan : FftPlan
    geometry : ConvGeometry
        The plan's, or the same with the padding applied beforehand.
    """

    def __init__(self, plan: FftPlan, geometry: ConvGeometry) -> None:
        kind = registry.get(plan.transform)
        transform = kind.make(plan.dtype.type, *plan.tile)
        slots, library_slots = threads.get_slots()
        # made once a plan: filling in the record takes longer than a small stage
        vars(self).update(vars(_numbers(plan, geometry, transform, slots, library_slots if kind.is_library else slots)))
        self.record = record = jit.copy_record(self.record)
        self._tasks: list[threads.Task] = []
        self._kept: list[np.ndarray] = []
        self._outliers = np.zeros(self.areas, np.int64)
        self.point("outliers", self._outliers)
        slot, work, factors = (int(record[name]) for name in ("slot", "work", "factors"))
        memory = self._borrow("scratch", self.areas * slot).reshape(self.areas, slot)
        memory[:, work:factors] = 0  # as transforms expect their work

    @property
    def first_unit(self) -> int:
        """First unit of the block under way."""
        return int(self.record["first_unit"])

    @property
    def fused_items(self) -> int:
        """Work items of a fused pass."""
        units, share = int(self.record["units"]), int(self.record["share"])
        return self.groups * -(-self.group_filters // share) * -(-units // self.block_units)

    def use_spectra(self, name: str, spectra: Spectra) -> None:
        """Point the record to the "input", "weight" or "output" spectra."""
        self.keep(spectra.array)
        self.record[f"{name}_spectra"] = spectra.address
        self.record[f"{name}_unit"], self.record[f"{name}_step_bytes"] = spectra.unit, spectra.step

    @property
    def met_outliers(self) -> bool:
        """Whether a stage met outliers, which it took as zero."""
        return any(self._outliers.tolist())

    def point(self, name: str, array: np.ndarray) -> None:
        """Point a field of the record to an array's memory."""
        self.keep(array)
        self.record[name] = array.ctypes.data

    def _borrow(self, name: str, nbytes: int) -> np.ndarray:
        """Point a field to scratch memory, lent as long as this call is alive, and return its array."""
        memory = self.borrow(nbytes)
        self.record[name] = memory.address
        return memory.array[:nbytes]

    def add(self, stage: jit.Callback, items: int) -> None:
        """Add the task of a stage that transforms tiles, with the record as it is now."""
        record = jit.copy_record(self.record)
        self._tasks.append(threads.Task(stage.address(self.real), record, items, self.transform_slots))

    def add_task(self, task: threads.Task) -> None:
        """Add a task with a record of its own."""
        self._tasks.append(task)

    def borrow(self, nbytes: int) -> Memory:
        """Return scratch memory, lent as long as this call is alive."""
        memory = scratch.borrow(nbytes)
        self.keep(memory.array)
        return memory

    def keep(self, array: np.ndarray) -> None:
        """Keep an array alive whose address is in a record."""
        self._kept.append(array)

    def run(self) -> None:
        """Run the tasks that were added."""
        threads.run(*self._tasks)
        self._tasks.clear()

    def _spectra(self, name: str, units: int, channels: int, is_kept: bool) -> Spectra:
        """Make room for the "input", "weight" or "output" spectra of some units and channels."""
        step = step_stride(channels)
        unit = self.steps * step
        array, address = (scratch.lasting if is_kept else self.borrow)(units * unit)
        spectra = Spectra(array, address, unit, step)
        self.use_spectra(name, spectra)
        return spectra

    def input_spectra(self, is_kept: bool = False) -> Spectra:
        """Make room for the input's spectra of a block of tiles, or, to outlive the call, of all tiles."""
        return self._spectra("input", self.all_units if is_kept else self.block_units, self.depth, is_kept)

    def output_spectra(self) -> Spectra:
        """Make room for the output's spectra of a block of tiles."""
        return self._spectra("output", self.block_units, self.filters, is_kept=False)

    def weight_spectra(self, is_kept: bool = False) -> Spectra:
        """Make room for the spectra of all kernels, to outlive the call if `is_kept`."""
        return self._spectra("weight", self.groups * self.group_units, self.group_depth, is_kept)

    def finish_apart(self) -> None:
        """Make room for each thread to finish a spectrum in its cache, if that is not too large for it."""
        nbytes = self.steps * COMPLEX_BYTES
        if nbytes <= _FINISHED_BYTES:
            self._borrow("finished", self.areas * nbytes)

    @functools.cached_property
    def panels(self) -> Memory:
        """Room for a panel of a product, for each thread."""
        return self.borrow(self.slots * panel_bytes(self.real))

    def tiles_of(self, units: int) -> int:
        """Tiles of so many units of the block under way."""
        return min(units * self.lanes, self.plan.grid.tiles - self.first_unit * self.lanes)

    def borrow_planes(self, nbytes: int) -> None:
        """Make room for each thread to sum up one channel of an image, of so many bytes."""
        self.record["plane"] = plane = _whole_lines(nbytes)
        self._borrow("planes", self.areas * plane)

    def tile_matrix(self, spectra: Spectra, group_channels: int, row: str, column: str) -> Matrix:
        """Return spectra of tiles as an operand.

        `row` and `column` name the index that each of its indices is: "channel", "unit", or, as column, "tile".
        """
        strides = {"unit": spectra.unit, "channel": COMPLEX_BYTES, "tile": self.plan.dtype.itemsize}
        return Matrix(
            self.real,
            spectra.address,
            group=group_channels * COMPLEX_BYTES,
            row=strides[row],
            column=strides[column],
            step=spectra.step,
            lane_axis="column" if column == "tile" else None,
            vectors=spectra.unit,
        )

    def weight_matrix(self, spectra: Spectra, filter_axis: str) -> Matrix:
        """Return the kernels' spectra as an operand whose "row" or "column" is the filter."""
        lanes = self.lanes > 1
        strides = {"row": COMPLEX_BYTES, "column": COMPLEX_BYTES}
        strides[filter_axis] = self.plan.dtype.itemsize if lanes else spectra.unit
        return Matrix(
            self.real,
            spectra.address,
            group=self.group_units * spectra.unit,
            **strides,
            step=spectra.step,
            lane_axis=filter_axis if lanes else None,
            vectors=spectra.unit,
        )

    def blocks(self) -> Iterator[int]:
        """Set the record to one block of tiles after the other, yielding the number of its units."""
        for first in range(0, self.all_units, self.block_units):
            units = min(self.block_units, self.all_units - first)
            self.record["first_unit"], self.record["units"] = first, units
            yield units
