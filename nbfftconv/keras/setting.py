"""The numbers of one convolution of a Keras layer, and the geometry that each size of input gives them.

A kernel, here, is one in Keras' order, (kernel size..., channels, filters); a weight is one in this package's.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from nbfftconv.geometry import ConvGeometry

#: Of an array, along an axis; None is not known.
_Size = Sequence[int | None]


class Setting(NamedTuple):
    """The numbers of a convolution, as a layer has them.

    A transposed one is the gradient at the input of the convolution that `geometry` returns.

    Attributes
    ----------
    kind : {"plain", "depthwise", "transposed"}
        The kernel is (kernel size..., channels / groups, filters), (kernel size..., channels, multiplier) or
        (kernel size..., filters, channels).
    padding : {"valid", "same", "causal"}
    stride, dilation : tuple of int
        Of each spatial axis.
    output_padding : tuple of int or None
        Of a transposed convolution.
    channels_last : bool
        Whether channels are the last dimension of input and output.
    """

    kind: str
    padding: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...] | None
    channels_last: bool

    @property
    def is_transposed(self) -> bool:
        """Whether this is a gradient at the input."""
        return self.kind == "transposed"

    def order(self) -> tuple[int, ...]:
        """Return where the dimensions of a weight, before `weight_size`, are in a kernel."""
        axes = len(self.stride)
        pair = (axes, axes + 1) if self.kind == "depthwise" else (axes + 1, axes)
        return (*pair, *range(axes))

    def weight_size(self, kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the weight of a kernel."""
        first, second, *space = (kernel_size[each] for each in self.order())
        return (first * second, 1, *space) if self.kind == "depthwise" else (first, second, *space)

    def first(self, shape: _Size) -> tuple[Any, ...]:
        """Return the shape of an array with its channels first."""
        return (shape[0], shape[-1], *shape[1:-1]) if self.channels_last else tuple(shape)

    def as_given(self, shape: _Size) -> tuple[Any, ...]:
        """Return the shape of an array as the layer has it."""
        return (shape[0], *shape[2:], shape[1]) if self.channels_last else tuple(shape)

    def output_shape(self, input_shape: _Size, kernel_size: Sequence[int]) -> tuple[Any, ...]:
        """Return the shape of the output, as the layer has it; what is not known of the input is not of it."""
        batch, _, *space = self.first(input_shape)
        sizes = [None if n is None else self._along(i, n, kernel_size[i])[0] for i, n in enumerate(space)]
        filters = self.weight_size(kernel_size)[0] if not self.is_transposed else kernel_size[-2]
        return self.as_given((batch, filters, *sizes))

    def geometry(self, input_shape: Sequence[int], kernel_size: Sequence[int]) -> ConvGeometry:
        """Return the geometry for an input of that shape, as the layer has it; raise ValueError if there is none."""
        batch, channels, *space = self.first(input_shape)
        weight_size = self.weight_size(kernel_size)
        along = [self._along(i, n, kernel_size[i]) for i, n in enumerate(space)]
        padding = tuple((before, after) for _, before, after in along)
        if self.is_transposed:
            channels, space = weight_size[1], [size for size, _, _ in along]
        groups = max(1, channels // weight_size[1])
        size = (batch, channels, *space)
        return ConvGeometry.of_unchanging(size, weight_size, self.stride, padding, self.dilation, groups)

    def _along(self, axis: int, size: int, taps: int) -> tuple[int, int, int]:
        """Return the size of the output along an axis, and the padding before and after it.

        Of a transposed convolution padding is what the output is shorter at both ends.
        """
        stride, reach = self.stride[axis], self.dilation[axis] * (taps - 1)
        if self.is_transposed:
            return self._transposed_along(axis, size, reach)
        before = after = 0
        if self.padding == "same":
            total = max(0, (math.ceil(size / stride) - 1) * stride + reach + 1 - size)
            before, after = total // 2, total - total // 2
        elif self.padding == "causal":
            before = reach
        return max(0, (size + before + after - reach - 1) // stride + 1), before, after

    def _transposed_along(self, axis: int, size: int, reach: int) -> tuple[int, int, int]:
        stride = self.stride[axis]
        added = None if self.output_padding is None else self.output_padding[axis]
        reached = (size - 1) * stride + reach + 1  # by taps
        if self.padding == "valid":
            output = reached + (max(0, stride - reach - 1) if added is None else added)
            return output, 0, 0
        output = size * stride if added is None else (size - 1) * stride + (reach + 1) % 2 + added
        total = max(0, reached - output)
        return output, total // 2, total - total // 2
