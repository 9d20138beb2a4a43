"""Padding modes: the padded input, and the adjoint that folds its gradient back. Passes pad with zeros themselves."""

from typing import Any

import numpy as np

from nbfftconv.geometry import FLAT, ConvGeometry, one_of

#: PyTorch's names, and NumPy's.
_MODES: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
PADDING_MODES = ("zeros", *_MODES)


def check_mode(mode: str) -> None:
    """Raise ValueError if the mode is unknown."""
    one_of("padding_mode", mode, PADDING_MODES)


def check(geometry: ConvGeometry, mode: str) -> None:
    """Raise ValueError if the mode is unknown or does not allow so much padding (PyTorch's limits)."""
    check_mode(mode)
    for size, pads in zip(geometry.input_size[2:], geometry.padding, strict=True):
        if mode == "reflect" and max(pads) >= size or mode == "circular" and max(pads) > size:
            raise ValueError(
                f"padding {geometry.padding} is too large for padding_mode {mode!r} and input {geometry.input_size}"
            )


def pass_geometry(geometry: ConvGeometry, mode: str) -> ConvGeometry:
    """Return the geometry that is left to a pass."""
    return geometry if mode == "zeros" else geometry.with_padding_applied()


def pad(input: np.ndarray, geometry: ConvGeometry, mode: str) -> np.ndarray:
    """Return the input of a pass."""
    if mode == "zeros":
        return input
    return np.pad(input, ((0, 0), (0, 0), *_around(geometry)), mode=_MODES[mode])


def _around(geometry: ConvGeometry) -> tuple[tuple[int, int], ...]:
    """Return the padding of each spatial axis of the input's array."""
    depth = geometry.depth
    return geometry.padding if depth == FLAT else ((depth.before, depth.after), *geometry.padding)


def fold(grad_padded: np.ndarray, geometry: ConvGeometry, mode: str) -> np.ndarray:
    """Return the gradient at the input from that at a pass's input: every pixel adds to the one it copied."""
    if mode == "zeros":
        return grad_padded
    for axis, (before, after) in enumerate(_around(geometry), 2):
        size = geometry.input_shape[axis]
        source = np.pad(np.arange(size), (before, after), mode=_MODES[mode])
        padded = np.moveaxis(grad_padded, axis, 0)
        folded = padded[before : before + size].copy()
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN here as everywhere
            for i in (*range(before), *range(before + size, before + size + after)):
                folded[source[i]] += padded[i]
        grad_padded = np.moveaxis(folded, 0, axis)
    return np.ascontiguousarray(grad_padded)
