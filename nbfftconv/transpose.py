"""The transposed problem (see `ConvGeometry.transposed`): its kernels, and its results in their places.

Filters take the place of channels, and all axes are reversed. Along an axis with stride s, tap r + s·v of a kernel is
tap v of the kernel of phase r. A phase is every s-th of the input's pixels, padding included; of a channel, the phases
are filters that follow each other, in depth slowest. Their results are interleaved.
"""

import itertools
import math

import numpy as np

from nbfftconv import jit, scratch, simd, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.tiles import reverse
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.target import TARGET

#: Filters and channels of a work item, whose kernels share the cache lines that are read and written: of 3×3 taps in
#: float32, three quarters of the first-level cache.
_BLOCK = math.isqrt(TARGET.l1_bytes * 3 // 4 // (9 * 4))

#: Bytes that a core is taken to interleave in a second.
_BYTES_PER_SECOND = 1e10

# filters and channels are those of a group, in blocks
_RECORD = RecordType(
    fields("weight", "transposed", "filters", "channels", "filter_blocks", "channel_blocks", "taps"),
)
_stage = jit.stage(_RECORD)


def _transpose(real):
    itemsize = np.dtype(real).itemsize

    def transpose_kernels(r, worker, begin, end):
        kernel = r.taps * itemsize
        for item in range(begin, end):
            first_filter = item % r.filter_blocks * _BLOCK
            first_channel = item // r.filter_blocks % r.channel_blocks * _BLOCK
            group = item // (r.filter_blocks * r.channel_blocks)
            for c in range(first_channel, min(first_channel + _BLOCK, r.channels)):
                for k in range(first_filter, min(first_filter + _BLOCK, r.filters)):
                    source = r.weight + ((group * r.filters + k) * r.channels + c) * kernel
                    target = r.transposed + ((group * r.channels + c) * r.filters + k) * kernel
                    reverse(real, (source, target, r.taps))

    return transpose_kernels


_transpose_kernels = _stage(_transpose)


def transpose(weight: np.ndarray, geometry: ConvGeometry) -> np.ndarray:
    """Return C-contiguous kernels of a convolution transposed: (channels, filters / groups, height, width)."""
    filters, channels, height, width = weight.shape
    groups, planes = geometry.groups, geometry.depth.taps  # of a kernel; they are channels, one after the other
    filters, channels = filters // groups, channels // planes
    if max(geometry.strides) > 1:
        return _phases_as_filters(weight, geometry)
    result = scratch.result((groups * channels, filters * planes, height, width), weight.dtype)
    record = _RECORD.zeros()
    record["weight"], record["transposed"] = weight.ctypes.data, result.ctypes.data
    record["filters"], record["channels"], record["taps"] = filters, channels, planes * height * width
    record["filter_blocks"], record["channel_blocks"] = cdiv(filters, _BLOCK), cdiv(channels, _BLOCK)
    items = groups * record["filter_blocks"] * record["channel_blocks"]
    stage = _transpose_kernels.address(weight.dtype.type)
    threads.run(threads.Task(stage, record, items, threads.get_workers()[0]))
    return result


def _phases_as_filters(weight: np.ndarray, geometry: ConvGeometry) -> np.ndarray:
    """Return kernels transposed, of every phase its own."""
    groups, strides = geometry.groups, geometry.strides
    taps = (geometry.depth.taps, *weight.shape[2:])
    of_phase = [k // s for k, s in zip(taps, strides, strict=True)]
    channels = weight.shape[1] // taps[0]
    phased = itertools.chain(*zip(of_phase, strides, strict=True))
    reversed = weight.reshape(groups, -1, channels, *phased)[:, :, :, ::-1, :, ::-1, :, ::-1]
    ordered = np.ascontiguousarray(reversed.transpose(0, 2, 4, 6, 8, 1, 3, 5, 7))
    return ordered.reshape(groups * channels * math.prod(strides), -1, *of_phase[1:])


def transpose_phases(weight: np.ndarray, geometry: ConvGeometry) -> list[np.ndarray]:
    """Return the kernels of `ConvGeometry.transposed_phases`, each C-contiguous."""
    groups, strides, taps = geometry.groups, geometry.strides, geometry.depth.taps
    kernels = weight.reshape(groups, -1, weight.shape[1] // taps, taps, *weight.shape[2:])
    result = []
    for z, y, x in itertools.product(*map(range, strides)):
        of_phase = kernels[..., z :: strides[0], y :: strides[1], x :: strides[2]][..., ::-1, ::-1, ::-1]
        _, filters, channels, depth, *across = of_phase.shape
        ordered = np.ascontiguousarray(of_phase.transpose(0, 2, 1, 3, 4, 5))
        result.append(ordered.reshape(groups * channels, filters * depth, *across))
    return result


def bias_of_phases(geometry: ConvGeometry, bias: np.ndarray | None) -> np.ndarray | None:
    """Return the bias of the transposed problem's filters."""
    phases = math.prod(geometry.strides)
    return bias if bias is None or phases == 1 else np.repeat(bias, phases)


# Bytes from a phase to the next, and from a channel's. Of each axis, the input's pixels, the stride, the pixels of a
# phase, and where among the phases' pixels, interleaved, the input's first one is.
_AXIS = ("pixels", "stride", "of_phase", "offset")
_INTERLEAVING = RecordType(
    fields("phases", "result", "phase", "channel", *(f"{axis}_{name}" for axis in "zyx" for name in _AXIS))
)


@njit()
def _interleave_row(real, itemsize, r, source, plane, target):
    """Write a row; of phase 0 it is at `source`, of the following ones `plane` bytes apart."""
    row = simd.pointer(real, target)
    if r.x_stride == 2:
        even = simd.pointer(real, source + r.x_offset * plane)
        odd = simd.pointer(real, source + (1 - r.x_offset) * plane + r.x_offset * itemsize)
        for i in range(r.x_pixels // 2):
            row[2 * i], row[2 * i + 1] = even[i], odd[i]
        if r.x_pixels % 2 == 1:
            row[r.x_pixels - 1] = even[r.x_pixels // 2]
        return
    for phase in range(r.x_stride):
        pixels = simd.pointer(real, source + phase * plane)
        first = (phase - r.x_offset) % r.x_stride
        begin = (first + r.x_offset) // r.x_stride
        for i in range(cdiv(r.x_pixels - first, r.x_stride)):
            row[first + i * r.x_stride] = pixels[begin + i]


def _interleave(real):
    itemsize = np.dtype(real).itemsize

    def interleave_phases(r, worker, begin, end):
        line = r.x_of_phase * itemsize
        for item in range(begin, end):  # a plane
            channel, z = item // r.z_pixels, item % r.z_pixels + r.z_offset
            phase = z % r.z_stride * r.y_stride
            for y in range(r.y_pixels):
                at = y + r.y_offset
                first = (phase + at % r.y_stride) * r.x_stride
                source = r.phases + channel * r.channel + first * r.phase
                source += (z // r.z_stride * r.y_of_phase + at // r.y_stride) * line
                target = r.result + (item * r.y_pixels + y) * r.x_pixels * itemsize
                _interleave_row(real, itemsize, r, source, r.phase, target)

    return interleave_phases


_interleave_phases = jit.stage(_INTERLEAVING)(_interleave)


def room_for_phases(geometry: ConvGeometry, run: ConvGeometry, result: np.ndarray) -> np.ndarray:
    """Return where the transposed problem `run` is to write: `result` itself, or, of phases, what is interleaved."""
    return result if max(geometry.strides) == 1 else scratch.result(run.output_shape, result.dtype)


def interleave(
    geometry: ConvGeometry, run: ConvGeometry, phases: np.ndarray, result: np.ndarray, phases_first: bool = False
) -> None:
    """Write what the transposed problem `run` has written to where it belongs, if it is not there.

    With `phases_first` it is of several problems, of which `run` is one: each phase has results of its own.
    """
    if phases is result:
        return
    record = _INTERLEAVING.zeros()
    record["phases"], record["result"] = phases.ctypes.data, result.ctypes.data
    plane = math.prod((run.depth.outputs, *run.output_size[2:])) * result.itemsize
    channels, strides = geometry.input_shape[0] * geometry.input_shape[1], math.prod(geometry.strides)
    record["phase"], record["channel"] = (channels * plane, plane) if phases_first else (plane, strides * plane)
    sizes = geometry.depth.planes, *geometry.input_size[2:]
    of_phases = run.depth.outputs, *run.output_size[2:]
    before = geometry.depth.before, *(pads[0] for pads in geometry.padding)
    for axis, *numbers in zip("zyx", sizes, geometry.strides, of_phases, before, strict=True):
        pixels, stride, of_phase, pad = numbers
        for name, value in zip(_AXIS, (pixels, stride, of_phase, pad % stride), strict=True):
            record[f"{axis}_{name}"] = value
    items = channels * geometry.depth.planes
    stage = _interleave_phases.address(result.dtype.type)
    threads.run(threads.Task(stage, record, items, threads.get_workers(result.nbytes / _BYTES_PER_SECOND)[0]))
