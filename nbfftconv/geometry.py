"""The numbers of one convolution, validated. Knows no array and no algorithm."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbfftconv.forking import cached_property

#: A size, stride, dilation or padding is below this, so that sums and products of two of them fit 64 bits.
SIZE_LIMIT = 2**31
#: No array may be larger.
BYTES_LIMIT = 2**43

#: What `ConvGeometry.axis_numbers` gives.
AXIS_NUMBERS = ("stride", "dilation", "before", "input", "output", "kernel")

# With the least size of each.
_INPUT_DIMENSIONS = {"batch": 0, "channels": 1, "height": 1, "width": 1}
_WEIGHT_DIMENSIONS = {"out channels": 1, "channels of a group": 1, "kernel height": 1, "kernel width": 1}

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


def one_of(name: str, value: Any, known: Sequence[str | None]) -> None:
    """Raise ValueError if `value` is none of the names."""
    if not (value is None or isinstance(value, str)) or value not in known:
        names = ", ".join("None" if each is None else each for each in known)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")


def integer(name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int from `minimum` to `SIZE_LIMIT`, or raise an error that repeats it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not minimum <= number < SIZE_LIMIT:
        raise ValueError(f"{name} must be at least {minimum} and below 2**31, got {number}")
    return number


def _items(value: Any) -> tuple[Any, ...] | None:
    """Return the items of a sequence or an array; None of a number and of what has no order or lives only once."""
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if not is_sequence or isinstance(value, (str, bytes, bytearray, Mapping)):
        return None
    try:
        return tuple(value)
    except TypeError:  # an array without dimensions
        return None


def pair(name: str, value: Any, minimum: int, parts: tuple[str, str] = ("vertical", "horizontal")) -> tuple[int, int]:
    """Return an int, or a pair of them, as a pair: (vertical, horizontal), or what `parts` are called."""
    items = _items(value)
    if items is None:
        return (integer(name, value, minimum),) * 2
    if len(items) != 2:
        raise ValueError(f"{name} must be an integer or a pair of integers, got {value!r}")
    first, second = (
        integer(f"{name} {value!r}: {part}", item, minimum) for part, item in zip(parts, items, strict=True)
    )
    return first, second


def size4(name: str, value: Any, dimensions: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Return the shape of a four-dimensional array; `dimensions` are their names, each with the least size."""
    items = _items(value)
    if items is None:
        raise TypeError(f"{name} must be a sequence of 4 integers, got {value!r}")
    if len(items) != 4:
        raise ValueError(f"{name} must have 4 dimensions, {', '.join(dimensions)}, got {value!r}")
    a, b, c, d = (
        integer(f"{name} {items!r}: {dimension}", item, least)
        for item, (dimension, least) in zip(items, dimensions.items(), strict=True)
    )
    check_bytes(name, (a, b, c, d))
    return a, b, c, d


def unchanging(value: Any) -> Any:
    """Return a validated stride, dilation or padding as a name, an int or tuples of ints, which nobody can change."""
    items = _items(value)
    if items is not None:
        return tuple(map(unchanging, items))
    return value if isinstance(value, str) else operator.index(value)


def check_bytes(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError if an array of that shape in float64 passes `BYTES_LIMIT`."""
    elements = 1
    for size in shape:
        elements *= size
    if 8 * elements > BYTES_LIMIT:
        raise ValueError(f"{name} {tuple(shape)} is too large: more than 2**43 bytes")


def _resolve_padding(
    padding: Padding, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    extent = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0), (0, 0)
        if padding == "full":
            return (extent[0], extent[0]), (extent[1], extent[1])
        if padding == "same":
            if stride != (1, 1):
                raise ValueError(f"padding 'same' needs stride 1, got stride {stride}")
            # torch puts the odd one at the end
            return (extent[0] // 2, extent[0] - extent[0] // 2), (extent[1] // 2, extent[1] - extent[1] // 2)
        raise ValueError(f"padding must be 'valid', 'same', 'full' or integers, got {padding!r}")
    items = _items(padding)
    if items is None:
        return (pair("padding", padding, 0),) * 2
    if len(items) != 2:
        raise ValueError(f"padding must be an integer, a pair, or ((top, bottom), (left, right)), got {padding!r}")
    vertical, horizontal = items
    return (
        pair(f"padding {padding!r}: vertical", vertical, 0, ("top", "bottom")),
        pair(f"padding {padding!r}: horizontal", horizontal, 0, ("left", "right")),
    )


def layer_numbers(
    weight_size: Any, stride: Any, padding: Padding, dilation: Any, groups: Any
) -> tuple[tuple[int, int, int, int], tuple[int, int], tuple[tuple[int, int], tuple[int, int]], tuple[int, int], int]:
    """Validate all that does not depend on the input; return weight size, stride, padding, dilation and groups.

    Raises TypeError or ValueError as `ConvGeometry.from_arguments` does.
    """
    size = size4("weight", weight_size, _WEIGHT_DIMENSIONS)
    strides = pair("stride", stride, 1)
    dilations = pair("dilation", dilation, 1)
    groups = integer("groups", groups, 1)
    if size[0] % groups:
        raise ValueError(f"weight {size} has {size[0]} out channels, not a multiple of groups={groups}")
    return size, strides, _resolve_padding(padding, size[2:], strides, dilations), dilations, groups


@dataclass(frozen=True)
class ConvGeometry:
    """One convolution. Build it with `from_arguments`.

    Attributes
    ----------
    input_size : tuple of int
        Shape of the input, (batch, channels, height, width).
    weight_size : tuple of int
        Shape of the kernels, (out channels, channels / groups, kernel height, kernel width).
    stride : tuple of int
        Distance of neighbouring outputs in pixels, (vertical, horizontal).
    padding : tuple of tuple of int
        Pixels around the input, ((top, bottom), (left, right)).
    dilation : tuple of int
        Distance of neighbouring taps in pixels, (vertical, horizontal).
    groups : int
        Groups of channels that are convolved apart.

    Examples
    --------
    >>> from nbfftconv.geometry import ConvGeometry
    >>> geometry = ConvGeometry.from_arguments((1, 3, 32, 32), (8, 3, 4, 4), padding="same")
    >>> geometry.padding, geometry.output_size
    (((1, 2), (1, 2)), (1, 8, 32, 32))
    """

    input_size: tuple[int, int, int, int]
    weight_size: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Every table of plans, records and transforms asks for it."""
        return hash((self.input_size, self.weight_size, self.stride, self.padding, self.dilation, self.groups))

    @classmethod
    def from_arguments(
        cls,
        input_size: Any,
        weight_size: Any,
        stride: Any = 1,
        padding: Padding = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> "ConvGeometry":
        """Validate the arguments of a convolution.

        Parameters
        ----------
        input_size : sequence of int
            Shape of the input, (batch, channels, height, width).
        weight_size : sequence of int
            Shape of the kernels, (out channels, channels / groups, kernel height, kernel width).
        stride : int or tuple of int, default 1
            As in `nbfftconv.conv2d`.
        padding : int, tuple or str, default 0
            As in `nbfftconv.conv2d`.
        dilation : int or tuple of int, default 1
            As in `nbfftconv.conv2d`.
        groups : int, default 1
            As in `nbfftconv.conv2d`.

        Returns
        -------
        ConvGeometry
            With all numbers in the forms of the attributes.

        Raises
        ------
        TypeError
            If a size is not an integer.
        ValueError
            If a size is out of range, channels and groups do not match, or the kernel is larger than the padded input.
        """
        arguments = input_size, weight_size, stride, padding, dilation, groups
        return (_geometry if _is_plain(arguments) else _geometry.__wrapped__)(*arguments)

    @classmethod
    def of_unchanging(
        cls, input_size: Any, weight_size: Any, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> "ConvGeometry":
        """Do as `from_arguments`, for shapes of arrays and what `unchanging` has returned: sooner.

        Parameters
        ----------
        input_size : tuple of int
            As in `from_arguments`, like all others.
        weight_size : tuple of int
            The shape of an array.
        stride : int or tuple of int
            In the form that `unchanging` gives it, like the others.
        padding : int, tuple or str
            In the same form.
        dilation : int or tuple of int
            In the same form.
        groups : int
            In the same form.

        Returns
        -------
        ConvGeometry
            As of `from_arguments`, which also tells what is raised.
        """
        return _geometry(input_size, weight_size, stride, padding, dilation, groups)

    @classmethod
    def _validated(
        cls, input_size: Any, weight_size: Any, stride: Any, padding: Padding, dilation: Any, groups: Any
    ) -> "ConvGeometry":
        input_size = size4("input", input_size, _INPUT_DIMENSIONS)
        weight_size, strides, pads, dilations, groups = layer_numbers(weight_size, stride, padding, dilation, groups)
        if input_size[1] != weight_size[1] * groups:
            raise ValueError(
                f"input {input_size} has {input_size[1]} channels, but weight {weight_size} with groups={groups} "
                f"needs {weight_size[1] * groups}"
            )
        geometry = cls(input_size, weight_size, strides, pads, dilations, groups)
        kernel = weight_size[2:]
        padded = geometry.padded_size
        extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
        if extent[0] > padded[0] or extent[1] > padded[1]:
            raise ValueError(
                f"kernel {kernel} with dilation {dilations} spans {extent}, more than the padded input {padded} "
                f"(input {input_size}, padding {pads})"
            )
        check_bytes(f"input {input_size} with padding {pads}", (*input_size[:2], *padded))
        check_bytes(f"output for input {input_size} with padding {pads}", geometry.output_size)
        return geometry

    @cached_property
    def padded_size(self) -> tuple[int, int]:
        """Pixels of the padded input, (height, width)."""
        (top, bottom), (left, right) = self.padding
        return self.input_size[2] + top + bottom, self.input_size[3] + left + right

    @cached_property
    def output_size(self) -> tuple[int, int, int, int]:
        """Shape of the output, (batch, out channels, height, width)."""
        height, width = (
            (p - d * (k - 1) - 1) // s + 1
            for p, d, k, s in zip(self.padded_size, self.dilation, self.weight_size[2:], self.stride, strict=True)
        )
        return self.input_size[0], self.weight_size[0], height, width

    def axis_numbers(self, axis: int) -> dict[str, int]:
        """Return the numbers along one axis.

        Parameters
        ----------
        axis : int
            0, vertical, or 1, horizontal.

        Returns
        -------
        dict from str to int
            The entries "stride", "dilation", "before" (the padding at its beginning), "input", "output" and "kernel".
        """
        numbers = (
            self.stride[axis],
            self.dilation[axis],
            self.padding[axis][0],
            self.input_size[2 + axis],
            self.output_size[2 + axis],
            self.weight_size[2 + axis],
        )
        return dict(zip(AXIS_NUMBERS, numbers, strict=True))

    def with_padding_applied(self) -> "ConvGeometry":
        """Return the same convolution of an input that was padded beforehand.

        Returns
        -------
        ConvGeometry
            Without padding.
        """
        size = (*self.input_size[:2], *self.padded_size)
        return replace(self, input_size=size, padding=((0, 0), (0, 0)))

    def transposed(self) -> "ConvGeometry | None":
        """Return the convolution that takes the output's gradient to the input's, None if there is none.

        Its kernels are these with filters and channels of each group exchanged and both axes reversed. With a stride
        there is none, nor with so much padding that its own would be negative.

        Returns
        -------
        ConvGeometry or None
            The transposed problem.
        """
        filters, channels, height, width = self.weight_size
        (top, bottom), (left, right) = self.padding
        rows, columns = self.dilation[0] * (height - 1), self.dilation[1] * (width - 1)
        padding = (rows - top, rows - bottom), (columns - left, columns - right)
        if self.stride != (1, 1) or min(map(min, padding)) < 0:
            return None
        weight_size = channels * self.groups, filters // self.groups, height, width
        return replace(self, input_size=self.output_size, weight_size=weight_size, padding=padding)

    @property
    def multiply_adds(self) -> int:
        """Multiplications of direct convolution, padding included."""
        n, k, height, width = self.output_size
        return n * k * height * width * self.weight_size[1] * self.weight_size[2] * self.weight_size[3]


def _is_plain(value: Any) -> bool:
    """Whether a value is of ints and strings in tuples: it has a hash, and none that is equal is of other types."""
    return type(value) in (int, str) or (type(value) is tuple and all(map(_is_plain, value)))


@functools.lru_cache(maxsize=1024)
def _geometry(*arguments: Any) -> ConvGeometry:
    return ConvGeometry._validated(*arguments)
