"""Tiles from and to images, as masked vectors: what lies outside an image, or is not wanted, is not touched."""

from nbfftconv import simd
from nbfftconv.outliers import WORDS


def _gather(v, source, row, target, pitch, above, inside, below, begin, end, vectors, ahead, largest):
    def column(source, target, first, magnitude):
        mask = v.lanes_between(begin, end, first)

        def zeros(target):
            v.store(0.0, target)
            return [target + pitch]

        def samples(source, target, magnitude):
            v.prefetch(source + ahead)
            value = v.masked_load(source, mask)
            v.store(value, target)
            return [source + row, target + pitch, v.maximum(magnitude, v.magnitude(value))]

        (at,) = v.repeat(above, [target], zeros)
        _, at, magnitude = v.repeat(inside, [source, at, magnitude], samples)
        v.repeat(below, [at], zeros)
        return [source + v.vector_bytes, target + v.vector_bytes, first + v.lanes, magnitude]

    *_, magnitude = v.repeat(vectors, [source, target, 0, v.load_magnitude(largest)], column)
    v.store_magnitude(magnitude, largest)


def _write(v, source, pitch, target, row, rows, count, factors, relu, stream):
    scale, bias = v.broadcast(factors), v.broadcast(factors + v.itemsize)

    def write(clip, store):
        def factored(value):
            value = v.fma(value, scale, bias)
            return v.relu(value) if clip else value

        def line(source, target):
            store(factored(v.load(source)), target)
            return [source + v.vector_bytes, target + v.vector_bytes]

        def part_of_line(source, target, count):
            mask = v.lanes_between(0, count)
            v.masked_store(factored(v.masked_load(source, mask)), target, mask)

        def write_row(source, target):
            line_begin = (target + (v.vector_bytes - 1)) // v.vector_bytes * v.vector_bytes
            head = v.minimum((line_begin - target) // v.itemsize, count)
            part_of_line(source, target, head)
            done = head * v.itemsize
            lines = (count - head) // v.lanes
            at, to = v.repeat(lines, [source + done, target + done], line)
            part_of_line(at, to, count - head - lines * v.lanes)
            return [source + pitch, target + row]

        v.repeat(rows, [source, target], write_row)

    for is_streamed, store in enumerate((v.store_aligned, v.store_nontemporal)):
        for clip in (False, True):
            with v.when(stream, is_streamed), v.when(relu, int(clip)):
                write(clip, store)


def _stream(v, source, pitch, target, stride, bins, vectors):
    def one_bin(source, target):
        def vector(source, at):
            v.store_nontemporal(v.load(source), at)
            return [source + v.vector_bytes, at + v.vector_bytes]

        v.repeat(vectors, [source, target], vector)
        return [source + pitch, target + stride]

    v.repeat(bins, [source, target], one_bin)


def _scaled(is_added):
    def emit(v, source, pitch, target, row, rows, begin, end, vectors, scale):
        factor = v.broadcast(scale)

        def column(source, target, first):
            mask = v.lanes_between(begin, end, first)

            def samples(source, target):
                value = v.load(source)
                value = v.fma(value, factor, v.masked_load(target, mask)) if is_added else value * factor
                v.masked_store(value, target, mask)
                return [source + pitch, target + row]

            v.repeat(rows, [source, target], samples)
            return [source + v.vector_bytes, target + v.vector_bytes, first + v.lanes]

        v.repeat(vectors, [source, target, 0], column)

    return emit


def _reverse(v, source, target, count):
    def vector(source, end, count):
        end = end - v.vector_bytes
        value = v.reverse(v.masked_load(source, v.lanes_between(0, count)))
        v.masked_store(value, end, v.lanes_between(v.lanes - count, v.lanes))
        return [source + v.vector_bytes, end, count - v.lanes]

    vectors = (count + (v.lanes - 1)) // v.lanes
    v.repeat(vectors, [source, target + count * v.itemsize, count], vector)


def _finite(v, value):
    """The vector, with zeros for outliers."""
    return v.select(v.magnitude(value) > int(WORDS[v.real][1]), 0.0, value)


def _clear(v, tile, vectors):
    def vector(at):
        v.store(_finite(v, v.load(at)), at)
        return [at + v.vector_bytes]

    v.repeat(vectors, [tile], vector)


def _least(v, source, vectors, last, least):
    def vector(at, magnitude):
        return [at + v.vector_bytes, v.minimum(magnitude, v.magnitude(v.load(at)))]

    _, magnitude = v.repeat(vectors, [source, v.largest_magnitude()], vector)
    v.store_magnitude(v.minimum(magnitude, v.magnitude(v.load(last))), least)


#: ``(source, row, target, pitch, above, inside, below, begin, end, vectors, ahead, largest)``: whole vectors of a tile
#: whose rows are `pitch` bytes apart, from rows `row` bytes apart: samples begin .. end - 1 of the rows `inside`, zero
#: elsewhere and in the rows `above` and `below`. What is `ahead` bytes further on is fetched for a later call. The
#: vector at `largest` keeps the largest magnitudes, as bits.
gather_tile = simd.kernel(_gather, "gather_tile")
#: ``(source, pitch, target, row, rows, count, factors, relu, stream)``: `rows` rows of `count` samples to an array,
#: times factors[0], plus factors[1], clipped if `relu` is 1; past the caches if `stream` is 1. Whole lines are written,
#: so that none is read before: on one core 20 GB/s instead of 8.
write_rows = simd.kernel(_write, "write_rows")
#: ``(source, pitch, target, stride, bins, vectors)``: bins of so many vectors, `pitch` bytes apart, to bins `stride`
#: bytes apart, past the caches: on one core 19 GB/s instead of 4, where neighbouring channels fill a page for each bin.
stream_bins = simd.kernel(_stream, "stream_bins")
#: ``(source, pitch, target, row, rows, begin, end, vectors, scale)``: samples begin .. end - 1 of `rows` rows, added
#: times the scalar at `scale`, or written.
add_tile = simd.kernel(_scaled(True), "add_tile")
write_tile = simd.kernel(_scaled(False), "write_tile")
#: ``(source, target, count)``: scalars in reverse order.
reverse = simd.kernel(_reverse, "reverse")
#: ``(tile, vectors)``: set the outliers of so many vectors to zero.
clear_outliers = simd.kernel(_clear, "clear_outliers")
#: ``(source, vectors, last, least)``: the least magnitudes, as bits, of so many vectors and one more.
find_least = simd.kernel(_least, "find_least")
