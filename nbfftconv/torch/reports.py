"""Choice, Report: what was chosen for the layers of a network, as a table and as a picture."""

import math
import os
from dataclasses import dataclass
from typing import Any

from nbfftconv import tables


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer.

    Attributes
    ----------
    geometry : str
        Input and kernels.
    host, ours : float
        Seconds of a call by PyTorch, and by this package, with its gradients in training; NaN if they are not known.
    is_converted : bool
        Whether this package computes it.
    why : str

    Examples
    --------
    >>> import nbfftconv.torch as nt
    >>> nt.Choice("1×1×9×9, 1×1×3×3", 2e-5, 1e-5, True, "2.00 times as fast, measured").is_converted
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

    Examples
    --------
    >>> import nbfftconv.torch as nt
    >>> str(nt.Report({})).split()
    ['layer', 'geometry', 'torch,', 'ms', 'ours,', 'ms', 'computed', 'by', 'why']
    """

    def __init__(self, choices: dict[str, Choice]) -> None:
        self.choices = choices

    def __str__(self) -> str:
        head = "layer", "geometry", "torch, ms", "ours, ms", "computed by", "why"
        rows = [
            (
                name,
                each.geometry,
                tables.milliseconds(each.host),
                tables.milliseconds(each.ours),
                "nbfftconv" if each.is_converted else "torch",
                each.why,
            )
            for name, each in self.choices.items()
        ]
        return tables.as_text(head, rows)

    def plot(self, target: Any) -> Any:
        """Draw the time of each layer by PyTorch and by this package, as far as both are known.

        Needs matplotlib. The bar of the one that does not compute the layer is pale.

        Parameters
        ----------
        target : str, path or matplotlib.axes.Axes
            A file to write, in the format that its name ends with, or axes to draw into.

        Returns
        -------
        matplotlib.axes.Axes
            What was drawn into.

        Examples
        --------
        >>> import nbfftconv.torch as nt
        >>> from matplotlib.figure import Figure
        >>> report = nt.Report({"head": nt.Choice("1×1×9×9, 1×1×3×3", 2e-3, 1e-3, True, "")})
        >>> report.plot(Figure().subplots()).get_title()
        'Convolutions: 2.0 ms by PyTorch, 1.0 ms as converted'
        """
        from matplotlib.figure import Figure

        timed = {name: each for name, each in self.choices.items() if not math.isnan(each.host + each.ours)}
        is_file = isinstance(target, (str, os.PathLike))
        axes: Any = Figure((10, 1.5 + 0.3 * len(timed)), layout="constrained").subplots() if is_file else target
        for is_ours, label, color in ((False, "PyTorch", "tab:gray"), (True, "nbfftconv", "tab:blue")):
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
        axes.set_title(f"Convolutions: {1e3 * before:.1f} ms by PyTorch, {1e3 * after:.1f} ms as converted")
        if is_file:
            axes.figure.savefig(target, dpi=120)
        return axes


def _first(geometry: str) -> str:
    """Return the first of several geometries."""
    first, _, rest = geometry.partition("; ")
    return f"{first}; …" if rest else first
