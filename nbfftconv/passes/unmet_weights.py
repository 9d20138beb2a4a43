"""Unmet weights: where no pixel meets an output's gradient, neither of them zero, a weight's gradient is zero.

So is that of a tap that only padding meets, or of channels that are zero wherever a filter is not: exactly, where the
transforms leave rounding. A pass looks at one output pixel that sees no padding: if nothing there is zero, all weights
have met. If not, weights whose gradient is not zero are looked up, in sets of channels, or weight by weight.
"""

import functools

import numpy as np

from nbfftconv import jit, simd, threads
from nbfftconv.geometry import AXIS_NUMBERS, ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.call import Call

#: Filters of an item, at most, and bytes of its sets.
_FILTERS, _SET_BYTES = 128, 2**20
#: Output pixels that are looked at before the sets are, at first, and in a run.
_FIRST_PIXELS, _RUN = 8, 64
#: Sets of fewer channels do not pay.
_FEW_CHANNELS = 8

_PAIRS = np.dtype(
    [
        *((name, np.int64) for name in ("input", "weight", "output", "scratch")),
        # for each item whether weights may not have met, and the items that are looked through
        ("found", np.int64),
        ("items", np.int64),
        # channels and filters of a group; filters of an item; words of a set of channels
        *((name, np.int64) for name in ("images", "groups", "channels", "filters", "chunk", "chunks", "words")),
        # of a thread: bytes, where the sets of pixels begin, and pixels of a row of them
        *((name, np.int64) for name in ("slot", "pixels", "columns")),
        *((f"{axis}_{name}", np.int64) for axis in "yx" for name in AXIS_NUMBERS),
    ]
)


@njit()
def _meet_at_a_pixel(real, r, group, first, last):
    """Tell whether one output pixel is not zero in filters first .. last - 1, nor all that it sees in any channel."""
    y = (r.y_before + r.y_stride - 1) // r.y_stride
    x = (r.x_before + r.x_stride - 1) // r.x_stride
    y_last = min(r.y_output - 1, (r.y_input - 1 + r.y_before - (r.y_kernel - 1) * r.y_dilation) // r.y_stride)
    x_last = min(r.x_output - 1, (r.x_input - 1 + r.x_before - (r.x_kernel - 1) * r.x_dilation) // r.x_stride)
    if y > y_last or x > x_last:
        return False
    y, x = (y + y_last) // 2, (x + x_last) // 2
    gradient, pixels = simd.pointer(real, r.output), simd.pointer(real, r.input)
    for k in range(group * r.filters + first, group * r.filters + last):
        if gradient[(k * r.y_output + y) * r.x_output + x] == real(0):
            return False
    y, x = y * r.y_stride - r.y_before, x * r.x_stride - r.x_before
    for c in range(group * r.channels, (group + 1) * r.channels):
        for u in range(r.y_kernel):
            row = (c * r.y_input + y + u * r.y_dilation) * r.x_input + x
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
            samples = (((n * r.groups + group) * r.channels + c) * r.y_input + row) * r.x_input + x
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
        row = (((n * r.groups + group) * r.filters + k) * r.y_output + y) * r.x_output + x
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
def _clear_met_by_sets(real, r, group, first, last, met, pixels):
    """Clear the gradients of filters first .. last - 1 under weights that nothing meets, by sets of channels."""
    found = simd.pointer(np.uint64, met)
    for i in range((last - first) * r.y_kernel * r.x_kernel * r.words):
        found[i] = np.uint64(0)
    rows = r.images * r.y_output
    seen, wanted = 0, _FIRST_PIXELS
    for i in range(rows):
        row = (i + r.y_output // 2) % rows  # from the midst, where padding is far
        x = 0
        while x < r.x_output:
            count = min(_RUN, r.x_output - x, wanted - seen)
            _meet(real, r, row // r.y_output, group, first, last, row % r.y_output, x, count, met, pixels)
            x += count
            seen += count
            if seen == wanted:
                if not _clear_apart(real, r, group, first, last, met, False):
                    return
                wanted *= 2
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
        begin, end = (begin + r.x_stride - 1) // r.x_stride, (end + r.x_stride - 1) // r.x_stride
    end = min(r.x_output, end)
    for i in range(r.images * r.y_output + 1):  # the first row twice: from the hint on, and whole
        y = row * r.y_stride + u * r.y_dilation - r.y_before
        if y >= 0 and y < r.y_input:
            plane = n * r.groups + group
            g = ((plane * r.filters + k) * r.y_output + row) * r.x_output
            x = ((plane * r.channels + c) * r.y_input + y) * r.x_input + offset
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
def _clear_met_by_pixels(real, r, group, first, last):
    """The same, weight by weight: where the one before met a pixel, the next often does."""
    gradient = simd.pointer(real, r.weight)
    for k in range(first, last):
        for c in range(r.channels):
            hint = 0, r.y_output // 2, r.x_output // 2
            at = ((group * r.filters + k) * r.channels + c) * r.y_kernel * r.x_kernel
            for u in range(r.y_kernel):
                for v in range(r.x_kernel):
                    if gradient[at] != real(0):
                        pixel = _meeting(real, r, group, k, c, u, v, hint)
                        if pixel[0] < 0:
                            gradient[at] = real(0)
                        else:
                            hint = pixel
                    at += 1


@njit()
def _place_of(r, item):
    """Return the group of an item and the range of its filters."""
    first = item % r.chunks * r.chunk
    return item // r.chunks, first, min(first + r.chunk, r.filters)


def _look(real):
    def look_for_unmet_weights(r, slot, begin, end):
        found = simd.pointer(np.uint8, r.found)
        for item in range(begin, end):
            group, first, last = _place_of(r, item)
            found[item] = not _meet_at_a_pixel(real, r, group, first, last)

    return look_for_unmet_weights


def _clear(real):
    def clear_unmet_weights(r, slot, begin, end):
        met, items = r.scratch + slot * r.slot, simd.pointer(np.int64, r.items)
        for index in range(begin, end):
            group, first, last = _place_of(r, items[index])
            if r.channels < _FEW_CHANNELS:
                _clear_met_by_pixels(real, r, group, first, last)
            else:
                _clear_met_by_sets(real, r, group, first, last, met, met + r.pixels)

    return clear_unmet_weights


_look_for_unmet_weights = jit.stage(_PAIRS)(_look)
_clear_unmet_weights = jit.stage(_PAIRS)(_clear)


@functools.lru_cache(maxsize=256)
def _numbers(geometry: ConvGeometry) -> np.ndarray:
    record = np.zeros((), _PAIRS)
    for name, axis in (("y", 0), ("x", 1)):
        for field, value in geometry.axis_numbers(axis).items():
            record[f"{name}_{field}"] = value
    filters, channels, *kernel = geometry.weight_size
    filters //= geometry.groups
    record["images"], record["groups"] = geometry.input_size[0], geometry.groups
    record["channels"], record["filters"] = channels, filters
    record["words"] = words = -(-channels // 64)
    set_bytes = 8 * words * kernel[0] * kernel[1]
    record["chunk"] = chunk = max(1, min(filters, _FILTERS, _SET_BYTES // set_bytes))
    record["chunks"] = -(-filters // chunk)
    reach = (_RUN - 1) * geometry.stride[1] + (kernel[1] - 1) * geometry.dilation[1] + 1
    record["columns"] = columns = min(geometry.input_size[3], reach)
    record["pixels"] = chunk * set_bytes
    record["slot"] = -(-(chunk * set_bytes + 8 * words * kernel[0] * columns) // 64) * 64
    return record


class UnmetWeights:
    """Weights whose operands do not meet. Made before the call runs, which looks for them; then `clear`.

    Parameters
    ----------
    call : Call
    geometry : ConvGeometry
        Of the pass.
    input, grad_output, result : numpy.ndarray
    """

    def __init__(
        self, call: Call, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
    ) -> None:
        self._call = call
        self._record = record = jit.copy_record(_numbers(geometry))
        items = int(record["groups"] * record["chunks"]) if input.shape[0] else 0
        self._found = np.zeros(items, np.uint8)
        for name, array in (("input", input), ("output", grad_output), ("weight", result), ("found", self._found)):
            record[name] = array.ctypes.data
        self._add(_look_for_unmet_weights, items)

    def _add(self, stage: jit.Callback, items: int) -> None:
        self._call.add_task(threads.Task(stage.address(self._call.real), self._record, items, self._call.slots))

    def clear(self) -> None:
        """Set their gradients to zero, once the result is written."""
        items = np.flatnonzero(self._found)
        if len(items) == 0:
            return
        memory = self._call.borrow(self._call.slots * int(self._record["slot"]))
        self._record["items"], self._record["scratch"] = items.ctypes.data, memory.ctypes.data
        self._add(_clear_unmet_weights, len(items))
        self._call.run()
