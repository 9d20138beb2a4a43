"""Rows of tiles from and to images, as masked vectors: what lies outside an image, or is not wanted, is not touched."""

from nbfftconv import simd


def _gather(v, source, target, begin, end, vectors, ahead):
    def step(source, target, first):
        v.prefetch(v.add(source, ahead))
        v.store(v.load_some(source, v.between(first, begin, end)), target)
        size = v.integer(simd.VECTOR_BYTES)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

    v.repeat(vectors, [source, target, v.integer(0)], step)


def _scatter(v, source, target, end, vectors, factors, relu, ahead):
    scale, bias = v.broadcast(factors), v.broadcast(v.add(factors, v.integer(v.itemsize)))

    def step(source, target, first):
        v.prefetch(v.add(target, ahead), write=True)
        value = v.multiply_add(v.load(source), scale, bias)
        v.store_some(v.clip(value) if clip else value, target, v.between(first, v.integer(0), end))
        size = v.integer(simd.VECTOR_BYTES)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

    for clip in (False, True):
        with v.when(relu, int(clip)):
            v.repeat(vectors, [source, target, v.integer(0)], step)


def _add(v, source, target, begin, end, vectors):
    def step(source, target, first):
        mask = v.between(first, begin, end)
        v.store_some(v.plus(v.load_some(target, mask), v.load(source)), target, mask)
        size = v.integer(simd.VECTOR_BYTES)
        return [v.add(source, size), v.add(target, size), v.add(first, v.integer(v.lanes))]

    v.repeat(vectors, [source, target, v.integer(0)], step)


#: ``(source, target, begin, end, vectors, ahead)``: whole vectors of a tile's row; zero outside begin .. end - 1.
#: What is `ahead` bytes further on is fetched for a later call.
gather_row = simd.kernel(_gather, "gather_row", 6)
#: ``(source, target, end, vectors, factors, relu, ahead)``: target = source * factors[0] + factors[1], clipped if
#: `relu` is 1; to be written next are rows `ahead` bytes further on.
scatter_row = simd.kernel(_scatter, "scatter_row", 7)
#: ``(source, target, begin, end, vectors)``: target += source, for begin .. end - 1.
add_row = simd.kernel(_add, "add_row", 5)
