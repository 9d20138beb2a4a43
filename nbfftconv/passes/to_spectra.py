"""An array to spectra: the one stage that transforms input, kernels and gradient, whichever view it is given.

A tile is gathered with zeros around it, freed of outliers and transformed. Outliers (see `nbfftconv.outliers`) would
spread over their whole tile; they are taken as zero here, noted, and their products are added afterwards.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfftconv import jit, simd
from nbfftconv.accumulate import REAL
from nbfftconv.jit import njit
from nbfftconv.outliers import WORDS
from nbfftconv.passes.context import Array, Context, Numbers, Spectra
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.passes.tiles import clear_outliers, find_least, gather_tile, stream_bins
from nbfftconv.passes.views import (
    NO_TILE,
    SPECTRA,
    VIEW,
    channel_of,
    column_step,
    in_order_of_phases,
    next_position,
    position_of,
    row_step,
    tile_at,
    tiles_of,
)
from nbfftconv.passes.workspace import TRANSFORM, WORKSPACE, memory_of, point_to_array, point_to_tiles
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import LINE_BYTES, TARGET

#: Kernels' spectra of more bytes would not be found in the caches of a core, but drive out what is there.
_STREAMED_BYTES = 2 * TARGET.l2_bytes
#: As much of a core's own cache may hold a spectrum until it is written.
_FINISHED_BYTES = TARGET.l2_bytes // 8
#: So many bytes of weights are looked at for zeros, and then transformed: a core's own cache holds them in between.
_LOOKED_AT_BYTES = TARGET.l2_bytes // 16

#: `outliers` has a word for each worker, set where it met one. If it is not 0, at `has_zeros` is noted, as uint8, for
#: each image or filter whether one of its values is zero; and at `finished` each worker finishes the spectra of the
#: channels of a cache line before these are written past the caches: half a line takes as long as three whole ones.
TO_SPECTRA = fields(
    "first_lane_block", "outliers", "has_zeros", "finished",
    source=VIEW, spectra=SPECTRA, transform=TRANSFORM, workspace=WORKSPACE,
)  # fmt: skip
_RECORD = RecordType(TO_SPECTRA)


@njit()
def _gather(real, itemsize, v, t, channel, tile, target, largest):
    """Fill a tile with what the array has of it; the rest is zero. The vector of `largest` magnitudes is kept up to
    date."""
    rows, row, column = tile.below - tile.above, row_step(v), column_step(v)
    source = channel + tile.offset + tile.above * row
    if column == itemsize:
        gather_tile(real, (
            source, row, target, t.row, tile.above, rows, t.rows - tile.above - rows, tile.begin, tile.end,
            t.row_vectors, v.ahead, largest,
        ))  # fmt: skip
        return
    gather_tile(real, (channel, 0, target, t.row, t.rows, 0, 0, 0, 0, t.row_vectors, 0, largest))
    most = simd.pointer(real, largest)
    step = column // itemsize
    for i in range(rows):
        pixels, samples = simd.pointer(real, source + i * row), simd.pointer(real, target + (tile.above + i) * t.row)
        for j in range(tile.begin, tile.end):
            samples[j] = value = pixels[j * step]
            if most[0] == most[0] and not abs(value) <= most[0]:  # a NaN comes in, and stays
                most[0] = abs(value)


@njit()
def _gather_lane_block(real, itemsize, r, memory, channel, lane_block, channel_phases):
    """Gather the tiles of a lane block, one after the other, and their largest magnitudes."""
    v, t, w = r.source, r.transform, r.workspace
    largest = memory + w.largest
    most = simd.pointer(real, largest)
    for lane in range(VECTOR_BYTES // itemsize):
        most[lane] = real(0)
    tile, count = tiles_of(v, t.lanes, lane_block)
    position = position_of(v, tile)
    for lane in range(t.lanes):
        if lane > 0:
            position = next_position(v, position, 1)
        found = tile_at(v, position, channel_phases) if lane < count else NO_TILE
        _gather(real, itemsize, v, t, channel, found, memory + lane * w.tile, largest)


@njit()
def _met_outliers(word, limit, itemsize, r, worker, memory):
    """Tell whether magnitudes are over the limit, and note it."""
    most = simd.pointer(word, memory + r.workspace.largest)
    largest = word(0)
    for lane in range(VECTOR_BYTES // itemsize):
        largest = max(largest, most[lane])
    if largest > limit:
        simd.pointer(np.int64, r.outliers)[worker] = 1
        return True
    return False


@njit()
def _transform_tile(real, word, limit, itemsize, r, worker, memory, spectrum, stride):
    """Free the gathered tile of outliers, and transform it."""
    v, t = r.source, r.transform
    if _met_outliers(word, limit, itemsize, r, worker, memory):
        clear_outliers(real, (memory, t.rows * t.row_vectors))
    arguments = t.context, memory, memory + r.workspace.work, spectrum, stride, v.y.samples, v.x.samples
    simd.call(t.forward, arguments)


@njit()
def _transform_lane_block(real, r, memory, base, ahead, spectrum, stride):
    """Transform the tiles that the indirection buffer points to."""
    t, w = r.transform, r.workspace
    rows_at, work, largest = memory + w.indirection, memory + w.work, memory + w.largest
    simd.call(t.forward, (t.context, rows_at, base, work, spectrum, stride, r.source.y.samples, ahead, largest))


@njit()
def lane_block_to_spectrum(real, word, limit, itemsize, r, worker, lane_block, index, spectrum, stride, pointed):
    """Transform a lane block of tiles of one channel of the stride-1 problem.

    `pointed` tells what the indirection buffer points to: what the last call returned, or -1.
    """
    v, t = r.source, r.transform
    memory = memory_of(r.workspace, worker)
    channel, channel_phases = channel_of(v, index)
    base, ahead = v.address + channel * v.channel, v.ahead
    pointing = lane_block * v.channel_phases + index % v.channel_phases
    is_gathered = t.lanes == 1 or column_step(v) != itemsize
    if is_gathered:
        _gather_lane_block(real, itemsize, r, memory, base, lane_block, channel_phases)
        if t.lanes == 1:
            _transform_tile(real, word, limit, itemsize, r, worker, memory, spectrum, stride)
            return -1
        pointing = 0
        if pointed != pointing:
            point_to_tiles(r, memory, v.y.samples)
        _transform_lane_block(real, r, memory, memory, 0, spectrum, stride)
    else:
        if pointed != pointing:
            point_to_array(v, r, memory, lane_block, channel_phases, 0)
        _transform_lane_block(real, r, memory, base, ahead, spectrum, stride)
    if not _met_outliers(word, limit, itemsize, r, worker, memory):
        return pointing
    if not is_gathered:
        _gather_lane_block(real, itemsize, r, memory, base, lane_block, channel_phases)
        point_to_tiles(r, memory, v.y.samples)
    clear_outliers(real, (memory, t.lanes * t.rows * t.row_vectors))
    _transform_lane_block(real, r, memory, memory, 0, spectrum, stride)
    return -1


@njit()
def _has_zero(real, word, itemsize, source, count, least):
    """Tell whether one of `count` values is zero; of `least`, a vector is overwritten."""
    lanes = VECTOR_BYTES // itemsize
    values, bits = simd.pointer(real, source), simd.pointer(word, least)
    found = False
    if count < lanes:
        for i in range(count):
            found |= values[i] == real(0)
        return found
    find_least(real, (source, count // lanes, source + (count - lanes) * itemsize, least))
    for lane in range(lanes):
        found |= bits[lane] == word(0)
    return found


@njit()
def _note_zeros(real, word, itemsize, r, worker, lane_block, first, last):
    """Note which filters of a lane block have weights that are zero in channels first .. last - 1."""
    v, has_zeros = r.source, simd.pointer(np.uint8, r.has_zeros)
    least = memory_of(r.workspace, worker) + r.workspace.largest
    tile, count = tiles_of(v, r.transform.lanes, lane_block)
    for k in range(tile, tile + count):
        values = v.address + k * v.image + first * v.channel
        if _has_zero(real, word, itemsize, values, (last - first) * v.channel // itemsize, least):
            has_zeros[k] = 1


def _stage(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def to_spectra(r, worker, begin, end):
        v, s, bins, entry = r.source, r.spectra, r.transform.bins, r.transform.entry
        channels = v.channels * v.channel_phases
        # channels that are looked at for zeros together
        run = max(1, _LOOKED_AT_BYTES // (r.transform.lanes * v.channel)) * v.channel_phases
        # of channels that share a line: how many, where in memory one follows the other, and how many are finished
        in_order = v.channel_phases == 1 or r.has_zeros != 0
        line, waiting = max(1, LINE_BYTES // entry) if in_order else 1, 0
        pitch = line * entry
        pointed = -1
        for item in range(begin, end):
            lane_block, index = item // channels, item % channels
            if r.has_zeros != 0:
                if item == begin or index % run == 0:
                    last = min(channels, (index // run + 1) * run, index + end - item)
                    first_channel, last_channel = index // v.channel_phases, cdiv(last, v.channel_phases)
                    _note_zeros(real, word, itemsize, r, worker, lane_block, first_channel, last_channel)
            else:
                index = in_order_of_phases(v, channels, index)
            target = s.address + lane_block * s.lane_block + index * entry
            spectrum, stride = target, s.bin
            if r.finished != 0:
                spectrum, stride = r.finished + worker * bins * pitch + index % line * entry, pitch
            lane_block += r.first_lane_block
            pointed = lane_block_to_spectrum(
                real, word, limit, itemsize, r, worker, lane_block, index, spectrum, stride, pointed
            )  # fmt: skip
            if r.finished != 0:
                waiting += 1
                if index % line == line - 1 or index + 1 == channels or item + 1 == end:
                    before = (waiting - 1) * entry
                    vectors = waiting * entry // VECTOR_BYTES
                    stream_bins(real, (spectrum - before, pitch, target - before, s.bin, bins, vectors))
                    waiting = 0
        if r.finished != 0:
            simd.fence()

    return to_spectra


_to_spectra = jit.stage(_RECORD)(_stage)


def to_spectra_numbers(numbers: Numbers, name: str, spectra: tuple[int, int, int] = (0, 0, 0)) -> tuple[Any, ...]:
    """Return the numbers of `TO_SPECTRA` for the "input", "weight" or "output", without addresses."""
    return 0, 0, 0, 0, numbers.views[name], spectra, numbers.transform_numbers[name], numbers.workspace_numbers


def add_to_spectra(context: Context, name: str, array: Array, spectra: Spectra) -> None:
    """Transform the tiles of the block under way from the "input" or "output" to their spectra."""
    record = _record(context, name, array, spectra)
    record["first_lane_block"] = context.first_lane_block
    view = context.views[name]
    # Lines of real spectra, one for each bin and channel, drive out of a core's caches what the next stage needs.
    if context.blocking is REAL and context.lane_blocks * spectra.lane_block > _STREAMED_BYTES // 2:
        record["finished"] = context.finished
    context.add(_to_spectra, record, context.lane_blocks * view.channels * view.channel_phases)


def _record(context: Context, name: str, array: Array, spectra: Spectra) -> Record:
    record = context.record(f"{name} to spectra", lambda numbers: _RECORD.make(to_spectra_numbers(numbers, name)))
    record["source.address"] = context.address(array)
    record["outliers"] = context.address(context.outliers)
    context.point(record, "spectra", spectra)
    return record


@dataclass(frozen=True)
class TransformedWeight:
    """Kernels with their spectra.

    Attributes
    ----------
    array : numpy.ndarray
        The kernels themselves.
    spectra : Spectra
    has_outliers : bool
        Whether outliers were taken as zero.
    has_zeros : numpy.ndarray or None
        For each filter, as uint8, whether one of its weights is zero; None if none is.
    """

    array: np.ndarray
    spectra: Spectra
    has_outliers: bool
    has_zeros: np.ndarray | None


def transform_weight(plan: TiledPlan, weight: np.ndarray) -> TransformedWeight:
    """Transform kernels, C-contiguous, of the plan's dtype and size, for the tiles of `plan`."""
    context = Context(plan, plan.geometry)
    spectra = context.weight_spectra(is_kept=True)
    record = _record(context, "weight", weight, spectra)
    if spectra.array.nbytes > _STREAMED_BYTES and context.bins * context.entry <= _FINISHED_BYTES:
        record["finished"] = context.finished
    has_zeros = np.zeros(weight.shape[0], np.uint8)
    record["has_zeros"] = context.address(has_zeros)
    lane_blocks = context.groups * context.views["weight"].lane_blocks
    context.add(_to_spectra, record, lane_blocks * context.group_depth)
    context.run()
    return TransformedWeight(weight, spectra, context.met_outliers, has_zeros if has_zeros.any() else None)
