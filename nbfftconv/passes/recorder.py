"""A pass over tiles, recorded as a program."""

from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.context import Context
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.program import Program, Recording


class Recorder(Recording, Context):
    """A pass that is recorded: with an `operand` for each array, tasks are added as for one that is run."""

    def __init__(self, plan: TiledPlan, geometry: ConvGeometry) -> None:
        Recording.__init__(self)
        Context.__init__(self, plan, geometry)

    def recorded(self) -> Program:
        """Return the program of the tasks that were added."""
        return self.program(self.tasks, self)
