"""Tiles from and to images, as masked vectors: what lies outside an image, or is not wanted, is not touched."""

import numpy as np

from nbfftconv import simd
from nbfftconv.outliers import WORDS
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES


def _gather(v, source, row, target, pitch, above, inside, below, begin, end, vectors, ahead, largest):
    size = v.integer(VECTOR_BYTES)

    def column(source, target, first, bits):
        mask = v.between(first, begin, end)

        def zeros(target):
            v.store(v.zero(), target)
            return [v.add(target, pitch)]

        def samples(source, target, bits):
            v.prefetch(v.add(source, ahead))
            value = v.load_some(source, mask)
            v.store(value, target)
            return [v.add(source, row), v.add(target, pitch), v.larger(bits, v.magnitude_bits(value))]

        (at,) = v.repeat(above, [target], zeros)
        _, at, bits = v.repeat(inside, [source, at, bits], samples)
        v.repeat(below, [at], zeros)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes)), bits]

    *_, bits = v.repeat(vectors, [source, target, v.integer(0), v.load_bits(largest)], column)
    v.store_bits(bits, largest)


def _write(v, source, pitch, target, row, rows, count, factors, relu, stream):
    size, itemsize = v.integer(VECTOR_BYTES), v.integer(v.itemsize)
    scale, bias = v.broadcast(factors), v.broadcast(v.add(factors, itemsize))

    def write(clip, store):
        def factored(value):
            value = v.multiply_add(value, scale, bias)
            return v.clip(value) if clip else value

        def line(source, target):
            store(factored(v.load(source)), target)
            return [v.add(source, size), v.add(target, size)]

        def some(source, target, count):
            mask = v.between(v.integer(0), v.integer(0), count)
            v.store_some(factored(v.load_some(source, mask)), target, mask)

        def write_row(source, target):
            line_begin = v.scale(v.divide(v.add(target, v.integer(VECTOR_BYTES - 1)), size), size)
            head = v.minimum(v.divide(v.subtract(line_begin, target), itemsize), count)
            some(source, target, head)
            done = v.scale(head, itemsize)
            lines = v.divide(v.subtract(count, head), v.integer(v.lanes))
            at, to = v.repeat(lines, [v.add(source, done), v.add(target, done)], line)
            some(at, to, v.subtract(v.subtract(count, head), v.scale(lines, v.integer(v.lanes))))
            return [v.add(source, pitch), v.add(target, row)]

        v.repeat(rows, [source, target], write_row)

    for is_streamed, store in enumerate((v.store_line, v.stream_line)):
        for clip in (False, True):
            with v.when(stream, is_streamed), v.when(relu, int(clip)):
                write(clip, store)


def _stream(v, source, target, stride, steps):
    def step(source, target):
        for part in (v.integer(0), v.integer(VECTOR_BYTES)):
            v.stream_line(v.load(v.add(source, part)), v.add(target, part))
        return [v.add(source, v.integer(COMPLEX_BYTES)), v.add(target, stride)]

    v.repeat(steps, [source, target], step)


def _scaled(is_added):
    def emit(v, source, pitch, target, row, rows, begin, end, vectors, scale):
        size, factor = v.integer(VECTOR_BYTES), v.broadcast(scale)

        def column(source, target, first):
            mask = v.between(first, begin, end)

            def samples(source, target):
                value = v.load(source)
                value = v.multiply_add(value, factor, v.load_some(target, mask)) if is_added else v.times(value, factor)
                v.store_some(value, target, mask)
                return [v.add(source, pitch), v.add(target, row)]

            v.repeat(rows, [source, target], samples)
            return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

        v.repeat(vectors, [source, target, v.integer(0)], column)

    return emit


def _reverse(v, source, target, count):
    size, lanes = v.integer(VECTOR_BYTES), v.integer(v.lanes)
    end = v.add(target, v.scale(count, v.integer(v.itemsize)))

    def vector(source, end, count):
        mask = v.between(v.integer(0), v.integer(0), count)
        filled = v.between(v.integer(0), v.subtract(lanes, count), lanes)
        end = v.subtract(end, size)
        v.store_some(v.reverse(v.load_some(source, mask)), end, filled)
        return [v.add(source, size), end, v.subtract(count, lanes)]

    vectors = v.divide(v.add(count, v.integer(v.lanes - 1)), lanes)
    v.repeat(vectors, [source, end, count], vector)


def _finite(v, value):
    """The vector, with zeros for outliers."""
    return v.limited(value, int(WORDS[np.float32 if v.itemsize == 4 else np.float64][1]))


def _clear(v, tile, vectors):
    def vector(at):
        v.store(_finite(v, v.load(at)), at)
        return [v.add(at, v.integer(VECTOR_BYTES))]

    v.repeat(vectors, [tile], vector)


def _copy(v, places, place_step, base, tiles, tile, pitch, rows, vectors):
    for lane in range(v.lanes):

        def row(place, target, lane=lane):
            def vector(source, target, mask):
                v.store(_finite(v, v.load_some(source, v.mask_at(mask))), target)
                return [
                    v.add(source, v.integer(VECTOR_BYTES)),
                    v.add(target, v.integer(VECTOR_BYTES)),
                    v.add(mask, v.integer(2 * v.lanes)),
                ]

            source = v.add(base, v.integer_at(v.add(place, v.integer(8 * lane))))
            v.repeat(vectors, [source, target, v.add(place, v.integer(8 * v.lanes + 2 * lane))], vector)
            return [v.add(place, place_step), v.add(target, pitch)]

        v.repeat(rows, [places, v.add(tiles, v.scale(tile, v.integer(lane)))], row)


def _least(v, source, vectors, last, least):
    def vector(at, bits):
        return [v.add(at, v.integer(VECTOR_BYTES)), v.smaller(bits, v.magnitude_bits(v.load(at)))]

    _, bits = v.repeat(vectors, [source, v.most_bits()], vector)
    v.store_bits(v.smaller(bits, v.magnitude_bits(v.load(last))), least)


#: ``(source, row, target, pitch, above, inside, below, begin, end, vectors, ahead, largest)``: whole vectors of a tile
#: whose rows are `pitch` bytes apart, from rows `row` bytes apart: samples begin .. end - 1 of the rows `inside`, zero
#: elsewhere and in the rows `above` and `below`. What is `ahead` bytes further on is fetched for a later call. The
#: vector at `largest` keeps the largest magnitudes, as bits.
gather_tile = simd.kernel(_gather, "gather_tile", 12)
#: ``(source, pitch, target, row, rows, count, factors, relu, stream)``: `rows` rows of `count` samples to an array,
#: times factors[0], plus factors[1], clipped if `relu` is 1; past the caches if `stream` is 1. Whole lines are written,
#: so that none is read before: on one core 20 GB/s instead of 8.
write_rows = simd.kernel(_write, "write_rows", 9)
#: ``(source, target, stride, steps)``: a spectrum whose steps follow each other, to steps `stride` bytes apart, past
#: the caches: on one core 19 GB/s instead of 4, where neighbouring channels fill a page for every step.
stream_steps = simd.kernel(_stream, "stream_steps", 4)
#: ``(source, pitch, target, row, rows, begin, end, vectors, scale)``: samples begin .. end - 1 of `rows` rows, added
#: times the scalar at `scale`, or written.
add_tile = simd.kernel(_scaled(True), "add_tile", 9)
write_tile = simd.kernel(_scaled(False), "write_tile", 9)
#: ``(source, target, count)``: scalars in reverse order.
reverse = simd.kernel(_reverse, "reverse", 3)
#: ``(tile, vectors)``: set the outliers of so many vectors to zero.
clear_outliers = simd.kernel(_clear, "clear_outliers", 2)
#: ``(places, place_step, base, tiles, tile, pitch, rows, vectors)``: copy a unit's tiles, without outliers, from their
#: places to scratch memory, one every `tile` bytes; `vectors` are in a row.
copy_tiles = simd.kernel(_copy, "copy_tiles", 8)
#: ``(source, vectors, last, least)``: the least magnitudes, as bits, of so many vectors and one more.
find_least = simd.kernel(_least, "find_least", 4)
