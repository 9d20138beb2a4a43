"""The kernels of the transposed problem (see `ConvGeometry.transposed`): filters for channels, all axes reversed."""

import math

import numpy as np

from nbfftconv import jit, scratch, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.tiles import reverse
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.target import TARGET

#: Filters and channels of a work item, whose kernels share the cache lines that are read and written: of 3×3 taps in
#: float32, three quarters of the first-level cache.
_BLOCK = math.isqrt(TARGET.l1_bytes * 3 // 4 // (9 * 4))

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
    result = scratch.result((groups * channels, filters * planes, height, width), weight.dtype)
    record = _RECORD.zeros()
    record["weight"], record["transposed"] = weight.ctypes.data, result.ctypes.data
    record["filters"], record["channels"], record["taps"] = filters, channels, planes * height * width
    record["filter_blocks"], record["channel_blocks"] = cdiv(filters, _BLOCK), cdiv(channels, _BLOCK)
    items = groups * record["filter_blocks"] * record["channel_blocks"]
    stage = _transpose_kernels.address(weight.dtype.type)
    threads.run(threads.Task(stage, record, items, threads.get_workers()[0]))
    return result
