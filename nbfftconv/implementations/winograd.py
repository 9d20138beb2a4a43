"""Winograd's minimal filtering, tile by tile, for kernels of few taps. What it computes is in `transforms.winograd`."""

from collections.abc import Sequence

from nbfftconv.implementations import Inapplicable, Request
from nbfftconv.implementations.tiled import Tiled, TiledCandidates
from nbfftconv.passes.plan import WinogradPlan
from nbfftconv.plan import ConvPlan, StepPlan
from nbfftconv.tiling import problem_sizes
from nbfftconv.transforms.winograd import MOST_TAPS


class Winograd(Tiled):
    """Winograd's minimal filtering, as the planner and the public functions see it."""

    name = WinogradPlan.algorithm
    phrase = "by Winograd"

    def candidates(self, request: Request) -> TiledCandidates:
        """Return the tiles to choose from."""
        taps = tuple(of_axis for _, of_axis in problem_sizes(request.geometry))
        if max(taps) > MOST_TAPS:
            raise Inapplicable(f"Winograd's maps are for {MOST_TAPS} taps a side at most, not {taps}")
        return super().candidates(request)

    def step(self, requests: Sequence[Request], forward: ConvPlan, spectra_limit: int, below: float) -> StepPlan | None:
        """Return None: to add up small tiles that overlap takes longer than to transform the gradient anew."""
        return None


IMPLEMENTATION = Winograd()
