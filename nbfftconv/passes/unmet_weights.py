"""Unmet weights: where no pixel meets an output's gradient, neither of them zero, a weight's gradient is zero.

So is that of a tap that only padding meets, or of channels that are zero wherever a filter is not: exactly, where the
transforms leave rounding. A pass looks at one output pixel that sees no padding: if nothing there is zero, all weights
have met. If not, weights whose gradient is not zero are looked up, in sets of channels, or weight by weight.
"""

import functools
import math

import numpy as np

from nbfftconv import jit, simd
from nbfftconv.geometry import AXIS_NUMBERS, ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.context import Context
from nbfftconv.planes import PLANES, input_planes, output_plane_of, plane_of, put_planes
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.threads import in_turns, share

#: Filters of an item, at most, and bytes of its sets.
_FILTERS, _SET_BYTES = 128, 2**20
#: Output pixels that are looked at before the sets are, at first, and in a run.
_FIRST_PIXELS, _RUN = 8, 64
#: Before the sets of an item there are two counts, in a cache line.
_COUNTS_BYTES = 64
#: Sets of fewer channels do not pay.
_FEW_CHANNELS = 8
#: Pairs of a weight, or a word of a set, and an output pixel that an item looks at, at most, down to one weight.
_MOST_PAIRS = 2**25

_PAIRS = RecordType(
    fields(
        "input", "weight", "output", "scratch",
        # for each item whether weights may not have met, and the items that are looked through: weight by weight in
        # parts, or by sets in turns, from one to the next of which is kept what was met
        "found", "items", "parts", "turn", "turns", "met", "item",
        # channels and filters of a group; filters of an item; words of a set of channels
        "images", "groups", "channels", "filters", "filter_block", "filter_blocks", "words",
        # of a thread: bytes, and pixels of a row of sets of them
        "worker", "columns",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_NUMBERS),
        planes=PLANES,
    )
)  # fmt: skip


@njit()
def _meet_at_a_pixel(real, r, group, first, last):
    """Tell whether one output pixel is not zero in filters first .. last - 1, nor all that it sees in any channel."""
    y = cdiv(r.y_before, r.y_stride)
    x = cdiv(r.x_before, r.x_stride)
    y_last = min(r.y_output - 1, (r.y_input - 1 + r.y_before - (r.y_kernel - 1) * r.y_dilation) // r.y_stride)
    x_last = min(r.x_output - 1, (r.x_input - 1 + r.x_before - (r.x_kernel - 1) * r.x_dilation) // r.x_stride)
    if y > y_last or x > x_last:
        return False
    y, x = (y + y_last) // 2, (x + x_last) // 2
    gradient, pixels = simd.pointer(real, r.output), simd.pointer(real, r.input)
    n = r.planes.outputs // 2  # of the first volume that with most planes
    for k in range(group * r.filters + first, group * r.filters + last):
        plane = output_plane_of(r.planes, r.groups * r.filters, n, k)
        if gradient[(plane * r.y_output + y) * r.x_output + x] == real(0):
            return False
    y, x = y * r.y_stride - r.y_before, x * r.x_stride - r.x_before
    for c in range(group * r.channels, (group + 1) * r.channels):
        plane = plane_of(r.planes, n, c)
        if plane < 0:
            return False
        for u in range(r.y_kernel):
            row = (plane * r.y_input + y + u * r.y_dilation) * r.x_input + x
            zeros = np.uint8(0)  # no exit in between, for the loop to be one of vectors
            if r.x_dilation == 1:
                for v in range(r.x_kernel):
                    zeros |= np.uint8(pixels[row + v] == real(0))
            else:
                for v in range(r.x_kernel):
                    zeros |= np.uint8(pixels[row + v * r.x_dilation] == real(0))
            if zeros != 0:
                return False
    return True


@njit()
def _gather_sets(real, r, n, group, y, x, count, pixels):
    """Note for `count` pixels of the input from column `x` on, in the rows under the taps from `y` on, which channels
    are not zero there."""
    values, sets = simd.pointer(real, r.input), simd.pointer(np.uint64, pixels)
    for u in range(r.y_kernel):
        row = y + u * r.y_dilation
        if row < 0 or row >= r.y_input:
            continue
        at = u * r.columns * r.words
        for i in range(count * r.words):
            sets[at + i] = np.uint64(0)
        for c in range(r.channels):
            word, bit = c // 64, np.uint64(1) << np.uint64(c % 64)
            plane = plane_of(r.planes, n, group * r.channels + c)
            if plane < 0:
                continue
            samples = (plane * r.y_input + row) * r.x_input + x
            for i in range(count):
                if values[samples + i] != real(0):
                    sets[at + i * r.words + word] |= bit


@njit()
def _meet(real, r, n, group, first, last, y, x, count, met, pixels):
    """Note what filters first .. last - 1 meet at `count` output pixels from (y, x) on."""
    top, left = y * r.y_stride - r.y_before, x * r.x_stride - r.x_before
    begin = max(0, left)
    end = min(r.x_input, left + (count - 1) * r.x_stride + (r.x_kernel - 1) * r.x_dilation + 1)
    if end <= begin:
        return
    _gather_sets(real, r, n, group, top, begin, end - begin, pixels)
    gradient, sets, found = simd.pointer(real, r.output), simd.pointer(np.uint64, pixels), simd.pointer(np.uint64, met)
    taps = r.y_kernel * r.x_kernel
    for k in range(first, last):
        plane = output_plane_of(r.planes, r.groups * r.filters, n, group * r.filters + k)
        row = (plane * r.y_output + y) * r.x_output + x
        for i in range(count):
            if gradient[row + i] == real(0):
                continue
            for u in range(r.y_kernel):
                if top + u * r.y_dilation < 0 or top + u * r.y_dilation >= r.y_input:
                    continue
                for v in range(r.x_kernel):
                    column = left + i * r.x_stride + v * r.x_dilation
                    if column < begin or column >= end:
                        continue
                    target = ((k - first) * taps + u * r.x_kernel + v) * r.words
                    at = (u * r.columns + column - begin) * r.words
                    for word in range(r.words):
                        found[target + word] |= sets[at + word]


@njit()
def _clear_apart(real, r, group, first, last, met, is_last):
    """Tell whether there are weights whose operands did not meet, but whose gradient is not zero; clear the last."""
    gradient, found = simd.pointer(real, r.weight), simd.pointer(np.uint64, met)
    taps = r.y_kernel * r.x_kernel
    for k in range(first, last):
        for tap in range(taps):
            for word in range(r.words):
                missing = ~found[((k - first) * taps + tap) * r.words + word]
                if missing == np.uint64(0):
                    continue
                for c in range(word * 64, min(r.channels, word * 64 + 64)):
                    at = ((group * r.filters + k) * r.channels + c) * taps + tap
                    if (missing >> np.uint64(c % 64)) & np.uint64(1) and gradient[at] != real(0):
                        if not is_last:
                            return True
                        gradient[at] = real(0)
    return False


@njit()
def _clear_met_by_sets(real, r, group, first, last, kept, pixels):
    """Clear the gradients of filters first .. last - 1 under weights that nothing meets, by sets of channels.

    `kept` has, from turn to turn, how many pixels were seen, and wanted before the sets are looked at, -1 if all
    weights have met; then the sets.
    """
    counts, met = simd.pointer(np.int64, kept), kept + _COUNTS_BYTES
    found = simd.pointer(np.uint64, met)
    if r.turn == 0:
        counts[0], counts[1] = 0, _FIRST_PIXELS
        for i in range((last - first) * r.y_kernel * r.x_kernel * r.words):
            found[i] = np.uint64(0)
    seen, wanted = counts[0], counts[1]
    if wanted < 0:
        return
    rows = r.images * r.y_output
    first_row, last_row = share(rows, r.turn, r.turns)
    for i in range(first_row, last_row):
        row = (i + r.y_output // 2) % rows  # from the midst, where padding is far
        x = 0
        while x < r.x_output:
            count = min(_RUN, r.x_output - x, wanted - seen)
            _meet(real, r, row // r.y_output, group, first, last, row % r.y_output, x, count, met, pixels)
            x += count
            seen += count
            if seen == wanted:
                if not _clear_apart(real, r, group, first, last, met, False):
                    counts[1] = -1
                    return
                wanted *= 2
    counts[0], counts[1] = seen, wanted
    if last_row == rows:
        _clear_apart(real, r, group, first, last, met, True)


@njit()
def _meeting(real, r, group, k, c, u, v, hint):
    """Return an output pixel, (image, row, column), at which a weight meets a pixel, neither of them zero.

    From `hint` on, row by row; the image is -1 if there is none.
    """
    pixels, gradient = simd.pointer(real, r.input), simd.pointer(real, r.output)
    n, row, column = hint
    offset = v * r.x_dilation - r.x_before
    begin = max(0, -offset)
    end = r.x_input - offset
    if r.x_stride > 1:
        begin, end = cdiv(begin, r.x_stride), cdiv(end, r.x_stride)
    end = min(r.x_output, end)
    for i in range(r.images * r.y_output + 1):  # the first row twice: from the hint on, and whole
        y = row * r.y_stride + u * r.y_dilation - r.y_before
        plane = plane_of(r.planes, n, group * r.channels + c)
        if y >= 0 and y < r.y_input and plane >= 0:
            of_output = output_plane_of(r.planes, r.groups * r.filters, n, group * r.filters + k)
            g = (of_output * r.y_output + row) * r.x_output
            x = (plane * r.y_input + y) * r.x_input + offset
            for at in range(max(begin, column) if i == 0 else begin, end):
                if gradient[g + at] != real(0) and pixels[x + at * r.x_stride] != real(0):
                    return n, row, at
        row += 1
        if row == r.y_output:
            row, n = 0, n + 1
            if n == r.images:
                n = 0
    return -1, 0, 0


@njit()
def _clear_met_by_pixels(real, r, group, begin, end):
    """The same for weights begin .. end - 1 of a group, one by one: where the one before met a pixel, the next often
    does."""
    gradient = simd.pointer(real, r.weight)
    taps = r.y_kernel * r.x_kernel
    middle = 0, r.y_output // 2, r.x_output // 2
    hint = middle
    for weight in range(begin, end):
        kernel, u, v = weight // taps, weight % taps // r.x_kernel, weight % r.x_kernel
        if u == 0 and v == 0:
            hint = middle
        at = group * r.filters * r.channels * taps + weight
        if gradient[at] != real(0):
            pixel = _meeting(real, r, group, kernel // r.channels, kernel % r.channels, u, v, hint)
            if pixel[0] < 0:
                gradient[at] = real(0)
            else:
                hint = pixel


@njit()
def _place_of(r, item):
    """Return the group of an item and the range of its filters."""
    first = item % r.filter_blocks * r.filter_block
    return item // r.filter_blocks, first, min(first + r.filter_block, r.filters)


def _look(real):
    def look_for_unmet_weights(r, worker, begin, end):
        found = simd.pointer(np.uint8, r.found)
        for item in range(begin, end):
            group, first, last = _place_of(r, item)
            found[item] = not _meet_at_a_pixel(real, r, group, first, last)

    return look_for_unmet_weights


def _clear_by_pixels(real):
    def clear_unmet_by_pixels(r, worker, begin, end):
        items = simd.pointer(np.int64, r.items)
        for index in range(begin, end):
            group, first, last = _place_of(r, items[index // r.parts])
            weights = r.channels * r.y_kernel * r.x_kernel
            first_weight, last_weight = share((last - first) * weights, index % r.parts, r.parts)
            _clear_met_by_pixels(real, r, group, first * weights + first_weight, first * weights + last_weight)

    return clear_unmet_by_pixels


def _clear_by_sets(real):
    def clear_unmet_by_sets(r, worker, begin, end):
        items = simd.pointer(np.int64, r.items)
        for index in range(begin, end):
            group, first, last = _place_of(r, items[index])
            _clear_met_by_sets(real, r, group, first, last, r.met + index * r.item, r.scratch + worker * r.worker)

    return clear_unmet_by_sets


_look_for_unmet_weights = jit.stage(_PAIRS)(_look)
_clear_unmet_by_pixels = jit.stage(_PAIRS)(_clear_by_pixels)
_clear_unmet_by_sets = jit.stage(_PAIRS)(_clear_by_sets)


@functools.lru_cache(maxsize=256)
def _numbers(geometry: ConvGeometry) -> Record:
    record = _PAIRS.zeros()
    for name, axis in (("y", 0), ("x", 1)):
        for field, value in geometry.axis_numbers(axis).items():
            record[f"{name}_{field}"] = value
    put_planes(record, input_planes(geometry))
    filters, channels, *kernel = geometry.weight_size
    filters //= geometry.groups
    record["images"], record["groups"] = geometry.input_size[0], geometry.groups
    record["channels"], record["filters"] = channels, filters
    record["words"] = words = cdiv(channels, 64)
    set_bytes = 8 * words * kernel[0] * kernel[1]
    record["filter_block"] = filter_block = max(1, min(filters, _FILTERS, _SET_BYTES // set_bytes))
    record["filter_blocks"] = cdiv(filters, filter_block)
    reach = (_RUN - 1) * geometry.stride[1] + (kernel[1] - 1) * geometry.dilation[1] + 1
    record["columns"] = columns = min(geometry.input_size[3], reach)
    record["worker"] = round_up(8 * words * kernel[0] * columns, 64)
    record["item"] = round_up(_COUNTS_BYTES + filter_block * set_bytes, 64)
    pixels, taps = geometry.input_size[0] * math.prod(geometry.output_size[2:]), filter_block * math.prod(kernel)
    record["parts"] = max(1, min(taps * channels, cdiv(pixels * taps * channels, _MOST_PAIRS)))
    rows = geometry.input_size[0] * geometry.output_size[2]
    record["turns"] = max(1, min(rows, cdiv(pixels * taps * words, _MOST_PAIRS)))
    return record


class UnmetWeights:
    """Weights whose operands do not meet. Made before the call runs, which looks for them; then `clear`.

    Parameters
    ----------
    context : Context
    geometry : ConvGeometry
        Of the pass.
    input, grad_output, result : numpy.ndarray
    """

    def __init__(
        self, context: Context, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        self._context = context
        self._record = record = _numbers(geometry).copy()
        self._turns = record["turns"]
        items = record["groups"] * record["filter_blocks"] if input.shape[0] else 0
        self._found = np.zeros(items, np.uint8)
        for name, array in (("input", input), ("output", grad_output), ("weight", result), ("found", self._found)):
            record[name] = array.ctypes.data
        self._add(_look_for_unmet_weights, items)

    def _add(self, stage: jit.Callback, items: int, turns: int = 1) -> None:
        context = self._context
        for task in in_turns(stage.address(context.real), self._record, items, context.workers, turns):
            context.add_task(task)

    def clear(self) -> None:
        """Set their gradients to zero, once the result is written."""
        if not np.count_nonzero(self._found):
            return
        items = np.flatnonzero(self._found)
        context, record = self._context, self._record
        record["items"] = items.ctypes.data
        if record["channels"] < _FEW_CHANNELS:
            self._add(_clear_unmet_by_pixels, len(items) * record["parts"])
        else:
            record["scratch"] = context.borrow(context.workers * record["worker"]).address
            record["met"] = context.borrow(len(items) * record["item"]).address
            self._add(_clear_unmet_by_sets, len(items), self._turns)
        context.run()
