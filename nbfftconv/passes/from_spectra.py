"""Spectra to an array: tiles are transformed back, scaled and written, whichever view they are given.

Tiles of a view that is written lie side by side. Where they overlap, they are added: `nbfftconv.passes.grad_input`.
"""

from typing import Any

import numpy as np

from nbfftconv import jit, simd
from nbfftconv.arrays import is_streamed
from nbfftconv.jit import njit
from nbfftconv.passes.context import Array, Context, Numbers, Spectra
from nbfftconv.passes.tiles import write_rows
from nbfftconv.passes.views import (
    SPECTRA,
    VIEW,
    address_in,
    channel_of,
    column_step,
    first_sample,
    inside,
    next_position,
    position_of,
    row_step,
    tiles_of,
)
from nbfftconv.passes.workspace import (
    STRIPS,
    TRANSFORM,
    WORKSPACE,
    memory_of,
    places_of,
    point_to_array,
    point_to_strips,
)
from nbfftconv.records import RecordType, fields
from nbfftconv.simd import VECTOR_BYTES

#: `bias` is the address of what is added, for each channel, or 0. Negative values are clipped if `relu` is 1, and lines
#: are written past the caches if `stream` is 1.
FROM_SPECTRA = fields(
    "first_lane_block", "bias", "relu", "stream",
    spectra=SPECTRA, target=VIEW, transform=TRANSFORM, workspace=WORKSPACE, strips=STRIPS,
)  # fmt: skip
_RECORD = RecordType(FROM_SPECTRA)


def streams(numbers: Numbers, name: str, array: Array) -> bool:
    """Tell whether the "weight" or "output" is to be written past the caches.

    Where tiles are written to where they belong, a row's lines have to be whole: those that are not would have to be
    read from memory.
    """
    rows_are_lines = numbers.views[name].y.stride % VECTOR_BYTES == 0
    return is_streamed(array.nbytes) and (rows_are_lines or not getattr(numbers.transform, name).write)


@njit()
def _write_row_apart(real, source, target, columns, step, scale_and_bias, relu):
    """A row of `write_rows` to samples `step` apart."""
    samples, values = simd.pointer(real, source), simd.pointer(real, target)
    for j in range(columns):
        value = samples[j] * scale_and_bias[0] + scale_and_bias[1]
        values[j * step] = real(0) if relu != 0 and value < real(0) else value  # NaN passes


@njit()
def _extent(v, position, channel_phases, count):
    """Return where `count` tiles side by side begin, in bytes from their channel of image 0, and the rows and columns
    that the array has of them."""
    z, y, x = first_sample(v, position, channel_phases)
    _, rows = inside(v.y, y, 0, v.y.samples)
    _, columns = inside(v.x, x, 0, count * v.x.samples)
    return address_in(v, position.image, z, y, x), rows if z < v.z.size else 0, columns


@njit()
def _write(real, itemsize, r, source, source_row, target, rows, columns, factors):
    """Write rows to the array, times factors[0], plus factors[1]."""
    row, column = row_step(r.target), column_step(r.target)
    if column != itemsize:
        scale_and_bias = simd.pointer(real, factors)
        for i in range(rows):
            _write_row_apart(
                real, source + i * source_row, target + i * row, columns, column // itemsize, scale_and_bias, r.relu
            )  # fmt: skip
        return
    if source_row == row and columns * itemsize == row:
        rows, columns = 1, rows * columns
    write_rows(real, (source, source_row, target, row, rows, columns, factors, r.relu, r.stream))


@njit()
def _is_written_back(itemsize, r):
    """Tell whether the transform writes tiles to where they belong: of the array, columns are neighbours."""
    return r.transform.write != 0 and column_step(r.target) == itemsize


@njit()
def point_to_results(itemsize, r, worker, lane_block, index):
    """Let an indirection buffer, from 1 on, point to where the tiles of a lane block are written.

    It is asked for before channels of many tiles are transformed back by it.
    """
    v, memory = r.target, memory_of(r.workspace, worker)
    if _is_written_back(itemsize, r):
        point_to_array(v, r, memory, lane_block, (0, 0, 0), index)
    else:
        point_to_strips(itemsize, v, r, memory, lane_block, index)


@njit()
def lane_block_from_spectrum(real, itemsize, r, worker, lane_block, index, spectrum, stride, places):
    """Transform a lane block of tiles of one channel of the stride-1 problem back, and write what the array has of it.

    If it is of many tiles, the indirection buffer `places` is as `point_to_results` left it.
    """
    v, t, w = r.target, r.transform, r.workspace
    memory = memory_of(w, worker)
    factors, work = memory + w.factors, memory + w.work
    channel, channel_phases = channel_of(v, index)
    scale_and_bias = simd.pointer(real, factors)
    scale_and_bias[0] = real(1) / real(t.divisor)
    scale_and_bias[1] = simd.pointer(real, r.bias)[channel] if r.bias != 0 else real(0)
    address = v.address + channel * v.channel
    addresses = places_of(w, memory, places)
    if _is_written_back(itemsize, r):
        simd.call(
            t.write, (t.context, addresses, address, work, spectrum, stride, v.y.samples, factors, r.relu, r.stream)
        )  # fmt: skip
        return
    tile, count = tiles_of(v, t.lanes, lane_block)
    position = position_of(v, tile)
    together = min(count, v.x.tiles - position.x)
    offset, rows, columns = _extent(v, position, channel_phases, together)
    if t.lanes == 1:
        simd.call(t.inverse, (t.context, memory, work, spectrum, stride, v.y.samples, v.x.samples))
        _write(real, itemsize, r, memory, t.row, address + offset, rows, columns, factors)
        return
    strips = memory + w.strips
    simd.call(t.inverse, (t.context, addresses, strips, r.strips.row, work, spectrum, stride, v.y.samples))
    lane = 0
    while True:
        source = strips + simd.pointer(np.int64, addresses)[lane]
        _write(real, itemsize, r, source, r.strips.row, address + offset, rows, columns, factors)
        lane += together
        if lane >= count:
            return
        if v.image_tiles == 1:
            offset += v.image
        else:
            position = next_position(v, position, together)
            together = min(count - lane, v.x.tiles)
            offset, rows, columns = _extent(v, position, channel_phases, together)


def _stage(real):
    itemsize = np.dtype(real).itemsize

    def from_spectra(r, worker, begin, end):
        v, s = r.target, r.spectra
        channels = v.channels * v.channel_phases
        pointed = -1
        for item in range(begin, end):
            lane_block, index = item // channels, item % channels
            if r.transform.lanes > 1 and lane_block != pointed:
                point_to_results(itemsize, r, worker, r.first_lane_block + lane_block, 1)
                pointed = lane_block
            spectrum = s.address + lane_block * s.lane_block + index * r.transform.entry
            lane_block_from_spectrum(
                real, itemsize, r, worker, r.first_lane_block + lane_block, index, spectrum, s.bin, 1
            )  # fmt: skip
        if r.stream != 0:
            simd.fence()

    return from_spectra


_from_spectra = jit.stage(_RECORD)(_stage)


def from_spectra_numbers(numbers: Numbers, name: str, spectra: tuple[int, int, int] = (0, 0, 0)) -> tuple[Any, ...]:
    """Return the numbers of `FROM_SPECTRA` for the "weight" or "output", without addresses."""
    memory = numbers.transform_numbers[name], numbers.workspace_numbers, numbers.strips[name]
    return 0, 0, 0, 0, spectra, numbers.views[name], *memory


def add_from_spectra(
    context: Context,
    name: str,
    spectra: Spectra,
    array: Array,
    bias: Array | None = None,
    relu: bool = False,
) -> None:
    """Transform spectra back and write them: of "output" the tiles of the block under way, of "weight" all kernels."""
    record = context.record(f"{name} from spectra", lambda numbers: _RECORD.make(from_spectra_numbers(numbers, name)))
    context.point(record, "spectra", spectra)
    record["target.address"] = context.address(array)
    if bias is not None:
        record["bias"] = context.address(bias)
    record["relu"], record["stream"] = relu, streams(context, name, array)
    view = context.views[name]
    lane_blocks = context.groups * view.lane_blocks
    if name == "output":
        record["first_lane_block"], lane_blocks = context.first_lane_block, context.lane_blocks
    context.add(_from_spectra, record, lane_blocks * view.channels * view.channel_phases)
