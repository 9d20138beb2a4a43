"""A transform as somebody might add one: a plain DFT, sum by sum, a tile at a time."""

import math

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import Callback
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.transforms import Functions, Layout, Operations, TileTransform, Transform, signature

SIZE = np.dtype([("height", np.int64), ("width", np.int64), ("pitch", np.int64), ("bins", np.int64)])


def forward_factory(real):
    lanes = simd.lanes(real)

    def forward(c, tile, work, spectrum, stride, rows, columns):
        half = c.width // 2 + 1
        for f in range(c.bins * lanes):
            re, im = 0.0, 0.0
            for y in range(c.height):
                for x in range(c.width):
                    turn = 2 * math.pi * (f // half * y / c.height + f % half * x / c.width)
                    sample = simd.pointer(real, tile)[y * c.pitch + x]
                    re, im = re + sample * math.cos(turn), im - sample * math.sin(turn)
            parts = simd.pointer(real, spectrum + f // lanes * stride)
            parts[f % lanes], parts[lanes + f % lanes] = re, im

    return forward


def inverse_factory(real):
    lanes = simd.lanes(real)

    def inverse(c, tile, work, spectrum, stride, rows, columns):
        half = c.width // 2 + 1
        for y in range(rows):
            for x in range(columns):
                total = 0.0
                for f in range(c.height * half):
                    turn = 2 * math.pi * (f // half * y / c.height + f % half * x / c.width)
                    parts = simd.pointer(real, spectrum + f // lanes * stride)
                    times = 1 if f % half * 2 % c.width == 0 else 2  # the others stand for their conjugates as well
                    total += times * (parts[f % lanes] * math.cos(turn) - parts[lanes + f % lanes] * math.sin(turn))
                simd.pointer(real, tile)[y * c.pitch + x] = total

    return inverse


def layout(real, height, width):
    lanes = simd.lanes(real)
    return Layout(1, round_up(width, lanes), cdiv(height * (width // 2 + 1), lanes))


def make(real, tile, taps):
    shape = layout(real, *tile)
    context = np.array((*tile, shape.pitch, shape.bins), SIZE)
    functions = Functions(FORWARD.address(real), INVERSE.address(real), context.ctypes.data)
    return TileTransform.of_all(functions, shape, work_items=0, divisor=tile[0] * tile[1], kept=context)


FORWARD, INVERSE = (Callback(each, signature(SIZE, arguments=7)) for each in (forward_factory, inverse_factory))
TOY = Transform(
    "toy", make, layout, lambda taps, axis: (5, 8, 12),
    lambda height, width, frequencies: Operations(4 * frequencies**2, 0.0, 0.0),
    product_rate=1.0, spectra_rate=1.0, stream_rate=1.0, row=1e-9,
)  # fmt: skip
