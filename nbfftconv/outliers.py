"""Outliers: NaN, infinities and values so large that a transform might overflow, kept as direct convolution has them.

Each pass is a sum of products over triples of an input pixel, a kernel tap and an output pixel (the pixel, if it lies
in the zero padding, being 0). The FFT takes outliers as zero; here their products are added one by one, exactly those
that direct convolution has. A NaN or an infinity so reaches the same results as there, and no others. A work item is
one channel of the result, whose sums do not depend on the threads.
"""

import math

import numpy as np

from nbfftconv import jit, simd, threads
from nbfftconv.geometry import AXIS_NUMBERS, ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.threads import in_turns, share

# A tile of 2**24 samples under 2**15 channels of such values times kernels of such values stays finite.
_LARGEST = {np.float32: 2.0**40, np.float64: 2.0**400}

#: For each dtype, the unsigned integer of its size and the bits of the largest value that is no outlier.
WORDS = {
    np.float32: (np.uint32, np.float32(_LARGEST[np.float32]).view(np.uint32)),
    np.float64: (np.uint64, np.float64(_LARGEST[np.float64]).view(np.uint64)),
}

#: One product here takes as long as so many of direct convolution: about 10 ns. So many at least are always added,
#: and so many in a turn, between which a call answers signals.
_SLOWER, _FEW_PRODUCTS, _MOST_PRODUCTS = 1024, 2**14, 2**22

# Arrays of a pass, by what they are indexed with.
_INPUT, _WEIGHT, _OUTPUT = range(3)
_ARRAYS = ("input", "weight", "output")

_SEARCH = RecordType(fields("array", "counts", "places", "plane", "width", "planes"))
_PRODUCTS = RecordType(
    fields(
        *_ARRAYS, "result", "found", "count",
        # which array is the result, of which outliers were found, and of which products were added before, or -1
        "target", "operand", "added", "turn", "turns",
        # channels and filters of a group
        "images", "groups", "channels", "filters",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_NUMBERS),
    )
)  # fmt: skip


def _count(real):
    itemsize, largest = np.dtype(real).itemsize, real(_LARGEST[real])

    def count_outliers(r, worker, begin, end):
        counts = simd.pointer(np.int64, r.counts)
        for plane in range(begin, end):
            values = simd.pointer(real, r.array + plane * r.plane * itemsize)
            count = 0
            for i in range(r.plane):
                count += not abs(values[i]) <= largest
            counts[plane] = count

    return count_outliers


def _list(real):
    itemsize, largest = np.dtype(real).itemsize, real(_LARGEST[real])

    def list_outliers(r, worker, begin, end):
        ends, places = simd.pointer(np.int64, r.counts), simd.pointer(np.int64, r.places)
        for plane in range(begin, end):
            values = simd.pointer(real, r.array + plane * r.plane * itemsize)
            at = 4 * ends[plane - 1] if plane > 0 else 0
            if at == 4 * ends[plane]:
                continue
            for i in range(r.plane):
                if not abs(values[i]) <= largest:
                    places[at], places[at + 1] = plane // r.planes, plane % r.planes
                    places[at + 2], places[at + 3] = i // r.width, i % r.width
                    at += 4

    return list_outliers


_count_outliers = jit.stage(_SEARCH)(_count)
_list_outliers = jit.stage(_SEARCH)(_list)


def _search(stage: jit.Callback, array: np.ndarray, counts: np.ndarray, places: np.ndarray | None = None) -> None:
    record = _SEARCH.zeros()
    record["array"], record["counts"] = array.ctypes.data, counts.ctypes.data
    record["places"] = 0 if places is None else places.ctypes.data
    record["planes"], record["width"], record["plane"] = array.shape[1], array.shape[3], math.prod(array.shape[2:])
    threads.run(threads.Task(stage.address(array.dtype.type), record, len(counts), threads.get_workers()[0]))


@njit()
def _is_added(real, largest, r, operand, value):
    """Tell whether a value is an outlier of an operand whose products were added before."""
    return r.added == operand and not abs(value) <= largest


@njit()
def _outputs_of(position, stride, dilation, kernel, outputs):
    """Range of the outputs whose window may hold a position of the padded input."""
    first = max(0, cdiv(position - (kernel - 1) * dilation, stride))
    return first, min(outputs - 1, position // stride) + 1


@njit()
def _tap_of(position, output, stride, dilation):
    """Tap with which an output sees a position of the padded input, or -1."""
    distance = position - output * stride
    if dilation == 1:
        return distance
    return distance // dilation if distance % dilation == 0 else -1


@njit()
def _add_input(real, largest, r, n, channel, y, x, index):
    """Add the products of an input pixel that a channel of the result has: of the weights, or of the output."""
    group, c = channel // r.channels, channel % r.channels
    if index // r.filters != group:
        return
    pixels, w, g = simd.pointer(real, r.input), simd.pointer(real, r.weight), simd.pointer(real, r.output)
    result = simd.pointer(real, r.result)
    pixel = pixels[((n * r.groups * r.channels + channel) * r.y_input + y) * r.x_input + x]
    y += r.y_before
    x += r.x_before
    first_row, last_row = _outputs_of(y, r.y_stride, r.y_dilation, r.y_kernel, r.y_output)
    first, last = _outputs_of(x, r.x_stride, r.x_dilation, r.x_kernel, r.x_output)
    for oy in range(first_row, last_row):
        u = _tap_of(y, oy, r.y_stride, r.y_dilation)
        if u < 0:
            continue
        taps = ((index * r.channels + c) * r.y_kernel + u) * r.x_kernel
        outputs = ((n * r.groups * r.filters + index) * r.y_output + oy) * r.x_output
        for ox in range(first, last):
            v = _tap_of(x, ox, r.x_stride, r.x_dilation)
            if v >= 0:
                if r.target == _OUTPUT:
                    result[outputs + ox] += pixel * w[taps + v]
                else:
                    result[taps + v] += pixel * g[outputs + ox]


@njit()
def _add_weight(real, largest, r, k, c, u, v, index, first_image, last_image):
    """Add the products of a weight that a channel of the result has in some images: of the input, or of the output."""
    channel = k // r.filters * r.channels + c
    if index != (k if r.target == _OUTPUT else channel):
        return
    pixels, w, g = simd.pointer(real, r.input), simd.pointer(real, r.weight), simd.pointer(real, r.output)
    result = simd.pointer(real, r.result)
    weight = w[((k * r.channels + c) * r.y_kernel + u) * r.x_kernel + v]
    for n in range(first_image, last_image):
        for oy in range(r.y_output):
            y = oy * r.y_stride + u * r.y_dilation - r.y_before
            outputs = ((n * r.groups * r.filters + k) * r.y_output + oy) * r.x_output
            row = ((n * r.groups * r.channels + channel) * r.y_input + y) * r.x_input
            for ox in range(r.x_output):
                x = ox * r.x_stride + v * r.x_dilation - r.x_before
                inside = y >= 0 and y < r.y_input and x >= 0 and x < r.x_input
                if r.target == _INPUT:
                    if inside and not _is_added(real, largest, r, _OUTPUT, g[outputs + ox]):
                        result[row + x] += weight * g[outputs + ox]
                else:
                    pixel = pixels[row + x] if inside else real(0)
                    if not _is_added(real, largest, r, _INPUT, pixel):
                        result[outputs + ox] += pixel * weight


@njit()
def _add_output(real, largest, r, n, k, oy, ox, index):
    """Add the products of an output pixel that a channel of the result has: of the weights, or of the input."""
    group = k // r.filters
    if r.target == _INPUT:
        if index // r.channels != group:
            return
        first_channel = index % r.channels
        last_channel = first_channel + 1
    else:
        if index != k:
            return
        first_channel, last_channel = 0, r.channels
    pixels, w, g = simd.pointer(real, r.input), simd.pointer(real, r.weight), simd.pointer(real, r.output)
    result = simd.pointer(real, r.result)
    gradient = g[((n * r.groups * r.filters + k) * r.y_output + oy) * r.x_output + ox]
    for c in range(first_channel, last_channel):
        for u in range(r.y_kernel):
            y = oy * r.y_stride + u * r.y_dilation - r.y_before
            taps = ((k * r.channels + c) * r.y_kernel + u) * r.x_kernel
            row = (((n * r.groups + group) * r.channels + c) * r.y_input + y) * r.x_input
            for v in range(r.x_kernel):
                x = ox * r.x_stride + v * r.x_dilation - r.x_before
                inside = y >= 0 and y < r.y_input and x >= 0 and x < r.x_input
                if r.target == _INPUT:
                    if inside:
                        result[row + x] += w[taps + v] * gradient
                else:
                    pixel = pixels[row + x] if inside else real(0)
                    if not _is_added(real, largest, r, _INPUT, pixel):
                        result[taps + v] += pixel * gradient


def _products(real):
    largest = real(_LARGEST[real])

    def add_products(r, worker, begin, end):
        found = simd.pointer(np.int64, r.found)
        parts = r.images if r.operand == _WEIGHT else 1  # each outlier's products, image by image
        first, last = share(r.count * parts, r.turn, r.turns)
        for index in range(begin, end):
            for i in range(first // parts, cdiv(last, parts)):
                a, b, c, d = found[4 * i], found[4 * i + 1], found[4 * i + 2], found[4 * i + 3]
                if r.operand == _INPUT:
                    _add_input(real, largest, r, a, b, c, d, index)
                elif r.operand == _WEIGHT:
                    images = max(0, first - i * parts), min(parts, last - i * parts)
                    _add_weight(real, largest, r, a, b, c, d, index, *images)
                else:
                    _add_output(real, largest, r, a, b, c, d, index)

    return add_products


_add_products = jit.stage(_PRODUCTS)(_products)


class Corrections:
    """The products of the outliers of two arrays, to be added to the third. Made by the functions below.

    Parameters
    ----------
    geometry : ConvGeometry
    target : int
        The array that is the result.
    operands : dict from int to numpy.ndarray
        The two others, in the order in which their outliers are added.
    """

    def __init__(self, geometry: ConvGeometry, target: int, operands: dict[int, np.ndarray]) -> None:
        self._geometry, self._target, self._operands = geometry, target, operands
        self._ends = {operand: _ends_of_planes(array) for operand, array in operands.items()}

    @property
    def are_few(self) -> bool:
        """Whether they take less time than direct convolution."""
        products = sum(self._products(operand) for operand in self._operands)
        return products <= max(_FEW_PRODUCTS, self._geometry.multiply_adds // _SLOWER)

    def _products(self, operand: int) -> int:
        """Return how many products an operand's outliers have, at most."""
        filters, channels, *kernel = self._geometry.weight_size
        of_one = {
            _INPUT: math.prod(kernel) * filters // self._geometry.groups,
            _WEIGHT: self._geometry.input_size[0] * math.prod(self._geometry.output_size[2:]),
            _OUTPUT: math.prod(kernel) * channels,
        }
        return of_one[operand] * self._found(operand)

    def _found(self, operand: int) -> int:
        """Return the number of an operand's outliers."""
        return int(self._ends[operand][-1:].sum())

    def add_to(self, result: np.ndarray) -> None:
        """Add them."""
        geometry = self._geometry
        record = _PRODUCTS.zeros()
        for operand, array in self._operands.items():
            record[_ARRAYS[operand]] = array.ctypes.data
        record["result"], record["target"], record["added"] = result.ctypes.data, self._target, -1
        record["images"], record["groups"] = geometry.input_size[0], geometry.groups
        record["channels"], record["filters"] = geometry.weight_size[1], geometry.weight_size[0] // geometry.groups
        for axis, name in enumerate("yx"):
            for field, number in geometry.axis_numbers(axis).items():
                record[f"{name}_{field}"] = number
        items = geometry.input_size[1] if self._target == _INPUT else geometry.weight_size[0]
        stage = _add_products.address(result.dtype.type)
        for operand, array in self._operands.items():
            found = np.empty((self._found(operand), 4), np.int64)
            record["found"], record["count"], record["operand"] = found.ctypes.data, len(found), operand
            if self._products(operand):  # none in an empty batch
                _search(_list_outliers, array, self._ends[operand], found)
                turns = cdiv(self._products(operand), _MOST_PRODUCTS)
                threads.run(*in_turns(stage, record, items, threads.get_workers()[0], turns))
            record["added"] = operand


def _ends_of_planes(array: np.ndarray) -> np.ndarray:
    """Return the number of outliers up to the end of each plane."""
    ends = np.zeros(math.prod(array.shape[:2]), np.int64)
    _search(_count_outliers, array, ends)
    return np.cumsum(ends, out=ends)


def _few(geometry: ConvGeometry, target: int, operands: dict[int, np.ndarray]) -> Corrections | None:
    corrections = Corrections(geometry, target, operands)
    return corrections if corrections.are_few else None


def of_forward(geometry: ConvGeometry, x: np.ndarray, w: np.ndarray) -> Corrections | None:
    """Return the products that the output lacks; None if they are so many that direct convolution is quicker."""
    return _few(geometry, _OUTPUT, {_INPUT: x, _WEIGHT: w})


def of_grad_input(geometry: ConvGeometry, w: np.ndarray, grad_output: np.ndarray) -> Corrections | None:
    """Return the products that the gradient at the input lacks, or None as `of_forward` does."""
    return _few(geometry, _INPUT, {_OUTPUT: grad_output, _WEIGHT: w})


def of_grad_weight(geometry: ConvGeometry, x: np.ndarray, grad_output: np.ndarray) -> Corrections | None:
    """Return the products that the gradient at the kernels lacks, or None as `of_forward` does."""
    return _few(geometry, _WEIGHT, {_INPUT: x, _OUTPUT: grad_output})
