"""Tables as plain text, and what reports on convolutions have in their cells."""

import math
from collections.abc import Sequence


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are as wide as their widest cells."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def milliseconds(seconds: float) -> str:
    """Return seconds in milliseconds; nothing for NaN."""
    return "" if math.isnan(seconds) else f"{1e3 * seconds:.3f}"


def of_layers(kind: str, host: str, layers: Sequence[tuple[str, str, float, float, bool, str]]) -> str:
    """Return the table of what a host's layers, or nodes, take, and who computes them.

    Each is a name, a geometry, the seconds by the host and by this package, whether this computes it, and why.
    """
    head = kind, "geometry", f"{host}, ms", "ours, ms", "computed by", "why"
    rows = [
        (name, geometry, milliseconds(theirs), milliseconds(ours), "nbfftconv" if is_ours else host, why)
        for name, geometry, theirs, ours, is_ours, why in layers
    ]
    return as_text(head, rows)


def geometry(
    input_size: Sequence[int | str],
    weight_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """Return the geometry of a layer in a few words."""

    def times(sizes: Sequence[int | str]) -> str:
        return "×".join(map(str, sizes))

    text = f"{times(input_size)}, {times(weight_size)}"
    for name, numbers in (("stride", stride), ("dilation", dilation)):
        if any(number != 1 for number in numbers):
            text += f", {name} {times(numbers)}"
    return text + (f", groups {groups}" if groups > 1 else "")
