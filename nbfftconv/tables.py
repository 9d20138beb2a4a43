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
