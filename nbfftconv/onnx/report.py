"""What a session chose for each convolution, and why."""

import math
from dataclasses import dataclass

from nbfftconv import tables


@dataclass(frozen=True)
class Choice:
    """What was chosen for a node.

    Attributes
    ----------
    geometry : str
        Input and kernels.
    host, ours : float
        Seconds of the node by onnxruntime, and by this package; NaN if they are not known.
    is_replaced : bool
        Whether this package computes it.
    why : str

    Examples
    --------
    >>> from nbfftconv.onnx import Choice
    >>> Choice("1×1×9×9, 1×1×3×3", 2e-5, 1e-5, True, "2.00 times as fast, measured").is_replaced
    True
    """

    geometry: str
    host: float
    ours: float
    is_replaced: bool
    why: str


@dataclass(frozen=True)
class Report:
    """What was chosen for all convolutions of a model; as text, a table.

    Attributes
    ----------
    choices : dict from str to Choice
        By the nodes' names, those of the model as onnxruntime optimized it.
    why : str
        Of the model as a whole.
    host, ours : float
        Seconds of the model by onnxruntime alone, and as it is run now; NaN if they were not measured.

    Examples
    --------
    >>> from nbfftconv.onnx import Report
    >>> print(Report({}, "it has no convolutions"))
    it has no convolutions
    """

    choices: dict[str, Choice]
    why: str
    host: float = math.nan
    ours: float = math.nan

    def __str__(self) -> str:
        if not self.choices:
            return self.why
        nodes = [
            (name, each.geometry, each.host, each.ours, each.is_replaced, each.why)
            for name, each in self.choices.items()
        ]
        return f"{tables.of_layers('node', 'onnxruntime', nodes)}\n{self.why}"
