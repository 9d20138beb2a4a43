"""The two gradients as loops; that of the input where no transposed problem is, or its kernels are not finite.

Every pair of a pixel and a tap is multiplied, a pixel of the zero padding only if that tap is not finite: 0·inf is NaN.
"""

import math

import numpy as np

from nbfftconv import jit, simd, threads
from nbfftconv.geometry import AXIS_NUMBERS, ConvGeometry
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.threads import in_turns, share

_RECORD = RecordType(
    fields(
        # C-contiguous arrays; `output` is grad_output
        "input", "weight", "output",
        # channels and filters of a group
        "images", "groups", "channels", "filters",
        # of the gradient of the input: parts that the rows of a plane are cut into
        "parts", "turn", "turns",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_NUMBERS),
    )
)  # fmt: skip
_stage = jit.stage(_RECORD)


@jit.njit()
def _inside(tap, stride, before, begin, end, outputs):
    """Range of the outputs that see a pixel begin .. end - 1 at offset `tap`."""
    first = min(outputs, max(0, cdiv(begin + before - tap, stride)))
    return first, max(first, min(outputs, cdiv(end + before - tap, stride)))


def _grad_input(real):
    def grad_input(r, worker, begin, end):
        dx, w, g = simd.pointer(real, r.input), simd.pointer(real, r.weight), simd.pointer(real, r.output)
        channels = r.groups * r.channels
        width, x_stride = r.x_input, r.x_stride
        first_sum, last_sum = share(r.filters * r.y_kernel, r.turn, r.turns)
        for item in range(begin, end):
            top, bottom = share(r.y_input, item % r.parts, r.parts)
            index = item // r.parts
            channel, n = index % channels, index // channels
            group, c = channel // r.channels, channel % r.channels
            plane = index * r.y_input * width
            if r.turn == 0:
                for at in range(plane + top * width, plane + bottom * width):
                    dx[at] = real(0)
            for k_and_u in range(first_sum, last_sum):
                k, u = group * r.filters + k_and_u // r.y_kernel, k_and_u % r.y_kernel
                first_row, last_row = _inside(u * r.y_dilation, r.y_stride, r.y_before, top, bottom, r.y_output)
                for v in range(r.x_kernel):
                    tap = v * r.x_dilation
                    weight = w[((k * r.channels + c) * r.y_kernel + u) * r.x_kernel + v]
                    first, last = _inside(tap, x_stride, r.x_before, 0, width, r.x_output)
                    for oy in range(first_row, last_row):
                        py = oy * r.y_stride + u * r.y_dilation - r.y_before
                        target = plane + py * width + tap - r.x_before
                        source = ((n * r.groups * r.filters + k) * r.y_output + oy) * r.x_output
                        for ox in range(first, last):
                            dx[target + ox * x_stride] += weight * g[source + ox]

    return grad_input


@jit.njit(fastmath={"reassoc", "contract"})
def _dot(real, a, b, stride, count):
    """Sum of a[i]·b[i·stride], in several lanes."""
    pa, pb = simd.pointer(real, a), simd.pointer(real, b)
    total = real(0)
    if stride == 1:
        for i in range(count):
            total += pa[i] * pb[i]
    else:
        for i in range(count):
            total += pa[i] * pb[i * stride]
    return total


def _grad_weight(real):
    itemsize = np.dtype(real).itemsize

    def grad_weight(r, worker, begin, end):
        dw, g = simd.pointer(real, r.weight), simd.pointer(real, r.output)
        for item in range(begin, end):
            u, v = item // r.x_kernel % r.y_kernel, item % r.x_kernel
            kernel = item // (r.y_kernel * r.x_kernel)
            c, k = kernel % r.channels, kernel // r.channels
            tap = v * r.x_dilation
            first, last = _inside(tap, r.x_stride, r.x_before, 0, r.x_input, r.x_output)
            total = 0.0
            for n in range(r.images):
                x_plane = (n * r.groups + k // r.filters) * r.channels + c
                g_plane = n * r.groups * r.filters + k
                for oy in range(r.y_output):
                    py = oy * r.y_stride + u * r.y_dilation - r.y_before
                    g_row = (g_plane * r.y_output + oy) * r.x_output
                    start, stop = first, last
                    if 0 <= py < r.y_input:
                        x_row = (x_plane * r.y_input + py) * r.x_input + tap - r.x_before
                        total += _dot(
                            real, r.output + (g_row + first) * itemsize,
                            r.input + (x_row + first * r.x_stride) * itemsize, r.x_stride, last - first,
                        )  # fmt: skip
                    else:
                        start = stop = r.x_output
                    for ox in range(start):
                        total += g[g_row + ox] * real(0)
                    for ox in range(stop, r.x_output):
                        total += g[g_row + ox] * real(0)
            dw[item] = real(total)

    return grad_weight


_grad_input_rows = _stage(_grad_input)
_grad_weight_taps = _stage(_grad_weight)

#: Products of rows of a plane, at most, or of a turn of one row: loops take longer than kernels in registers.
_MOST_PRODUCTS = 2**24


def _record(geometry: ConvGeometry, x: np.ndarray, w: np.ndarray, g: np.ndarray) -> Record:
    record = _RECORD.zeros()
    for name, array in (("input", x), ("weight", w), ("output", g)):
        record[name] = array.ctypes.data
    record["images"], record["groups"] = geometry.input_size[0], geometry.groups
    record["channels"], record["filters"] = geometry.weight_size[1], geometry.weight_size[0] // geometry.groups
    for index, axis in enumerate("yx"):
        for name, number in geometry.axis_numbers(index).items():
            record[f"{axis}_{name}"] = number
    return record


def grad_input(geometry: ConvGeometry, dx: np.ndarray, w: np.ndarray, g: np.ndarray) -> None:
    """Compute the gradient with respect to the input into `dx`."""
    n, c, rows, _ = geometry.input_size
    filters, _, *kernel = geometry.weight_size
    filters //= geometry.groups
    record = _record(geometry, dx, w, g)
    products = filters * math.prod(kernel) * math.prod(geometry.output_size[2:])  # of a plane
    record["parts"] = parts = max(1, min(rows, cdiv(products, _MOST_PRODUCTS)))
    turns = max(1, min(filters * kernel[0], cdiv(products, parts * _MOST_PRODUCTS)))
    workers = threads.get_workers()[0]
    threads.run(*in_turns(_grad_input_rows.address(dx.dtype.type), record, n * c * parts, workers, turns))


def grad_weight(geometry: ConvGeometry, x: np.ndarray, dw: np.ndarray, g: np.ndarray) -> None:
    """Compute the gradient with respect to the kernels into `dw`."""
    stage = _grad_weight_taps.address(x.dtype.type)
    threads.run(threads.Task(stage, _record(geometry, x, dw, g), dw.size, threads.get_workers()[0]))
