"""Tiles from and to images, as masked vectors: what lies outside an image, or is not wanted, is not touched."""

from nbfftconv import simd
from nbfftconv.simd import VECTOR_BYTES


def _gather(v, source, row, target, pitch, above, inside, below, begin, end, vectors, ahead, largest):
    size = v.integer(VECTOR_BYTES)

    def column(source, target, first):
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
        _, at, bits = v.repeat(inside, [source, at, v.load_bits(largest)], samples)
        v.store_bits(bits, largest)
        v.repeat(below, [at], zeros)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

    v.repeat(vectors, [source, target, v.integer(0)], column)


def _scatter(v, source, pitch, target, row, rows, end, vectors, factors, relu, ahead):
    size = v.integer(VECTOR_BYTES)
    scale, bias = v.broadcast(factors), v.broadcast(v.add(factors, v.integer(v.itemsize)))

    def column(source, target, first):
        mask = v.between(first, v.integer(0), end)

        def samples(source, target):
            v.prefetch(v.add(target, ahead), write=True)
            value = v.multiply_add(v.load(source), scale, bias)
            v.store_some(v.clip(value) if clip else value, target, mask)
            return [v.add(source, pitch), v.add(target, row)]

        v.repeat(rows, [source, target], samples)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

    for clip in (False, True):
        with v.when(relu, int(clip)):
            v.repeat(vectors, [source, target, v.integer(0)], column)


def _add(v, source, target, begin, end, vectors):
    def step(source, target, first):
        mask = v.between(first, begin, end)
        v.store_some(v.plus(v.load_some(target, mask), v.load(source)), target, mask)
        size = v.integer(VECTOR_BYTES)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

    v.repeat(vectors, [source, target, v.integer(0)], step)


#: ``(source, row, target, pitch, above, inside, below, begin, end, vectors, ahead, largest)``: whole vectors of a tile
#: whose rows are `pitch` bytes apart, from rows `row` bytes apart: samples begin .. end - 1 of the rows `inside`, zero
#: elsewhere and in the rows `above` and `below`. What is `ahead` bytes further on is fetched for a later call. The
#: vector at `largest` keeps the largest magnitudes, as bits.
gather_tile = simd.kernel(_gather, "gather_tile", 12)
#: ``(source, pitch, target, row, rows, end, vectors, factors, relu, ahead)``: the first `end` samples of `rows` rows of
#: a tile, times factors[0], plus factors[1], clipped if `relu` is 1. What is `ahead` bytes further on is written next.
scatter_tile = simd.kernel(_scatter, "scatter_tile", 10)
#: ``(source, target, begin, end, vectors)``: a row, target += source for begin .. end - 1.
add_row = simd.kernel(_add, "add_row", 5)
