"""What the modules for PyTorch and for Keras have in common: what was chosen for a network's layers, and their times.

Times of this package are those of its cost model; those of a host, whose convolutions nobody modelled, are a rule.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfftconv import tables
from nbfftconv.channels_last import exchange_seconds
from nbfftconv.geometry import ConvGeometry
from nbfftconv.machine import get_machine
from nbfftconv.planner import make_plan, plan_channels_last
from nbfftconv.threads import get_num_threads

#: A layer is replaced if it takes at most this part of the host's time: less is noise.
GAIN = 0.95
# What a host's convolution is taken to do: a part of a core's operations in groups of at least so many channels, and
# less in proportion where there are fewer; bytes of input and output as fast as memory is copied; seconds of a call.
_HOST_RATE, _HOST_CHANNELS, _HOST_CALL = 0.7, 8, 1.5e-5
#: Seconds of a call from Python.
_CALL = 3e-5
#: So many times longer than its model says may take what reads memory that the threads share, as 1×1 does.
_CAUTION = {"direct": 2.0}


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer.

    Attributes
    ----------
    geometry : str
        Input and kernels.
    host, ours : float
        Seconds of a call by the host, PyTorch or Keras, and by this package; NaN if they are not known. In PyTorch with
        the layer's gradients in training.
    is_converted : bool
        Whether this package computes it.
    why : str

    Examples
    --------
    >>> from nbfftconv.hosts import Choice
    >>> Choice("1×1×9×9, 1×1×3×3", 2e-5, 1e-5, True, "2.00 times as fast, measured").is_converted
    True
    """

    geometry: str
    host: float
    ours: float
    is_converted: bool
    why: str


class Report:
    """What was chosen for all layers of a network; as text, a table.

    Parameters
    ----------
    choices : dict from str to Choice
        By the layers' names; also an attribute.
    """

    #: The host's name, in tables and in pictures.
    _host: str
    _title: str

    def __init__(self, choices: dict[str, Choice]) -> None:
        self.choices = choices

    def __str__(self) -> str:
        layers = [
            (name, each.geometry, each.host, each.ours, each.is_converted, each.why)
            for name, each in self.choices.items()
        ]
        return tables.of_layers("layer", self._host, layers)

    def plot(self, target: Any) -> Any:
        """Draw the time of each layer by the host and by this package, as far as both are known.

        Needs matplotlib. The bar of the one that does not compute the layer is pale.

        Parameters
        ----------
        target : str, path or matplotlib.axes.Axes
            A file to write, in the format that its name ends with, or axes to draw into.

        Returns
        -------
        matplotlib.axes.Axes
            What was drawn into.
        """
        from matplotlib.figure import Figure

        timed = {name: each for name, each in self.choices.items() if not math.isnan(each.host + each.ours)}
        is_file = isinstance(target, (str, os.PathLike))
        axes: Any = Figure((10, 1.5 + 0.3 * len(timed)), layout="constrained").subplots() if is_file else target
        for is_ours, label, color in ((False, self._title, "tab:gray"), (True, "nbfftconv", "tab:blue")):
            places = [place + (0.2 if is_ours else -0.2) for place in range(len(timed))]
            seconds = [each.ours if is_ours else each.host for each in timed.values()]
            colors = [(color, 1.0 if each.is_converted == is_ours else 0.3) for each in timed.values()]
            axes.barh(places, [1e3 * each for each in seconds], 0.4, color=colors)
            axes.barh([math.nan], [math.nan], color=color, label=label)  # for the legend
        axes.set_yticks(range(len(timed)), [f"{name}  {_first(each.geometry)}" for name, each in timed.items()])
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.set_xlabel("ms")
        axes.legend(title="pale: not in use")
        before = sum(each.host for each in timed.values())
        after = sum(each.ours if each.is_converted else each.host for each in timed.values())
        axes.set_title(f"Convolutions: {1e3 * before:.1f} ms by {self._title}, {1e3 * after:.1f} ms as converted")
        if is_file:
            axes.figure.savefig(target, dpi=120)
        return axes


def _first(geometry: str) -> str:
    """Return the first of several geometries."""
    first, _, rest = geometry.partition("; ")
    return f"{first}; …" if rest else first


def our_seconds(
    geometry: ConvGeometry, directions: Iterable[str], dtype: np.dtype, weight_changes: bool, channels_last: bool
) -> float:
    """Return the seconds of passes that this package's model expects.

    A weight that changes is transformed in each; arrays whose channels come last are brought to the other order and
    back, unless a plan takes them as they are.
    """
    seconds = 0.0
    for each in directions:
        keeps = each != "grad_weight" and not weight_changes
        plan = make_plan(geometry.of_images, each, dtype, "auto", weight_is_transformed=keeps)
        if channels_last and each == "forward":
            plan = plan_channels_last(plan, "auto", keeps)
        of_pass = _CAUTION.get(plan.algorithm, 1.0) * plan.seconds
        if channels_last and not plan.geometry.channels_last:
            of_pass += exchange_seconds(geometry, dtype)
        seconds += _CALL + of_pass / get_num_threads()
    return seconds


def host_seconds(geometry: ConvGeometry, itemsize: int, threads: int) -> float:
    """Return the seconds of one pass of a host's convolution, by rule of thumb."""
    machine = get_machine()
    channels = min(geometry.weight_size[0] // geometry.groups, geometry.weight_size[1])
    rate = _HOST_RATE * min(1.0, max(0.25, channels / _HOST_CHANNELS)) * machine.flops * 4 / itemsize
    moved = itemsize * (math.prod(geometry.input_size) + math.prod(geometry.output_size))
    return _HOST_CALL + max(2 * geometry.multiply_adds / (rate * threads), moved / machine.bandwidth)
