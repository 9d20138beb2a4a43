"""The generated transforms against numpy.fft, kernel by kernel, without compiling: for vectors of any size."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_emitter import NumpyEmitter

from nbfftconv.transforms import codelets, four_step, row_codelets, row_four_step
from nbfftconv.transforms.butterflies import Complex, complex_transform, real_inverse, real_transform

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 24, 28, 30, 32)


@pytest.fixture(params=[64, 32, 16])
def v(request):
    return NumpyEmitter(np.float64, request.param)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-13 * max(1, np.abs(expected).max())


def random_complex(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def split(v, z):
    """Complex numbers [..., lane] as real ones [..., (re, im), lane]."""
    return np.stack([z.real, z.imag], axis=-2).astype(v.real)


def put_split(v, z):
    return v.put(split(v, z))


def get_split(v, address, *shape):
    parts = v.get(address, *shape, 2, v.lanes)
    return parts[..., 0, :] + 1j * parts[..., 1, :]


def vectors(v, z):
    return [Complex(v, v.vector(x.real), v.vector(x.imag)) for x in z]


def values(result):
    return np.stack([x.re.lanes + 1j * (0 if x.im is None else x.im.lanes) for x in result])


class TestButterflies:
    @pytest.mark.parametrize("n", LENGTHS)
    def test_complex_transform(self, v, n, rng):
        z = random_complex(rng, n, v.lanes)
        assert_close(values(complex_transform(vectors(v, z), -1)), np.fft.fft(z, axis=0))
        assert_close(values(complex_transform(vectors(v, z), 1)), np.fft.ifft(z, axis=0, norm="forward"))

    @pytest.mark.parametrize("n", LENGTHS)
    def test_real_transform(self, v, n, rng):
        x = rng.standard_normal((n, v.lanes))
        result = real_transform([Complex(v, v.vector(lanes)) for lanes in x])
        assert_close(values(result), np.fft.rfft(x, axis=0))
        ends = [y for k, y in enumerate(result) if 2 * k % n == 0]
        assert all(y.im is None for y in ends)

    @pytest.mark.parametrize("n", LENGTHS)
    def test_real_inverse(self, v, n, rng):
        z = random_complex(rng, n // 2 + 1, v.lanes)
        result = real_inverse(vectors(v, z), n)
        assert_close(np.stack([x.re.lanes for x in result]), np.fft.irfft(z, n, axis=0, norm="forward"))

    def test_single_precision(self, rng):
        """Values stay of the type that the emitter is for."""
        v = NumpyEmitter(np.float32, 64)
        z = random_complex(rng, 30, v.lanes)
        result = complex_transform(vectors(v, z), -1)
        assert {x.re.lanes.dtype for x in result} == {np.dtype(np.float32)}
        expected = np.fft.fft(z, axis=0)
        assert 0 < np.abs(values(result) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("length", codelets.SIDES)
class TestCodelets:
    rows = 2

    def test_rows_forward(self, v, length, rng):
        padded = -(-length // v.lanes) * v.lanes
        images = rng.standard_normal((self.rows, v.lanes, padded))
        inside = rng.random((self.rows, padded // v.lanes, v.lanes, v.lanes)) < 0.8  # [row, vector, tile, lane]
        base = 128
        places = b""
        for row, masks in zip(images, inside, strict=True):
            places += np.array([v.put(tile) - base for tile in row]).tobytes()
            places += (masks << np.arange(v.lanes)).sum(axis=-1).astype(np.uint16).tobytes()
        work, largest = v.reserve(self.rows, length // 2 + 1, 2, v.lanes), v.reserve(v.lanes)
        places = v.put(np.frombuffer(places, np.uint8))
        codelets.rows_forward(length)(v, places, base, work, self.rows, 10**9, largest)
        samples = np.where(inside.transpose(0, 2, 1, 3).reshape(images.shape), images, 0)
        expected = np.fft.rfft(samples[..., :length], axis=-1).transpose(0, 2, 1)
        assert_close(get_split(v, work, self.rows, length // 2 + 1), expected)
        assert v.get(largest, v.lanes).max() == np.abs(samples).max()

    def test_rows_inverse(self, v, length, rng):
        z = random_complex(rng, self.rows, length // 2 + 1, v.lanes)
        padded = -(-length // v.lanes) * v.lanes
        base, pitch = 128, padded * v.itemsize
        tiles = [v.reserve(self.rows, padded) for _ in range(v.lanes)]
        places = v.put(np.array(tiles) - base)
        codelets.rows_inverse(length)(v, places, base, pitch, put_split(v, z), self.rows)
        expected = np.fft.irfft(z, length, axis=1, norm="forward").transpose(2, 0, 1)
        assert_close(np.stack([v.get(tile, self.rows, padded) for tile in tiles])[..., :length], expected)

    @pytest.mark.parametrize("last", [0, 1])
    @pytest.mark.parametrize("count", [0, 2])
    def test_columns(self, v, length, count, last, rng):
        """Forward, then back: the first column is real, and the last one may be."""
        columns = 1 + count + last
        z = random_complex(rng, length, columns, v.lanes)
        real = [0, *([columns - 1] if last else [])]
        work_parts = split(v, z)
        work_parts[:, real, 1] = np.nan  # not read
        z[:, real] = z[:, real].real
        work, pitch = v.put(work_parts), columns * 2 * v.vector_bytes
        half = length // 2 + 1
        bins = len(real) * half + count * length
        stride = 3 * 2 * v.vector_bytes  # one of three channels
        spectrum = v.reserve(bins, 3, 2, v.lanes)
        codelets.columns(length, -1)(v, work, pitch, spectrum, stride, count, last)

        expected = np.fft.fft(z, axis=0)
        expected = np.concatenate([expected[: half if x in real else length, x] for x in range(columns)])
        channels = get_split(v, spectrum, bins, 3)
        assert_close(channels[:, 0], expected)
        assert np.isnan(channels[:, 1:]).all()

        back = v.reserve(length, columns, 2, v.lanes)
        codelets.columns(length, 1)(v, back, pitch, spectrum, stride, count, last)
        assert_close(get_split(v, back, length, columns), length * z)


def rows_of_lanes(v, rng, vectors, base):
    """Random rows, one a lane, what of them is inside [lane, sample], and the address of their indirection buffer."""
    rows = rng.standard_normal((v.lanes, vectors * v.lanes))
    inside = rng.random((vectors, v.lanes, v.lanes)) < 0.8  # [vector, tile, lane]
    places = np.array([v.put(row) - base for row in rows]).tobytes()
    places += (inside << np.arange(v.lanes)).sum(axis=-1).astype(np.uint16).tobytes()
    return rows, inside.transpose(1, 0, 2).reshape(rows.shape), v.put(np.frombuffer(places, np.uint8))


@pytest.mark.parametrize("length", [64, 144, 208, 576])
class TestRowCodelets:
    base = 128

    def transform(self, v, length, rng):
        """Return random rows, zero where they are not inside, and what the first step makes of them, in memory."""
        n1, n2 = row_codelets.STEPS[length]
        rows, inside, places = rows_of_lanes(v, rng, length // v.lanes, self.base)
        buffer, work, largest = v.reserve(length, v.lanes), v.reserve(n2, n1 // 2 + 1, 2, v.lanes), v.reserve(v.lanes)
        factors = v.put(row_codelets._factors(np.float64, length))
        emit = row_codelets.first_forward(n1)
        emit(v, places, self.base, buffer, work, n2, factors, 10**9, largest)
        samples = np.where(inside, rows, 0)
        assert v.get(largest, v.lanes).max() == np.abs(samples).max()
        return samples, (buffer, work, n2, factors)

    def test_forward(self, v, length, rng):
        """Both steps: half of the frequencies k1 + n1·k2, of k1 = 0 without the conjugate ones."""
        (n1, n2), (samples, (_, work, *_)) = row_codelets.STEPS[length], self.transform(v, length, rng)
        half, bins = n1 // 2 + 1, int(row_codelets.layout(np.float64, 1, length).bins)
        spectrum, size = v.reserve(bins, 2, v.lanes), 2 * v.vector_bytes
        codelets.columns(n2, -1)(v, work, half * size, spectrum, size, half - 1, 0)
        order = [*(n1 * np.arange(n2 // 2 + 1)), *(k1 + n1 * k2 for k1 in range(1, half) for k2 in range(n2))]
        assert_close(get_split(v, spectrum, bins), np.fft.fft(samples, axis=1).T[order])

    def test_there_and_back(self, v, length, rng):
        """To tiles apart, and to such that lie over each other: each lane keeps what comes before the next one's."""
        n1, _ = row_codelets.STEPS[length]
        samples, rest = self.transform(v, length, rng)
        for step in (length, 7):
            strip = v.reserve(step * v.lanes + length)
            places = v.put(strip + step * v.itemsize * np.arange(v.lanes) - self.base)
            row_codelets.last_inverse(n1)(v, places, self.base, *rest)
            assert_close(v.get(strip, step * v.lanes).reshape(v.lanes, step), n1 * samples[:, :step])


def frequencies(length):
    """The frequencies of a four-step transform in the order in which its two steps leave them."""
    n1, n2 = four_step.STEPS[length]
    return (np.arange(n1)[:, None] + n1 * np.arange(n2)).ravel()


def half_frequencies(length):
    """Those of a real column: of every k and N - k the first."""
    _, n2 = four_step.STEPS[length]
    order = frequencies(length)
    places = [0, *range(1, n2 // 2 + 1), *range(n2, n2 + (length - n2 + 1) // 2)]
    return order[places]


@pytest.mark.parametrize("length", four_step.SIDES)
class TestFourStep:
    def factors(self, v, length, sign, scale):
        return v.put(four_step.step_factors(v.real, length, sign, scale))

    def test_every_frequency_of_a_real_column_is_there(self, v, length):
        found = half_frequencies(length)
        assert sorted(min(k, length - k) for k in found) == list(range(length // 2 + 1))

    def test_columns(self, v, length, rng):
        """Of a pair of vectors and one column more, which takes another pair; a third pair is not needed."""
        half = length // 2 + 1
        samples = rng.standard_normal((length, 6 * v.lanes))
        pitch, vector = samples.shape[1] * v.itemsize, (half + 1) * 2 * v.vector_bytes
        tile = v.put(samples)
        buffer, columns = v.reserve(length, 2, v.lanes), v.reserve(6, half + 1, 2, v.lanes)
        needed = 2 * v.lanes + 1
        factors = self.factors(v, length, -1, 0.5)
        four_step.columns_forward(length)(v, tile, pitch, columns, vector, buffer, factors, needed)
        expected = np.fft.fft(samples, axis=0)[half_frequencies(length)].reshape(half, 6, v.lanes).transpose(1, 0, 2)
        result = get_split(v, columns, 6, half + 1)
        assert_close(result[:4, :half], expected[:4])
        assert np.isnan(result[4:]).all()
        assert np.isnan(result[:, half]).all()

        back = v.reserve(*samples.shape)
        factors = self.factors(v, length, 1, 1.0)
        four_step.columns_inverse(length)(v, back, pitch, columns, vector, buffer, factors, needed)
        result = v.get(back, *samples.shape)
        assert_close(result[:, : 4 * v.lanes], length * samples[:, : 4 * v.lanes])
        assert np.isnan(result[:, 4 * v.lanes :]).all()

    def test_columns_of_a_row(self, v, length, rng):
        """Turned on their way, and back again."""
        half = length // 2 + 1
        samples, turns = (
            rng.standard_normal((length, 2 * v.lanes)),
            np.exp(2j * rng.standard_normal((2, half, v.lanes))),
        )
        pitch, vector = samples.shape[1] * v.itemsize, half * 2 * v.vector_bytes
        buffer, columns = v.reserve(length, 2, v.lanes), v.reserve(2, half, 2, v.lanes)
        rest = v.put(samples), pitch, columns, vector, buffer
        end = 2 * v.lanes, put_split(v, turns)
        four_step.columns_forward(length, True)(v, *rest, self.factors(v, length, -1, 0.5), *end)
        expected = np.fft.fft(samples, axis=0)[half_frequencies(length)].reshape(half, 2, v.lanes).transpose(1, 0, 2)
        assert_close(get_split(v, columns, 2, half), expected * turns)
        back = v.reserve(*samples.shape)
        four_step.columns_inverse(length, True)(v, back, *rest[1:], self.factors(v, length, 1, 1.0), *end)
        assert_close(v.get(back, *samples.shape), length * samples)
        assert (row_four_step.stored_frequencies(length) == half_frequencies(length)).all()

    @pytest.mark.parametrize("is_whole", [True, False])
    def test_rows(self, v, length, is_whole, rng):
        """Of a group of rows of frequencies: all columns, or one only, which takes a pair of vectors."""
        column_vectors = 2 * -(-length // (2 * v.lanes))
        needed = length if is_whole else 1
        used = min(length, 2 * v.lanes * -(-needed // (2 * v.lanes)))
        z = random_complex(rng, v.lanes, column_vectors * v.lanes)  # [frequency, column]
        z[:, used:] = 0
        columns = put_split(v, z.reshape(v.lanes, column_vectors, v.lanes).transpose(1, 0, 2))
        vector = v.lanes * 2 * v.vector_bytes
        buffer = v.reserve(-(-length // v.lanes) * v.lanes, 2, v.lanes)
        stride = 3 * 2 * v.vector_bytes
        spectrum = v.reserve(length, 3, 2, v.lanes)
        factors = self.factors(v, length, -1, 1.0)
        four_step.rows_forward(length)(v, columns, vector, spectrum, stride, buffer, factors, needed)
        channels = get_split(v, spectrum, length, 3)
        assert_close(channels[:, 0], np.fft.fft(z[:, :length], axis=1)[:, frequencies(length)].T)
        assert np.isnan(channels[:, 1:]).all()

        back = v.reserve(column_vectors, v.lanes, 2, v.lanes)
        factors = self.factors(v, length, 1, 1.0)
        four_step.rows_inverse(length)(v, back, vector, spectrum, stride, buffer, factors, needed)
        result = get_split(v, back, column_vectors, v.lanes).transpose(1, 0, 2).reshape(z.shape)
        written = 2 * v.lanes * -(-needed // (2 * v.lanes))
        expected = length * z[:, :written]
        expected[:, length:] = 0
        assert_close(result[:, :written], expected)
        assert np.isnan(result[:, written:]).all()
