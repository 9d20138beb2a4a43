"""A pass under way: the numbers of its plan, the memory that it borrows, and the tasks that it will run."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfftconv import jit, scratch, split_product, threads
from nbfftconv.accumulate import COMPLEX, REAL, Matrix
from nbfftconv.forking import cached_property
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.plan import TiledPlan, filters_of_block
from nbfftconv.passes.views import View, input_view, output_view, weight_view
from nbfftconv.passes.workspace import Strips, transform_numbers, workspace_numbers
from nbfftconv.program import Operand
from nbfftconv.records import Record
from nbfftconv.rounding import cdiv
from nbfftconv.scratch import Memory
from nbfftconv.target import LINE_BYTES
from nbfftconv.transforms import TileTransform, bin_stride, registry

#: What a pass reads or writes.
Array = np.ndarray | Operand


@dataclass(frozen=True)
class Spectra:
    """Memory for the spectra of tiles or of kernels, and the distances in it.

    Attributes
    ----------
    array : numpy.ndarray
        Their bytes.
    address : int
        Of the first.
    lane_block, bin : int
        Bytes from one lane block, or one bin, to the next.
    """

    array: np.ndarray
    address: int
    lane_block: int
    bin: int

    def from_lane_block(self, first: int) -> "Spectra":
        """Return the spectra without those of the first lane blocks."""
        begin = first * self.lane_block
        return Spectra(self.array[begin:], self.address + begin, self.lane_block, self.bin)


class Numbers:
    """What all calls of a plan have in common.

    Parameters
    ----------
    plan, geometry
        As of `Context`.
    transform : TileTransform
        Of the plan's tiles.
    workers, transform_workers : int
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
        Tiles, or filters, in a lane block.
    views : dict
        The `View` of "input", "weight" and "output".
    all_lane_blocks, most_lane_blocks : int
        Lane blocks of tiles of the batch, and of a block.
    bins : int
        Bins of a spectrum.
    blocking : Blocking
        Of the products of its entries.
    entry : int
        Bytes of an entry.
    workers, transform_workers : int
        Threads to use at most; in stages that transform tiles.
    areas : int
        Threads that have scratch memory.
    transform_numbers : dict
        For "input", "weight" and "output" the numbers of `TRANSFORM`.
    workspace_numbers : tuple of int
        Of the record of this name, without an address.
    strips : dict
        The `Strips` of "weight" and "output".
    filter_block : int
        Of a fused pass: filters of a group that a work item convolves with what it transformed of the input.
    fused_spectra : dict
        Of a fused pass: where in a worker's memory the spectra of "input" and "output" are, as numbers of `SPECTRA`.
    """

    def __init__(
        self, plan: TiledPlan, geometry: ConvGeometry, transform: TileTransform, workers: int, transform_workers: int
    ) -> None:
        grid, layout, itemsize = plan.grid, transform.layout, plan.dtype.itemsize
        self.plan, self.transform = plan, transform  # whose addresses are in the records
        self.real = plan.dtype.type
        self.workers, self.transform_workers = workers, transform_workers
        self.areas = max(workers, transform_workers)
        self.groups = geometry.groups
        self.depth = geometry.input_size[1] * grid.channel_phases
        self.filters = geometry.weight_size[0]
        self.group_depth, self.group_filters = self.depth // self.groups, self.filters // self.groups
        self.lanes, self.bins = layout.lanes, layout.bins
        self.blocking = REAL if layout.vectors == 1 else COMPLEX
        self.entry = self.blocking.entry_bytes
        self.views: dict[str, View] = {
            "input": input_view(geometry, grid, self.lanes, itemsize),
            "weight": weight_view(geometry, grid, self.lanes, itemsize),
            "output": output_view(geometry, grid, self.lanes, itemsize),
        }
        self.all_lane_blocks = self.views["input"].lane_blocks
        self.most_lane_blocks = cdiv(plan.block_tiles, self.lanes)
        self.transform_numbers = {
            name: transform_numbers(transform, name, plan.tile[0], itemsize) for name in self.views
        }
        self._describe_memory()
        self._records: dict[str, Record] = {}

    def _describe_memory(self) -> None:
        """Lay out a worker's memory: for tiles, for strips of what is written, and for the spectra of a fused pass."""
        written = {"forward": "output", "grad_weight": "weight"}.get(self.plan.direction) if self.lanes > 1 else None
        lane_blocks = self.most_lane_blocks if self.plan.fused else 1
        buffers = 0 if written is None else lane_blocks
        address, _, *offsets, end = workspace_numbers(self.transform, self.plan.tile[0], self.real, buffers)
        layout, itemsize = self.transform.layout, self.plan.dtype.itemsize
        self.strips = {name: Strips.of(self.views[name], layout, itemsize) for name in ("weight", "output")}
        worker = end + (0 if written is None else self.strips[written].nbytes)
        if self.plan.fused:
            self.filter_block = self._filter_block()
            self.fused_spectra = {}
            for name, channels in (
                ("input", self.group_depth),
                ("output", min(self.blocking.fused_rows, self.filter_block)),
            ):
                stride = self._bin_stride(channels)
                lane_block = self.bins * stride
                self.fused_spectra[name] = worker, lane_block, stride
                worker += self.most_lane_blocks * lane_block
        self.workspace_numbers = address, worker, *offsets, end

    def _bin_stride(self, channels: int) -> int:
        return int(bin_stride(channels, self.entry))

    def _filter_block(self) -> int:
        """Return the filters of a work item: fewer where tiles alone would not feed all threads."""
        most = int(filters_of_block(self.group_filters, self.group_depth, self.lanes))
        items, vectors = self.groups * cdiv(self.all_lane_blocks, self.most_lane_blocks), cdiv(most, self.lanes)
        parts = 1
        while parts < vectors and items * parts < 2 * self.workers and items * parts % self.workers != 0:
            parts += 1
        return min(most, cdiv(vectors, parts) * self.lanes)

    def record(self, name: str, make: Callable[["Numbers"], Record]) -> Record:
        """Return a copy of a record that is made once: to fill it in takes longer than a small stage."""
        record = self._records.get(name)
        if record is None:
            self._records[name] = record = make(self)
        return record.copy()


_numbers = functools.lru_cache(maxsize=256)(Numbers)


class Context(Numbers):
    """One pass under way: its tasks, and what keeps the addresses in their records alive.

    Parameters
    ----------
    plan : TiledPlan
    geometry : ConvGeometry
        The plan's, or the same with the padding applied beforehand.

    Attributes
    ----------
    outliers : numpy.ndarray
        For each worker whether it met outliers.
    tasks : list
        Those that were added, and are to be run.
    first_lane_block, lane_blocks : int
        Of the block of tiles under way, the first lane block, and how many there are.
    """

    def __init__(self, plan: TiledPlan, geometry: ConvGeometry) -> None:
        kind = registry.get(plan.transform)
        transform = kind.make(plan.dtype.type, plan.tile, plan.taps)
        workers, library_workers = threads.get_workers(plan.seconds)
        # made once a plan, and shared by its calls
        numbers = _numbers(plan, geometry, transform, workers, library_workers if kind.is_library else workers)
        vars(self).update(vars(numbers))
        self.first_lane_block = self.lane_blocks = 0
        self.tasks: list[threads.Task] = []
        self._kept: list[np.ndarray] = []
        self.outliers = self.zeroed(self.areas, np.int64)

    @property
    def met_outliers(self) -> bool:
        """Whether a stage met outliers, which it took as zero."""
        return any(self.outliers.tolist())

    def address(self, array: Array) -> int:
        """Return the address of an array, which is kept alive with this."""
        if isinstance(array, Operand):
            return array.address
        self._kept.append(array)
        return array.ctypes.data

    def borrow(self, nbytes: int) -> Memory:
        """Return scratch memory, lent as long as this is alive."""
        memory = scratch.borrow(nbytes)
        self._kept.append(memory.array)
        return memory

    def zeroed(self, count: int, dtype: type) -> Any:
        """Return an array of zeros."""
        return np.zeros(count, dtype)

    def clear(self, memory: Memory, areas: int, area: int, begin: int, end: int) -> None:
        """Clear some bytes of each of several areas of scratch memory."""
        memory.array[: areas * area].reshape(areas, area)[:, begin:end] = 0

    def point(self, record: Record, name: str, spectra: Spectra) -> None:
        """Let the fields of that name, of type `nbfftconv.passes.views.SPECTRA`, point to spectra."""
        self._kept.append(spectra.array)
        record[f"{name}.address"] = spectra.address
        record[f"{name}.lane_block"], record[f"{name}.bin"] = spectra.lane_block, spectra.bin

    def add(self, stage: jit.Callback, record: Record, items: int) -> None:
        """Add the task of a stage that transforms tiles; its record has a `workspace`."""
        record["workspace.address"] = self.workspace
        self.tasks.append(threads.Task(stage.address(self.real), record, items, self.transform_workers))

    @cached_property
    def workspace(self) -> int:
        """Address of the workers' memory; tasks follow each other, so they share it."""
        _, worker, _, work, factors, *_ = self.workspace_numbers
        memory = self.borrow(self.areas * worker)
        if factors > work:  # as transforms expect their work
            self.clear(memory, self.areas, worker, work, factors)
        return memory.address

    def add_task(self, task: threads.Task) -> None:
        """Add another task."""
        self.tasks.append(task)

    def run(self) -> None:
        """Run the tasks that were added."""
        threads.run(*self.tasks)
        self.tasks.clear()

    def _spectra(self, lane_blocks: int, channels: int, is_kept: bool) -> Spectra:
        """Make room for the spectra of some lane blocks and channels, to outlive the call if `is_kept`."""
        stride = self._bin_stride(channels)
        array, address = (scratch.lasting if is_kept else self.borrow)(lane_blocks * self.bins * stride)
        return Spectra(array, address, self.bins * stride, stride)

    def input_spectra(self, is_kept: bool = False) -> Spectra:
        """Make room for the input's spectra of a block of tiles, or, to outlive the call, of all tiles."""
        return self._spectra(self.all_lane_blocks if is_kept else self.most_lane_blocks, self.depth, is_kept)

    def output_spectra(self) -> Spectra:
        """Make room for the output's spectra of a block of tiles."""
        return self._spectra(self.most_lane_blocks, self.filters, is_kept=False)

    def weight_spectra(self, is_kept: bool = False) -> Spectra:
        """Make room for the spectra of all kernels, to outlive the call if `is_kept`."""
        return self._spectra(self.groups * self.views["weight"].lane_blocks, self.group_depth, is_kept)

    @cached_property
    def finished(self) -> int:
        """Address of room for each worker's spectra of a line of channels, finished there before they are written."""
        return self.borrow(self.areas * self.bins * max(self.entry, LINE_BYTES)).address

    @cached_property
    def panels(self) -> Memory:
        """Room for a panel of a product, for each worker."""
        return self.borrow(self.workers * self.blocking.panel_bytes)

    def room_for_parts(self, rows: int, lane_blocks: int, depth: int) -> Memory | None:
        """Return room for the parts of numbers where products of a group and bin are the matrix unit's, else None."""
        share = split_product.share_of_vectors(self.real, self.blocking.vectors, rows, lane_blocks, depth)
        return self._parts if share < 1 else None

    @cached_property
    def _parts(self) -> Memory:
        return self.borrow(self.workers * split_product.WORKER_BYTES)

    @property
    def block_tiles(self) -> int:
        """Tiles of the block under way."""
        first = self.first_lane_block * self.lanes
        return min(self.lane_blocks * self.lanes, self.views["input"].tiles - first)

    def tile_matrix(self, spectra: Spectra, group_channels: int, row: str, column: str) -> Matrix:
        """Return spectra of tiles as an operand.

        `row` and `column` name what the rows and columns are: "channel", "lane block", or, as column, "tile".
        """
        strides = {"lane block": spectra.lane_block, "channel": self.entry, "tile": self.plan.dtype.itemsize}
        return Matrix(
            self.real,
            spectra.address,
            group=group_channels * self.entry,
            row=strides[row],
            column=strides[column],
            bin=spectra.bin,
            lane_axis="column" if column == "tile" else None,
            vectors=spectra.lane_block,
            blocking=self.blocking,
        )

    def weight_matrix(self, spectra: Spectra, filter_axis: str) -> Matrix:
        """Return the kernels' spectra as an operand whose "row" or "column" is the filter."""
        lanes = self.lanes > 1
        strides = {"row": self.entry, "column": self.entry}
        strides[filter_axis] = self.plan.dtype.itemsize if lanes else spectra.lane_block
        return Matrix(
            self.real,
            spectra.address,
            group=self.views["weight"].lane_blocks * spectra.lane_block,
            **strides,
            bin=spectra.bin,
            lane_axis=filter_axis if lanes else None,
            vectors=spectra.lane_block,
            blocking=self.blocking,
        )

    def blocks(self) -> Iterator[int]:
        """Let one block of tiles after the other be under way, yielding the number of its lane blocks."""
        for first in range(0, self.all_lane_blocks, self.most_lane_blocks):
            self.first_lane_block = first
            self.lane_blocks = min(self.most_lane_blocks, self.all_lane_blocks - first)
            yield self.lane_blocks
