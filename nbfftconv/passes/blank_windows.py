"""Blank windows: an output whose every product is zero is the bias, and such a gradient at the input is zero, exactly.

A tile that is zero in part is transformed as a whole, so what a pass leaves there is rounding of what lies beside it:
half of it would pass a ReLU. A pass looks for windows that are zero in its first channel, which takes a few reads where
there are none, since a pixel that is not zero serves all windows that hold it. Only if some are found, or weights are
zero, are results written anew.
"""

import functools
from typing import NamedTuple

import numpy as np

from nbfftconv import jit, simd, threads
from nbfftconv.geometry import FLAT, ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.context import Array, Context
from nbfftconv.planes import PLANES, input_planes, output_plane_of, plane_of, put_planes
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.threads import share

#: Rows of results that are looked at together, at least, and windows above each other: more share the pixels around.
_ROWS, _WINDOWS_HIGH = 32, 2
#: Pairs of a result and a weight that are looked at in a work item, at most, down to one row of results.
_MOST_PAIRS = 2**28
#: Lines that are fetched of a plane, at most, and planes ahead.
_FETCHED, _AHEAD = 16, 4

# Along an axis, result i meets under tap u the sample ((i·step + u·dilation - before) / spacing), if that is whole and
# inside `samples`.
_AXIS = ("results", "samples", "spacing", "step", "dilation", "before", "taps")

_WINDOWS = RecordType(
    fields(
        "source", "target", "bias", "weight", "has_zeros", "covered", "scratch",
        # for each item whether its windows may be blank, and the items whose results are looked at
        "found", "items",
        # where weights are zero: which results are written already, for each image and group; and parts of a block
        "blank_results", "parts",
        # channels of a group that are summed over, and that results have; blocks of rows of results
        "groups", "sources", "targets", "relu", "blocks", "block",
        # scalars from one weight to the next
        "group_weights", "target_weights", "source_weights", "row_weights",
        "column_weights",
        # of a thread: rows of marks, and where what follows them begins
        "worker", "is_dense", "rows", "row", "done", "candidates", "columns", "latest", "blank",
        *(f"{axis}_{name}" for axis in "yx" for name in _AXIS),
        planes=PLANES,
    )
)  # fmt: skip


@njit()
def _last_sample(start, taps, dilation, spacing, samples):
    """Return the last place, `dilation` apart from `start` on, at which there is a sample, or -1."""
    place = start + (taps - 1) * dilation
    end = (samples - 1) * spacing
    if place > end:
        place -= round_up(place - end, dilation)
    while place >= 0 and place >= start:
        if spacing == 1 or place % spacing == 0:
            return place
        place -= dilation
    return -1


@njit()
def _is_full(real, r, row):
    """Tell whether every window of a row of samples that has samples has one that is not zero."""
    values = simd.pointer(real, row)
    reach, end = (r.x_taps - 1) * r.x_dilation, (r.x_samples - 1) * r.x_spacing
    i = 0
    while i < r.x_results:
        start = i * r.x_step - r.x_before
        place = start + reach
        if place > end or r.x_spacing > 1:
            place = _last_sample(start, r.x_taps, r.x_dilation, r.x_spacing, r.x_samples)
        if place < 0:
            i += 1
            continue
        while place >= max(0, start):
            if r.x_spacing == 1:
                if values[place] != real(0):
                    break
            elif place % r.x_spacing == 0 and values[place // r.x_spacing] != real(0):
                break
            place -= r.x_dilation
        if place < max(0, start):
            return False
        i += 1
        if r.x_dilation == 1:  # it is in the next windows, too
            i = place + r.x_before + 1 if r.x_step == 1 else (place + r.x_before) // r.x_step + 1
    return True


@njit()
def _may_be_blank(real, itemsize, r, source, first, last):
    """Tell whether the windows of some rows of results may be blank, by the first channel."""
    full, i = -1, first
    while i < last:
        start = i * r.y_step - r.y_before
        distance = full - start
        if full < 0 or distance < 0 or distance > (r.y_taps - 1) * r.y_dilation or distance % r.y_dilation != 0:
            full = _last_sample(start, r.y_taps, r.y_dilation, r.y_spacing, r.y_samples)
            if full < 0 or not _is_full(real, r, source + full // r.y_spacing * r.x_samples * itemsize):
                return True
        i += 1
        if r.y_dilation == 1:  # it is in the next windows, too
            i = full + r.y_before + 1 if r.y_step == 1 else (full + r.y_before) // r.y_step + 1
    return False


# (address): fetch a line.
_fetch = simd.kernel(lambda v, address: v.prefetch(address), "fetch", 1)


@njit()
def _fetch_samples(real, itemsize, r, source, first, last):
    """Fetch what `_may_be_blank` reads of a small plane without zeros: the call would wait for a few lines each."""
    y_end, x_end = min(r.y_samples, last - r.y_before + r.y_taps - 1), r.x_samples
    if (last - first) * r.x_samples > _FETCHED * r.y_taps * r.x_taps:
        return
    y = min(first - r.y_before + r.y_taps, r.y_samples) - 1
    while y >= 0 and y < y_end:
        x = min(r.x_taps - r.x_before, r.x_samples) - 1
        while x >= 0 and x < x_end:
            _fetch(real, (source + (y * r.x_samples + x) * itemsize,))
            x = x_end if x == x_end - 1 else min(x + r.x_taps, x_end - 1)
        y = y_end if y == y_end - 1 else min(y + r.y_taps, y_end - 1)


@njit()
def _row_of(r, first, i, u):
    """Return the row of marks of a result's row under a tap, and the row of samples, -1 if there is none."""
    place = i * r.y_step + u * r.y_dilation - r.y_before
    marks = (i - first) * r.y_step + u * r.y_dilation if r.is_dense else (i - first) * r.y_taps + u
    if place < 0 or place % r.y_spacing != 0 or place // r.y_spacing >= r.y_samples:
        return marks, -1
    return marks, place // r.y_spacing


@njit()
def _mark(real, row, count, marks):
    """Set the marks of samples that are not zero."""
    values, marked = simd.pointer(real, row), simd.pointer(np.uint8, marks)
    for i in range(count):
        marked[i] |= np.uint8(values[i] != real(0))


@njit()
def _set(place, count, value):
    marks = simd.pointer(np.uint8, place)
    for i in range(count):
        marks[i] = value


@njit()
def _count(place, count):
    marks = simd.pointer(np.uint8, place)
    total = 0
    for i in range(count):
        total += marks[i]
    return total


@njit()
def _results_of(r, tap):
    """Return the results, as a range, that meet a sample under a horizontal tap, and the sample that result 0 meets.

    Where samples are spaced, return the samples that meet a result, and the result that sample 0 meets.
    """
    offset = tap * r.x_dilation - r.x_before
    if r.x_spacing == 1:
        first = max(0, cdiv(-offset, r.x_step))
        return first, max(first, min(r.x_results, (r.x_samples - 1 - offset) // r.x_step + 1)), offset
    first = max(0, cdiv(offset, r.x_spacing))
    return first, max(first, min(r.x_samples, (r.x_results - 1 + offset) // r.x_spacing + 1)), -offset


@njit()
def _blank_columns(r, marks, blank):
    """Find the windows with samples, but without marks; return their number."""
    marked, empty = simd.pointer(np.uint8, marks), simd.pointer(np.uint8, blank)
    covered = simd.pointer(np.uint8, r.covered)
    for i in range(r.x_results):
        empty[i] = covered[i]
    if r.x_dilation == 1:  # samples are next to each other
        seen, latest = 0, -1
        for i in range(r.x_results):
            start = i * r.x_step - r.x_before
            end = min(start + r.x_taps - 1, (r.x_samples - 1) * r.x_spacing)
            while seen * r.x_spacing <= end:
                if marked[seen] != 0:
                    latest = seen
                seen += 1
            if latest >= 0 and latest * r.x_spacing >= start:
                empty[i] = 0
        return _count(blank, r.x_results)
    for tap in range(r.x_taps):
        first, last, offset = _results_of(r, tap)
        if r.x_spacing == 1:
            for i in range(first, last):
                empty[i] &= marked[i * r.x_step + offset] ^ 1
        else:
            for i in range(first, last):
                empty[i * r.x_spacing + offset] &= marked[i] ^ 1
    return _count(blank, r.x_results)


@njit()
def _source(itemsize, r, image, group, channel):
    """Return the address of a channel of a group, or 0 if there is none: all of it is zero."""
    plane = plane_of(r.planes, image, group * r.sources + channel)
    return r.source + plane * r.y_samples * r.x_samples * itemsize if plane >= 0 else 0


@njit()
def _fill(real, itemsize, r, image, channel, i, blank, wanted):
    """Write what is left of results without products: those of a row where `blank` has the wanted value."""
    value = real(0)
    if r.bias != 0:
        value += simd.pointer(real, r.bias)[channel]
    if r.relu != 0 and value < real(0):
        value = real(0)
    row = output_plane_of(r.planes, r.groups * r.targets, image, channel) * r.y_results + i
    results, chosen = simd.pointer(real, r.target + row * r.x_results * itemsize), simd.pointer(np.uint8, blank)
    for j in range(r.x_results):
        results[j] = value if chosen[j] == wanted else results[j]


@njit()
def _mark_row(real, itemsize, r, image, group, y, at, channels, marks):
    """Mark what is not zero in a row of samples, in those channels that were not looked at yet."""
    done, line = simd.pointer(np.int64, marks + r.done), r.x_samples * itemsize
    for channel in range(done[at], channels):
        source = _source(itemsize, r, image, group, channel)
        if source != 0:
            _mark(real, source + y * line, r.x_samples, marks + at * r.row)
    done[at] = channels


@njit()
def _join_rows(real, itemsize, r, image, group, first, i, channels, following, marks):
    """Mark the columns with marks under a result's window, whose rows follow each other; return the row after it.

    For every column the last row with a mark is kept: rows before `following` are in there already.
    """
    latest, seen = simd.pointer(np.int32, marks + r.latest), simd.pointer(np.uint8, marks + r.columns)
    top = max(0, i * r.y_step - r.y_before)
    end = max(following, min(i * r.y_step - r.y_before + r.y_taps, r.y_samples))
    for y in range(max(following, top), end):
        at = y - (first * r.y_step - r.y_before)
        _mark_row(real, itemsize, r, image, group, y, at, channels, marks)
        marked = simd.pointer(np.uint8, marks + at * r.row)
        for x in range(r.row):
            latest[x] = np.int32(y) if marked[x] != 0 else latest[x]
    for x in range(r.row):
        seen[x] = np.uint8(latest[x] >= np.int32(top))
    return end


@njit()
def _join_rows_apart(real, itemsize, r, image, group, first, i, channels, marks):
    """The same for any rows."""
    seen = simd.pointer(np.uint8, marks + r.columns)
    _set(marks + r.columns, r.row, 0)
    for u in range(r.y_taps):
        at, y = _row_of(r, first, i, u)
        if y >= 0:
            _mark_row(real, itemsize, r, image, group, y, at, channels, marks)
            marked = simd.pointer(np.uint8, marks + at * r.row)
            for x in range(r.row):
                seen[x] |= marked[x]


@njit()
def _copy(count, source, target):
    marks, copies = simd.pointer(np.uint8, source), simd.pointer(np.uint8, target)
    for i in range(count):
        copies[i] = marks[i]


@njit()
def _fill_blank(real, itemsize, r, image, group, first, last, marks):
    """Fill results whose windows are zero in all channels, and note them if weights are zero."""
    candidates, latest = simd.pointer(np.uint8, marks + r.candidates), simd.pointer(np.int32, marks + r.latest)
    done = simd.pointer(np.int64, marks + r.done)
    _set(marks, r.rows * r.row, 0)
    for at in range(r.rows):
        done[at] = 0
    _set(marks + r.candidates, last - first, 1)
    follow = r.is_dense != 0 and r.y_dilation == 1 and r.y_spacing == 1
    channels = 1
    while True:
        left, following = 0, 0
        for x in range(r.row):
            latest[x] = np.int32(-1)
        for i in range(first, last):
            if candidates[i - first] == 0:
                continue
            if follow:
                following = _join_rows(real, itemsize, r, image, group, first, i, channels, following, marks)
            else:
                _join_rows_apart(real, itemsize, r, image, group, first, i, channels, marks)
            count = _blank_columns(r, marks + r.columns, marks + r.blank)
            candidates[i - first] = count > 0
            left += count
            if count > 0 and channels == r.sources:
                for target in range(r.targets):
                    _fill(real, itemsize, r, image, group * r.targets + target, i, marks + r.blank, 1)
                if r.blank_results != 0:
                    _copy(r.x_results, marks + r.blank, _blank_results(r, image, group, i))
        if left == 0 or channels == r.sources:
            return
        channels = min(2 * channels, r.sources)


@njit()
def _blank_results(r, image, group, i):
    """Return where it is noted which results of a row are written."""
    return r.blank_results + ((image * r.groups + group) * r.y_results + i) * r.x_results


@njit()
def _fill_sparse(real, itemsize, r, image, group, target, first, last, blank):
    """Fill results of one channel, some of whose weights are zero, that are not written yet."""
    empty, covered = simd.pointer(np.uint8, blank), simd.pointer(np.uint8, r.covered)
    weights = simd.pointer(real, r.weight)
    for i in range(first, last):
        written = simd.pointer(np.uint8, _blank_results(r, image, group, i))
        for j in range(r.x_results):
            empty[j] = covered[j] & (written[j] ^ 1)
        left = _count(blank, r.x_results)
        for channel in range(r.sources):
            if left == 0:
                break
            source = _source(itemsize, r, image, group, channel)
            if source == 0:
                continue
            for u in range(r.y_taps):
                _, y = _row_of(r, first, i, u)
                if y < 0:
                    continue
                values = simd.pointer(real, source + y * r.x_samples * itemsize)
                at = group * r.group_weights + target * r.target_weights + channel * r.source_weights
                at += u * r.row_weights
                for v in range(r.x_taps):
                    if weights[at + v * r.column_weights] == real(0):
                        continue
                    begin, end, offset = _results_of(r, v)
                    if r.x_spacing == 1 and r.x_step == 1:
                        for j in range(begin, end):
                            empty[j] &= np.uint8(values[j + offset] == real(0))
                    elif r.x_spacing == 1:
                        for j in range(begin, end):
                            empty[j] &= np.uint8(values[j * r.x_step + offset] == real(0))
                    else:
                        for j in range(begin, end):
                            empty[j * r.x_spacing + offset] &= np.uint8(values[j] == real(0))
                left = _count(blank, r.x_results)
                if left == 0:
                    break
        if left > 0:
            _fill(real, itemsize, r, image, group * r.targets + target, i, blank, 1)


@njit()
def _place_of(r, item):
    """Return the image and group of an item, and the rows of its results."""
    plane, first = item // r.blocks, item % r.blocks * r.block
    return plane // r.groups, plane % r.groups, first, min(first + r.block, r.y_results)


@njit()
def _first_source(itemsize, r, image, group):
    """Return the address of the first plane of a group's first channel, or 0 if there is none."""
    source = 0
    for tap in range(r.planes.taps):
        if source == 0:
            source = _source(itemsize, r, image, group, tap)
    return source


def _look(real):
    itemsize = np.dtype(real).itemsize

    def look_for_blank_windows(r, worker, begin, end):
        found = simd.pointer(np.uint8, r.found)
        for item in range(begin, end):
            image, group, first, last = _place_of(r, item)
            if item + _AHEAD < end and r.blocks == 1:
                later_image, later_group, _, _ = _place_of(r, item + _AHEAD)
                _fetch_samples(real, itemsize, r, _first_source(itemsize, r, later_image, later_group), first, last)
            source = _first_source(itemsize, r, image, group)
            found[item] = source == 0 or _may_be_blank(real, itemsize, r, source, first, last)

    return look_for_blank_windows


def _write(real):
    itemsize = np.dtype(real).itemsize

    def fill_blank_windows(r, worker, begin, end):
        marks = r.scratch + worker * r.worker
        found, items = simd.pointer(np.uint8, r.found), simd.pointer(np.int64, r.items)
        is_covered = _count(r.covered, r.x_results) == r.x_results
        for index in range(begin, end):
            image, group, first, last = _place_of(r, items[index])
            if r.blank_results != 0:
                _set(_blank_results(r, image, group, first), (last - first) * r.x_results, 0)
            if found[items[index]] != 0:
                _fill_blank(real, itemsize, r, image, group, first, last, marks)
            if not is_covered:
                for channel in range(group * r.targets, (group + 1) * r.targets):
                    for i in range(first, last):
                        _fill(real, itemsize, r, image, channel, i, r.covered, 0)

    return fill_blank_windows


def _write_sparse(real):
    itemsize = np.dtype(real).itemsize

    def fill_sparse_windows(r, worker, begin, end):
        has_zeros, marks = simd.pointer(np.uint8, r.has_zeros), r.scratch + worker * r.worker
        for item in range(begin, end):
            part, index = item % r.parts, item // r.parts
            target, place = index % r.targets, index // r.targets
            image, group, first, last = _place_of(r, place)
            if has_zeros[group * r.targets + target] == 0:
                continue
            begin_row, end_row = share(last - first, part, r.parts)
            _fill_sparse(
                real, itemsize, r, image, group, target, first + begin_row, first + end_row, marks + r.blank
            )  # fmt: skip

    return fill_sparse_windows


_look_for_blank_windows = jit.stage(_WINDOWS)(_look)
_fill_blank_windows = jit.stage(_WINDOWS)(_write)
_fill_sparse_windows = jit.stage(_WINDOWS)(_write_sparse)


def _forward_axis(numbers: dict[str, int]) -> dict[str, int]:
    return {
        "results": numbers["output"], "samples": numbers["input"], "spacing": 1, "step": numbers["stride"],
        "dilation": numbers["dilation"], "before": numbers["before"], "taps": numbers["kernel"],
    }  # fmt: skip


def _backward_axis(numbers: dict[str, int]) -> dict[str, int]:
    """The gradient's samples are a stride apart, and taps are reversed."""
    return {
        "results": numbers["input"], "samples": numbers["output"], "spacing": numbers["stride"], "step": 1,
        "dilation": numbers["dilation"], "before": (numbers["kernel"] - 1) * numbers["dilation"] - numbers["before"],
        "taps": numbers["kernel"],
    }  # fmt: skip


def _covered(results: int, samples: int, spacing: int, step: int, dilation: int, before: int, taps: int) -> np.ndarray:
    """Return which results along an axis meet a sample under some tap, as uint8."""
    start = np.arange(results, dtype=np.int64) * step - before
    first = np.maximum(0, -(start // dilation))  # the first tap at or after sample 0
    covered = np.zeros(results, bool)
    for tap in range(min(spacing, taps)):  # later ones repeat
        place = start + (first + tap) * dilation
        covered |= (first + tap < taps) & (place <= (samples - 1) * spacing) & (place % spacing == 0)
    return covered.astype(np.uint8)


class _Numbers(NamedTuple):
    """What all calls have in common.

    Attributes
    ----------
    record : Record
        Without addresses of a call.
    covered : numpy.ndarray
        Which columns of results meet samples at all, as uint8.
    is_covered : bool
        Whether all do.
    image_items : int
        Work items of an image.
    """

    record: Record
    covered: np.ndarray
    is_covered: bool
    image_items: int


@functools.lru_cache(maxsize=256)
def _numbers(geometry: ConvGeometry, is_forward: bool) -> _Numbers:
    record = _WINDOWS.zeros()
    make = _forward_axis if is_forward else _backward_axis
    y, x = (make(geometry.axis_numbers(axis)) for axis in (0, 1))
    for name, axis in (("y", y), ("x", x)):
        for field, value in axis.items():
            record[f"{name}_{field}"] = value
    filters, channels, *kernel = geometry.weight_size
    filters, taps = filters // geometry.groups, kernel[0] * kernel[1]
    record["groups"], record["group_weights"] = geometry.groups, filters * channels * taps
    if is_forward:
        record["sources"], record["targets"] = channels, filters
        record["target_weights"], record["source_weights"] = channels * taps, taps
        record["row_weights"], record["column_weights"] = kernel[1], 1
    else:
        record["sources"], record["targets"] = filters, channels
        record["target_weights"], record["source_weights"] = taps, channels * taps
        record["row_weights"], record["column_weights"] = -kernel[1], -1
    record["block"] = block = min(max(_ROWS, _WINDOWS_HIGH * y["taps"]), y["results"])
    record["blocks"] = cdiv(y["results"], block)
    pairs = block * x["results"] * record["sources"] * taps
    record["parts"] = max(1, min(block, cdiv(pairs, _MOST_PAIRS)))
    dense, apart = (block - 1) * y["step"] + (y["taps"] - 1) * y["dilation"] + 1, block * y["taps"]
    record["is_dense"], record["rows"] = dense <= apart, min(dense, apart)
    record["row"] = row = round_up(x["samples"], 64)
    record["done"] = at = record["rows"] * row
    record["candidates"] = at = at + 8 * record["rows"]
    record["columns"] = at = at + round_up(block, 64)
    record["latest"] = at = at + row
    record["blank"] = at = at + 4 * row
    record["worker"] = round_up(at + x["results"], 64)
    # gradients of volumes are looked at as images, or as inputs of the transposed problem
    put_planes(record, input_planes(geometry) if is_forward else (filters * geometry.groups, *FLAT))
    covered = _covered(**x)
    return _Numbers(record, covered, bool(covered.all()), record["groups"] * record["blocks"])


def is_covered(geometry: ConvGeometry) -> bool:
    """Whether a forward pass writes all there is to be written, unless it finds something."""
    return _numbers(geometry, True).is_covered


class BlankWindows:
    """Windows in which nothing multiplies anything. Made before the call runs, which looks for them; then `fill`.

    Parameters
    ----------
    context : Context
    geometry : ConvGeometry
        Of the pass.
    source, target : numpy.ndarray
        The input and the output if `is_forward`; else the gradients at the output and at the input.
    weight : numpy.ndarray
    has_zeros : numpy.ndarray or None
        For each filter, as uint8, whether one of its weights is zero; None if none is.
    bias : numpy.ndarray or None
    relu : bool
    is_forward : bool
    found : numpy.ndarray, optional
        What was found, by a program, if it need not be looked for.
    """

    def __init__(
        self,
        context: Context,
        geometry: ConvGeometry,
        source: Array,
        target: Array,
        weight: Array,
        has_zeros: np.ndarray | None,
        bias: Array | None = None,
        relu: bool = False,
        *,
        is_forward: bool,
        found: np.ndarray | None = None,
    ) -> None:
        self._context = context
        self._numbers = numbers = _numbers(geometry, is_forward)
        self._record = record = numbers.record.copy()
        if has_zeros is not None:
            first = 0
            if not is_forward:
                has_zeros = np.ones(geometry.input_size[1], np.uint8)
                first = weight.itemsize * (weight.shape[2] * weight.shape[3] - 1)  # taps are reversed
            record["weight"], record["has_zeros"] = context.address(weight) + first, context.address(has_zeros)
        self._has_zeros = has_zeros
        if bias is not None:
            record["bias"] = context.address(bias)
        record["relu"], record["covered"] = relu, context.address(numbers.covered)
        record["source"], record["target"] = context.address(source), context.address(target)
        self._images = geometry.input_size[0]
        items = self._images * numbers.image_items
        self._found = context.zeroed(items, np.uint8) if found is None else found[:items]
        record["found"] = context.address(self._found)
        if found is None:
            self._add(_look_for_blank_windows, items)

    def _add(self, stage: jit.Callback, items: int) -> None:
        context = self._context
        context.add_task(threads.Task(stage.address(context.real), self._record, items, context.workers))

    def fill(self) -> None:
        """Write what direct convolution has, once the target is written."""
        if self._has_zeros is not None or not self._numbers.is_covered:
            items = np.arange(len(self._found))
        elif np.count_nonzero(self._found):
            items = np.flatnonzero(self._found)
        else:
            return
        record = self._record
        memory = self._context.borrow(self._context.workers * record["worker"])
        record["items"], record["scratch"] = items.ctypes.data, memory.address
        if self._has_zeros is not None:
            results = self._images * record["groups"] * record["y_results"] * record["x_results"]
            record["blank_results"] = self._context.borrow(results).address
        self._add(_fill_blank_windows, len(items))
        if self._has_zeros is not None:
            self._add(_fill_sparse_windows, len(items) * record["targets"] * record["parts"])
        self._context.run()
