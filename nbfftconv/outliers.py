"""Outliers: NaN, infinities and values so large that a transform might overflow, kept as direct convolution has them.

Each pass is a sum of products over triples of an input pixel, a kernel tap and an output pixel (the pixel, if it lies
in the zero padding, being 0). The FFT takes outliers as zero; here their products are added one by one, exactly those
that direct convolution has. A NaN or an infinity so reaches the same results as there, and no others.
"""

import numpy as np

from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit

# A tile of 2**24 samples under 2**15 channels of such values times kernels of such values stays finite.
_LARGEST = {np.float32: 2.0**40, np.float64: 2.0**400}

#: For each dtype, the unsigned integer of its size and the bits of the largest value that is no outlier.
WORDS = {
    np.float32: (np.uint32, np.float32(_LARGEST[np.float32]).view(np.uint32)),
    np.float64: (np.uint64, np.float64(_LARGEST[np.float64]).view(np.uint64)),
}

#: With a larger share of outliers in an array, direct convolution is the quicker way.
LARGEST_SHARE = 1 / 64


def find(array: np.ndarray) -> np.ndarray:
    """Return the positions of the outliers of a four-dimensional array, of shape (count, 4)."""
    with np.errstate(invalid="ignore"):
        return np.argwhere(~(np.abs(array) <= _LARGEST[array.dtype.type]))


# What a product is added to.
_INPUT, _WEIGHT, _OUTPUT = range(3)


@njit()
def _add(target, skip, largest, x, w, y, result, numbers, n, k, c, u, v, oy, ox):
    """Add one product to the result; not if its operand `skip` is an outlier, whose products were added before."""
    sy, sx, top, left, dy, dx, channels, filters = numbers
    channel = k // filters * channels + c
    py, px = oy * sy + u * dy - top, ox * sx + v * dx - left
    inside = 0 <= py < x.shape[2] and 0 <= px < x.shape[3]
    if target == _INPUT:
        if inside and not (skip == _OUTPUT and not abs(y[n, k, oy, ox]) <= largest):
            result[n, channel, py, px] += w[k, c, u, v] * y[n, k, oy, ox]
        return
    pixel = x[n, channel, py, px] if inside else x.dtype.type(0)
    if skip == _INPUT and not abs(pixel) <= largest:
        return
    if target == _OUTPUT:
        result[n, k, oy, ox] += pixel * w[k, c, u, v]
    else:
        result[k, c, u, v] += pixel * y[n, k, oy, ox]


@njit()
def _outputs_of(position, stride, dilation, kernel, outputs):
    """Range of the outputs whose window may hold a position of the padded input."""
    first = max(0, (position - (kernel - 1) * dilation + stride - 1) // stride)
    return range(first, min(outputs - 1, position // stride) + 1)


@njit()
def _tap_of(position, output, stride, dilation):
    """Tap with which an output sees a position of the padded input, or -1."""
    distance = position - output * stride
    return distance // dilation if distance % dilation == 0 else -1


@njit()
def _add_input(found, target, skip, largest, x, w, y, result, numbers):
    """Add the products of the input pixels `found`."""
    sy, sx, top, left, dy, dx, channels, filters = numbers
    for at in range(found.shape[0]):
        n, channel, py, px = found[at, 0], found[at, 1], found[at, 2] + top, found[at, 3] + left
        group, c = channel // channels, channel % channels
        for k in range(group * filters, (group + 1) * filters):
            for oy in _outputs_of(py, sy, dy, w.shape[2], y.shape[2]):
                u = _tap_of(py, oy, sy, dy)
                for ox in _outputs_of(px, sx, dx, w.shape[3], y.shape[3]):
                    v = _tap_of(px, ox, sx, dx)
                    if u >= 0 and v >= 0:
                        _add(target, skip, largest, x, w, y, result, numbers, n, k, c, u, v, oy, ox)


@njit()
def _add_weight(found, target, skip, largest, x, w, y, result, numbers):
    """Add the products of the kernel taps `found`."""
    for at in range(found.shape[0]):
        k, c, u, v = found[at, 0], found[at, 1], found[at, 2], found[at, 3]
        for n in range(y.shape[0]):
            for oy in range(y.shape[2]):
                for ox in range(y.shape[3]):
                    _add(target, skip, largest, x, w, y, result, numbers, n, k, c, u, v, oy, ox)


@njit()
def _add_output(found, target, skip, largest, x, w, y, result, numbers):
    """Add the products of the output pixels `found`."""
    channels = numbers[6]
    for at in range(found.shape[0]):
        n, k, oy, ox = found[at, 0], found[at, 1], found[at, 2], found[at, 3]
        for c in range(channels):
            for u in range(w.shape[2]):
                for v in range(w.shape[3]):
                    _add(target, skip, largest, x, w, y, result, numbers, n, k, c, u, v, oy, ox)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


_ADD = (_add_input, _add_weight, _add_output)


def _correct(
    geometry: ConvGeometry, target: int, first: int, second: int, x: np.ndarray, w: np.ndarray, y: np.ndarray
) -> bool:
    """Add the products of all outliers of two operands to the third array; if they are too many, return False."""
    result = (x, w, y)[target]
    # Read-only views, whatever the caller's arrays are, so that one compilation serves them all.
    arrays = x, w, y = _read_only(x), _read_only(w), _read_only(y)
    found = [find(arrays[operand]) for operand in (first, second)]
    if any(
        len(f) > LARGEST_SHARE * arrays[operand].size + 1 for f, operand in zip(found, (first, second), strict=True)
    ):
        return False
    (top, _), (left, _) = geometry.padding
    channels, filters = geometry.weight_size[1], geometry.weight_size[0] // geometry.groups
    numbers = (*geometry.stride, top, left, *geometry.dilation, channels, filters)
    largest = x.dtype.type(_LARGEST[x.dtype.type])
    for operand, positions, skip in ((first, found[0], -1), (second, found[1], first)):
        if len(positions):
            _ADD[operand](positions, target, skip, largest, x, w, y, result, numbers)
    return True


def correct_forward(geometry: ConvGeometry, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> bool:
    """Add to the output `y` the products of the outliers of input and weight.

    Returns
    -------
    bool
        False, and nothing is added, if the outliers are so many that direct convolution is the quicker way.
    """
    return _correct(geometry, _OUTPUT, _INPUT, _WEIGHT, x, w, y)


def correct_grad_input(geometry: ConvGeometry, grad_input: np.ndarray, w: np.ndarray, grad_output: np.ndarray) -> bool:
    """Add to `grad_input` the products of the outliers of weight and grad_output; returns as `correct_forward`."""
    return _correct(geometry, _INPUT, _OUTPUT, _WEIGHT, grad_input, w, grad_output)


def correct_grad_weight(
    geometry: ConvGeometry, x: np.ndarray, grad_weight: np.ndarray, grad_output: np.ndarray
) -> bool:
    """Add to `grad_weight` the products of the outliers of input and grad_output; returns as `correct_forward`."""
    return _correct(geometry, _WEIGHT, _INPUT, _OUTPUT, x, grad_weight, grad_output)
