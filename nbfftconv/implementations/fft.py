"""Convolution by FFT, tile by tile."""

from nbfftconv.implementations.tiled import Tiled
from nbfftconv.passes.plan import FftPlan


class Fft(Tiled):
    """Convolution by FFT, as the planner and the public functions see it."""

    name = FftPlan.algorithm
    phrase = "by FFT"


IMPLEMENTATION = Fft()
