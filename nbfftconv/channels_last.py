"""Arrays whose channels come last, (batch, height, width, channels), to the order that passes read, and back."""

import math

import numpy as np

from nbfftconv import jit, scratch, simd, threads
from nbfftconv.arrays import compact
from nbfftconv.geometry import ConvGeometry
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.simd import VECTOR_BYTES

#: Rows that a work item has of a matrix: so many lines of each column are written one after the other.
_ROWS = 256
#: Bytes that a core is taken to move in a second, and seconds of a call.
_BYTES_PER_SECOND, _CALL = 4e9, 2.5e-5

# matrices of so many rows and columns, in blocks of rows
_RECORD = RecordType(fields("source", "target", "rows", "columns", "blocks"))


def _square(v, source, source_row, target, target_row, rows, columns):
    """Transpose a square of as many rows as there are lanes; of both, only `rows` and `columns` are in memory."""
    inside = v.lanes_between(0, columns)
    values = v.transpose([v.masked_load(source + source_row * v.minimum(i, rows - 1), inside) for i in range(v.lanes)])
    of_rows = v.lanes_between(0, rows)
    # columns that there are none of are written to the last one, and before it
    places = [target + target_row * v.minimum(j, columns - 1) for j in range(v.lanes)]
    written = [(value, place, of_rows) for value, place in zip(values, places, strict=True)]
    simd.store_masked(v, written[::-1], rows, v.lanes)


# (source, source_row, target, target_row, rows, columns)
_transpose_square = simd.kernel(_square, "transpose_square")


def _transpose(real):
    itemsize = np.dtype(real).itemsize
    lanes = VECTOR_BYTES // itemsize

    def transpose_matrices(r, worker, begin, end):
        for item in range(begin, end):
            matrix = item // r.blocks * r.rows * r.columns * itemsize
            first = item % r.blocks * _ROWS
            for left in range(0, r.columns, lanes):
                # Squares at the ends are whole ones where there are any: what they share with others is written twice.
                j = max(0, min(left, r.columns - lanes))
                for top in range(first, min(first + _ROWS, r.rows), lanes):
                    i = max(0, min(top, r.rows - lanes))
                    _transpose_square(real, (
                        r.source + matrix + (i * r.columns + j) * itemsize, r.columns * itemsize,
                        r.target + matrix + (j * r.rows + i) * itemsize, r.rows * itemsize,
                        min(lanes, r.rows), min(lanes, r.columns),
                    ))  # fmt: skip

    return transpose_matrices


_transpose_matrices = jit.stage(_RECORD)(_transpose)


def _exchanged(array: np.ndarray, rows: int, columns: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of matrices, rows × columns, transposed, as one of that shape."""
    array = compact(array, array.dtype.newbyteorder("="))
    result = scratch.result(shape, array.dtype)
    record, blocks = _RECORD.zeros(), cdiv(rows, _ROWS)
    record["source"], record["target"] = array.ctypes.data, result.ctypes.data
    record["rows"], record["columns"], record["blocks"] = rows, columns, blocks
    workers = threads.get_workers(2 * array.nbytes / _BYTES_PER_SECOND)[0]
    stage = _transpose_matrices.address(array.dtype.type)
    threads.run(threads.Task(stage, record, array.shape[0] * blocks, workers))
    return result


def exchange_seconds(geometry: ConvGeometry, dtype: np.dtype) -> float:
    """Return the seconds that it takes to bring an input to the other order, and an output back, on one core."""
    scalars = math.prod(geometry.input_size) + math.prod(geometry.output_size)
    return 2 * _CALL + 2 * scalars * dtype.itemsize / _BYTES_PER_SECOND


def to_channels_first(array: np.ndarray) -> np.ndarray:
    """Return (batch, channels, height, width) of (batch, height, width, channels), or of other spatial axes."""
    view = np.moveaxis(array, -1, 1)
    if array.size == 0 or view.flags.c_contiguous:
        return view
    return _exchanged(array, math.prod(array.shape[1:-1]), array.shape[-1], view.shape)


def to_channels_last(array: np.ndarray) -> np.ndarray:
    """Return (batch, height, width, channels) of (batch, channels, height, width), or of other spatial axes."""
    view = np.moveaxis(array, 1, -1)
    if array.size == 0 or view.flags.c_contiguous:
        return view
    return _exchanged(array, array.shape[1], math.prod(array.shape[2:]), view.shape)
