"""Winograd's minimal filtering, tile by tile: the passes of an FFT with another transform, for kernels of few taps."""

from nbfftconv.implementations import Inapplicable, Request
from nbfftconv.implementations.fft import Fft, FftCandidates
from nbfftconv.passes.plan import WinogradPlan
from nbfftconv.tiling import problem_sizes
from nbfftconv.transforms.winograd import MOST_TAPS


class Winograd(Fft):
    """Winograd's minimal filtering, as the planner and the public functions see it."""

    name = WinogradPlan.algorithm
    phrase = "by Winograd's maps"

    def candidates(self, request: Request) -> FftCandidates:
        """Return the tiles to choose from."""
        taps = [of_axis for _, of_axis in problem_sizes(request.geometry)]
        if max(taps) > MOST_TAPS:
            raise Inapplicable(f"Winograd's maps are for {MOST_TAPS} taps a side at most, not {tuple(taps)}")
        return super().candidates(request)


IMPLEMENTATION = Winograd()
