"""The numbers of one convolution, validated. Knows no array and no algorithm."""

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nbfftconv.forking import cached_property
from nbfftconv.rounding import cdiv

#: A size, stride, dilation or padding is below this, so that sums and products of two of them fit 64 bits.
SIZE_LIMIT = 2**31
#: No array may be larger.
BYTES_LIMIT = 2**43

#: What `ConvGeometry.axis_numbers` gives.
AXIS_NUMBERS = ("stride", "dilation", "before", "input", "output", "kernel")

#: By the number of spatial axes, their names, ...
AXES: dict[int, tuple[str, ...]] = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
#: ... what is along each, and its two ends.
_ALONG = {"length": "horizontal", "depth": "in depth", "height": "vertical", "width": "horizontal"}
_ENDS = {
    "length": ("left", "right"),
    "depth": ("front", "back"),
    "height": ("top", "bottom"),
    "width": ("left", "right"),
}
#: What is said of as many integers as there are axes.
_MANY = {1: "a tuple of one", 2: "a pair of integers", 3: "three of them"}
#: What is said of padding in numbers.
_PADS = {
    1: "an integer or (left, right)",
    2: "an integer, a pair, or ((top, bottom), (left, right))",
    3: "an integer, three of them, or ((front, back), (top, bottom), (left, right))",
}

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]
#: A number for all spatial axes, or one for each.
Numbers = int | Sequence[int]


#: Kernels of one column that have no more rows fit tiles of all transforms.
_FEW_ROWS = 32


class Depth(NamedTuple):
    """The third axis of volumes, whose planes passes see as images and as channels.

    Output plane o of a volume is an image. Of each channel it has a channel for every tap u of a kernel: the input's
    plane o·stride + u·dilation - before, which is zero where there is none.

    Attributes
    ----------
    planes, outputs, taps : int
        Planes of the input and of the output, and of a kernel.
    stride, dilation : int
    before : int
        Padding before the first plane. Less than 0 if no tap meets the first planes.
    """

    planes: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    before: int

    @property
    def after(self) -> int:
        """Padding after the last plane that some tap meets."""
        return max(
            0, (self.outputs - 1) * self.stride + (self.taps - 1) * self.dilation + 1 - self.planes - self.before
        )


#: That of images: a channel is a plane.
FLAT = Depth(1, 1, 1, 1, 1, 0)


def _input_dimensions(axes: int) -> dict[str, int]:
    """Return the names of an input's dimensions, with the least size of each."""
    return {"batch": 0, "channels": 1, **dict.fromkeys(AXES[axes], 1)}


def _weight_dimensions(axes: int) -> dict[str, int]:
    """Return the same of kernels."""
    return {"out channels": 1, "channels of a group": 1, **{f"kernel {axis}": 1 for axis in AXES[axes]}}


def one_of(name: str, value: Any, known: Sequence[str | None]) -> None:
    """Raise ValueError if `value` is none of the names."""
    if not (value is None or isinstance(value, str)) or value not in known:
        names = ", ".join("None" if each is None else each for each in known)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """Return a flag as a bool, or raise TypeError."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


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


def numbers(name: str, value: Any, minimum: int, parts: Sequence[str]) -> tuple[int, ...]:
    """Return an int, or one for each of the parts, as a tuple of one for each."""
    items = _items(value)
    if items is None:
        return (integer(name, value, minimum),) * len(parts)
    if len(items) != len(parts):
        raise ValueError(f"{name} must be an integer or {_MANY[len(parts)]}, got {value!r}")
    return tuple(integer(f"{name} {value!r}: {part}", item, minimum) for part, item in zip(parts, items, strict=True))


def pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Return an int, or a pair of them, as a pair: (vertical, horizontal)."""
    vertical, horizontal = numbers(name, value, minimum, ("vertical", "horizontal"))
    return vertical, horizontal


def _along(name: str, value: Any, minimum: int, axes: int) -> tuple[int, ...]:
    """Return an int, or one for each spatial axis, as a tuple of one for each."""
    return numbers(name, value, minimum, [_ALONG[axis] for axis in AXES[axes]])


def _size(name: str, value: Any, dimensions: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of an array; `dimensions` are the names of its dimensions, each with the least size."""
    items = _items(value)
    if items is None:
        raise TypeError(f"{name} must be a sequence of {len(dimensions)} integers, got {value!r}")
    if len(items) != len(dimensions):
        raise ValueError(f"{name} must have {len(dimensions)} dimensions, {', '.join(dimensions)}, got {value!r}")
    size = tuple(
        integer(f"{name} {items!r}: {dimension}", item, least)
        for item, (dimension, least) in zip(items, dimensions.items(), strict=True)
    )
    check_bytes(name, size)
    return size


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
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the padding before and after each axis."""
    extent = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * len(extent)
        if padding == "full":
            return tuple((reach, reach) for reach in extent)
        if padding == "same":
            if max(stride) > 1:
                raise ValueError(f"padding 'same' needs stride 1, got stride {stride}")
            return tuple((reach // 2, reach - reach // 2) for reach in extent)  # torch puts the odd one at the end
        raise ValueError(f"padding must be 'valid', 'same', 'full' or integers, got {padding!r}")
    return pads("padding", padding, len(extent))


def pads(name: str, padding: Any, axes: int) -> tuple[tuple[int, int], ...]:
    """Return padding, in numbers, as that before and after each axis."""
    items, names = _items(padding), AXES[axes]
    if items is None:
        return ((integer(name, padding, 0),) * 2,) * axes
    if axes == 1 and len(items) == 2:  # of the one axis
        items = (padding,)
    if len(items) != axes:
        raise ValueError(f"{name} must be {_PADS[axes]}, got {padding!r}")
    found = []
    for axis, item in zip(names, items, strict=True):
        before, after = numbers(f"{name} {padding!r}: {_ALONG[axis]}", item, 0, _ENDS[axis])
        found.append((before, after))
    return tuple(found)


def layer_numbers(
    weight_size: Any, stride: Any, padding: Padding, dilation: Any, groups: Any, axes: int = 2
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...], int]:
    """Validate all that does not depend on the input; return weight size, stride, padding, dilation and groups.

    Raises TypeError or ValueError as `ConvGeometry.from_arguments` does.
    """
    size = _size("weight", weight_size, _weight_dimensions(axes))
    strides, dilations = _along("stride", stride, 1, axes), _along("dilation", dilation, 1, axes)
    groups = integer("groups", groups, 1)
    if size[0] % groups:
        raise ValueError(f"weight {size} has {size[0]} out channels, not a multiple of groups={groups}")
    return size, strides, _resolve_padding(padding, size[2:], strides, dilations), dilations, groups


def _in_memory(size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array whose channels come last."""
    batch, channels, *space = size
    return batch, *space, channels


@dataclass(frozen=True)
class ConvGeometry:
    """One convolution, of images, or of sequences or volumes. Build it with `from_arguments`.

    Attributes
    ----------
    input_size : tuple of int
        Shape of the input, (batch, channels, height, width); (batch, channels, length) or (batch, channels, depth,
        height, width). Of volumes that are seen as images, that of the images.
    weight_size : tuple of int
        Shape of the kernels, (out channels, channels / groups, kernel height, kernel width), with as many spatial axes.
    stride : tuple of int
        Distance of neighbouring outputs in pixels, (vertical, horizontal), along as many axes.
    padding : tuple of tuple of int
        Pixels around the input, ((top, bottom), (left, right)), along as many axes.
    dilation : tuple of int
        Distance of neighbouring taps in pixels, (vertical, horizontal), along as many axes.
    groups : int
        Groups of channels that are convolved apart.
    depth : Depth
        Of volumes that are seen as images, their third axis.
    channels_last : bool
        Whether the arrays of a pass are (batch, height, width, channels) in memory. Sizes are in the same order anyway.

    Examples
    --------
    >>> from nbfftconv.geometry import ConvGeometry
    >>> geometry = ConvGeometry.from_arguments((1, 3, 32, 32), (8, 3, 4, 4), padding="same")
    >>> geometry.padding, geometry.output_size
    (((1, 2), (1, 2)), (1, 8, 32, 32))
    """

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    depth: Depth = FLAT
    channels_last: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Every table of plans, records and transforms asks for it."""
        numbers = self.stride, self.padding, self.dilation, self.groups, self.depth
        return hash((self.input_size, self.weight_size, *numbers))

    @classmethod
    def from_arguments(
        cls,
        input_size: Any,
        weight_size: Any,
        stride: Any = 1,
        padding: Padding = 0,
        dilation: Any = 1,
        groups: Any = 1,
        axes: int = 2,
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
        axes : int, default 2
            Spatial axes: 2 of images, 1 of sequences, 3 of volumes. Sizes have two dimensions more.

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
        arguments = input_size, weight_size, stride, padding, dilation, groups, axes
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
        return _geometry(input_size, weight_size, stride, padding, dilation, groups, len(weight_size) - 2)

    @classmethod
    def _validated(
        cls, input_size: Any, weight_size: Any, stride: Any, padding: Padding, dilation: Any, groups: Any, axes: int
    ) -> "ConvGeometry":
        input_size, of_layer = _size("input", input_size, _input_dimensions(axes)), (stride, padding, dilation, groups)
        weight_size, strides, pads, dilations, groups = layer_numbers(weight_size, *of_layer, axes)
        if input_size[1] != weight_size[1] * groups:
            raise ValueError(
                f"input {input_size} has {input_size[1]} channels, but weight {weight_size} with groups={groups} "
                f"needs {weight_size[1] * groups}"
            )
        geometry = cls(input_size, weight_size, strides, pads, dilations, groups)
        kernel = weight_size[2:]
        padded = geometry.padded_size
        extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
        if any(reach > size for reach, size in zip(extent, padded, strict=True)):
            raise ValueError(
                f"kernel {kernel} with dilation {dilations} spans {extent}, more than the padded input {padded} "
                f"(input {input_size}, padding {pads})"
            )
        check_bytes(f"input {input_size} with padding {pads}", (*input_size[:2], *padded))
        check_bytes(f"output for input {input_size} with padding {pads}", geometry.output_size)
        return geometry

    @cached_property
    def padded_size(self) -> tuple[int, ...]:
        """Pixels of the padded input along each axis, such as (height, width)."""
        return tuple(size + sum(pads) for size, pads in zip(self.input_size[2:], self.padding, strict=True))

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Shape of the output, such as (batch, out channels, height, width)."""
        sizes = zip(self.padded_size, self.dilation, self.weight_size[2:], self.stride, strict=True)
        return self.input_size[0], self.weight_size[0], *((p - d * (k - 1) - 1) // s + 1 for p, d, k, s in sizes)

    @cached_property
    def of_images(self) -> "ConvGeometry":
        """The same convolution with two spatial axes, as passes see it.

        A sequence is an image of one row, and so is an image of one column with kernels of many rows: in memory there
        is no difference. The planes of volumes are images and channels. If kernels are of one pixel of every plane, and
        every pixel has an output, a volume's depth is the height of an image.
        """
        if len(self.stride) == 2:
            return self._turned() if self._is_column else self
        (batch, channels, *sizes), (filters, channels_of_group, *kernel) = self.input_size, self.weight_size
        if len(self.stride) == 1:
            return ConvGeometry(
                (batch, channels, 1, *sizes), (filters, channels_of_group, 1, *kernel), (1, *self.stride),
                ((0, 0), *self.padding), (1, *self.dilation), self.groups,
            )  # fmt: skip
        planes, height, width = sizes
        in_planes = self.stride[1:], self.padding[1:], self.dilation[1:]
        if kernel[1:] == [1, 1] and in_planes[:2] == ((1, 1), ((0, 0), (0, 0))) and height * width < SIZE_LIMIT:
            return ConvGeometry(
                (batch, channels, planes, height * width), (filters, channels_of_group, kernel[0], 1),
                (self.stride[0], 1), (self.padding[0], (0, 0)), (self.dilation[0], 1), self.groups,
            )  # fmt: skip
        outputs, taps = self.output_size[2], kernel[0]
        return ConvGeometry(
            (batch * outputs, channels * taps, height, width), (filters, channels_of_group * taps, *kernel[1:]),
            *in_planes, self.groups, Depth(planes, outputs, taps, self.stride[0], self.dilation[0], self.padding[0][0]),
        )  # fmt: skip

    @property
    def _is_column(self) -> bool:
        """Whether it is of images of one column, with kernels of so many rows that transforms of rows pay."""
        is_narrow = self.input_size[3] == self.weight_size[3] == 1 and self.padding[1] == (0, 0)
        return is_narrow and self.weight_size[2] > _FEW_ROWS and self.depth == FLAT and not self.channels_last

    def _turned(self) -> "ConvGeometry":
        """Return that of images of one row, given one of one column."""
        (batch, channels, length, _), (filters, channels_of_group, taps, _) = self.input_size, self.weight_size
        return replace(
            self,
            input_size=(batch, channels, 1, length),
            weight_size=(filters, channels_of_group, 1, taps),
            stride=(1, self.stride[0]),
            padding=((0, 0), self.padding[0]),
            dilation=(1, self.dilation[0]),
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input's array: of volumes that are seen as images, (batch, channels, depth, height, width)."""
        if self.depth == FLAT:
            return _in_memory(self.input_size) if self.channels_last else self.input_size
        images, channels, *image = self.input_size
        return images // self.depth.outputs, channels // self.depth.taps, self.depth.planes, *image

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output's array."""
        if self.depth == FLAT:
            return _in_memory(self.output_size) if self.channels_last else self.output_size
        images, filters, *image = self.output_size
        return images // self.depth.outputs, filters, self.depth.outputs, *image

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
        size, depth = (*self.input_size[:2], *self.padded_size), self.depth
        depth = depth._replace(planes=depth.planes + depth.before + depth.after, before=0)
        return replace(self, input_size=size, padding=((0, 0),) * len(self.padding), depth=depth)

    def transposed(self) -> "ConvGeometry | None":
        """Return the convolution that takes the output's gradient to the input's, None if there is none.

        Its kernels are these with filters and channels of each group exchanged and all axes reversed. With strides,
        each of its channels has a filter for every phase of the input's pixels, and kernels of the taps that meet one:
        what it returns is to be interleaved (see ``transpose.py``). There is none with so much padding that its
        own would be negative, nor with a stride that does not divide the kernel, or beside a dilation.

        Returns
        -------
        ConvGeometry or None
            The transposed problem.
        """
        filters, channels, *kernel = self.weight_size
        planes, outputs, taps, stride, dilation, before = self.depth
        across = zip(kernel, self.stride, self.dilation, strict=True)
        if any(s > 1 and (k % s > 0 or d > 1) for k, s, d in ((taps, stride, dilation), *across)):
            return None
        padding, sizes = [], zip(self.input_size[2:], self.output_size[2:], strict=True)
        for (size, output), k, s, d, pads in zip(sizes, kernel, self.stride, self.dilation, self.padding, strict=True):
            first, last = pads[0] // s, (pads[0] + size - 1) // s  # of every s-th pixel, those that are there
            padding.append((d * (k // s - 1) - first, last - output + 1))
        if min(map(min, padding)) < 0:
            return None
        first, last = before // stride, (before + planes - 1) // stride
        of_phase = taps // stride
        depth = Depth(outputs, last - first + 1, of_phase, 1, dilation, dilation * (of_phase - 1) - first)
        images = self.input_size[0] // outputs * depth.outputs
        phases = stride * math.prod(self.stride)
        return replace(
            self,
            input_size=(images, filters * of_phase, *self.output_size[2:]),
            weight_size=(
                channels // taps * self.groups * phases,
                filters // self.groups * of_phase,
                *(k // s for k, s in zip(kernel, self.stride, strict=True)),
            ),
            stride=(1,) * len(kernel),
            padding=tuple(padding),
            depth=depth,
        )

    def transposed_phases(self) -> "tuple[ConvGeometry, ...] | None":
        """Return the convolutions that take the output's gradient to each phase of the input's, None if there are none.

        They are for strides that do not divide the kernel: phase r of an axis has kernels of the taps r, r + s, and so
        on, filters and channels exchanged and all axes reversed. All have as many outputs; what they return is to be
        interleaved, the phases of the last axis fastest. There are none where a phase has no tap, beside a dilation,
        or with so much padding that their own would be negative.

        Returns
        -------
        tuple of ConvGeometry or None
            A convolution of stride 1 for each phase.
        """
        filters, channels, *kernel = self.weight_size
        planes, outputs, taps, *_ = self.depth
        images = self.input_size[0] // outputs
        sizes = zip((planes, *self.input_size[2:]), (outputs, *self.output_size[2:]), strict=True)
        numbers = zip((taps, *kernel), self.strides, (self.depth.dilation, *self.dilation), strict=True)
        before = self.depth.before, *(pads[0] for pads in self.padding)
        of_axes = []  # for each axis, for each phase: taps, outputs and padding
        for (size, output), (k, s, d), first in zip(sizes, numbers, before, strict=True):
            if s > 1 and (d > 1 or k < s):
                return None
            first, last = first // s, (first + size - 1) // s  # of every s-th pixel, those that are there
            lengths = [(cdiv(k - r, s), last - first + 1) for r in range(s)]
            of_axes.append([(n, size, (d * (n - 1) - first, last - output + 1)) for n, size in lengths])
        if max(self.strides) == 1 or any(min(pads) < 0 for axis in of_axes[1:] for *_, pads in axis):
            return None
        return tuple(
            replace(
                self,
                input_size=(images * depth[1], filters * depth[0], *self.output_size[2:]),
                weight_size=(
                    channels // taps * self.groups,
                    filters // self.groups * depth[0],
                    *(n for n, *_ in across),
                ),
                stride=(1,) * len(kernel),
                padding=tuple(pads for *_, pads in across),
                depth=Depth(outputs, depth[1], depth[0], 1, self.depth.dilation, depth[2][0]),
            )
            for depth, *across in itertools.product(*of_axes)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in depth and across planes."""
        return self.depth.stride, *self.stride

    @cached_property
    def multiply_adds(self) -> int:
        """Multiplications of direct convolution, padding included."""
        return math.prod(self.output_size) * math.prod(self.weight_size[1:])


def transposed_numbers(
    weight_size: Any, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any, axes: int
) -> tuple[Any, ...]:
    """Validate all of a transposed convolution that does not depend on the input; return it in the order of arguments.

    Raises TypeError or ValueError as a convolution does.
    """
    dimensions = {"channels": 1, "out channels of a group": 1, **{f"kernel {axis}": 1 for axis in AXES[axes]}}
    size = _size("weight", weight_size, dimensions)
    strides, dilations = _along("stride", stride, 1, axes), _along("dilation", dilation, 1, axes)
    padded, added = pads("padding", padding, axes), _along("output_padding", output_padding, 0, axes)
    groups = integer("groups", groups, 1)
    if size[0] % groups:
        raise ValueError(f"weight {size} has {size[0]} channels, not a multiple of groups={groups}")
    if any(more >= max(s, d) for more, s, d in zip(added, strides, dilations, strict=True)):
        raise ValueError(
            f"output_padding {added} must be smaller than stride {strides} or dilation {dilations} along each axis"
        )
    return size, strides, padded, added, groups, dilations


@dataclass(frozen=True)
class TransposedGeometry:
    """One transposed convolution: the gradient at its input of a convolution, and what lies beyond that.

    Attributes
    ----------
    convolution : ConvGeometry
        Its output is the transposed one's input, its input the transposed one's output.
    beyond : tuple of int
        Samples of the output after those of `convolution.input_size`, along each axis, which no kernel reaches.
    left_out : tuple of int
        Samples of `convolution.input_size` before the output's, along each axis: 1, which is all, where no kernel
        reaches the output, else 0.
    """

    convolution: ConvGeometry
    beyond: tuple[int, ...]
    left_out: tuple[int, ...]

    @classmethod
    def from_arguments(
        cls,
        input_size: Any,
        weight_size: Any,
        stride: Any,
        padding: Any,
        output_padding: Any,
        groups: Any,
        dilation: Any,
        axes: int,
    ) -> "TransposedGeometry":
        """Validate the arguments of a transposed convolution; raises TypeError or ValueError as a convolution does."""
        input_size = _size("input", input_size, _input_dimensions(axes))
        given = weight_size, stride, padding, output_padding, groups, dilation
        weight_size, strides, padded, added, groups, dilations = transposed_numbers(*given, axes)
        if input_size[1] != weight_size[0]:
            raise ValueError(
                f"input {input_size} has {input_size[1]} channels, but weight {weight_size} needs {weight_size[0]}"
            )
        size, around, beyond, left_out = [], [], [], []
        for length, taps, s, d, (before, after), more in zip(
            input_size[2:], weight_size[2:], strides, dilations, padded, added, strict=True
        ):
            # With less than a stride more, a convolution takes no further step; else there is less padding after it.
            end = after if more < s else after - more
            reached = (length - 1) * s + d * (taps - 1) + 1
            total, rest = reached - before - after + more, max(0, -end)
            is_apart = total - rest < 1 <= total  # all of the output comes after what kernels reach
            if is_apart:
                before, end, rest = reached - 1, 0, total
            size.append(1 if is_apart else total - rest)
            around.append((before, max(0, end)))
            beyond.append(rest)
            left_out.append(int(is_apart))
        along = (a - b + c for a, b, c in zip(size, left_out, beyond, strict=True))
        output = (input_size[0], weight_size[1] * groups, *along)
        if min(output[2:]) < 1:
            raise ValueError(
                f"the output would be of size {output}: input {input_size}, weight {weight_size}, stride {strides}, "
                f"padding {padded}, dilation {dilations}, output_padding {added}"
            )
        check_bytes(f"output for input {input_size}", output)
        of_input = (*output[:2], *size)
        convolution = ConvGeometry(of_input, weight_size, strides, tuple(around), dilations, groups)
        check_bytes(f"output for input {input_size} with padding {padded}", (*output[:2], *convolution.padded_size))
        return cls(convolution, tuple(beyond), tuple(left_out))

    @property
    def output_size(self) -> tuple[int, ...]:
        """Shape of the output."""
        batch, filters, *size = self.convolution.input_size
        return batch, filters, *(a - b + c for a, b, c in zip(size, self.left_out, self.beyond, strict=True))


def _is_plain(value: Any) -> bool:
    """Whether a value is of ints and strings in tuples: it has a hash, and none that is equal is of other types."""
    return type(value) in (int, str) or (type(value) is tuple and all(map(_is_plain, value)))


@functools.lru_cache(maxsize=1024)
def _geometry(*arguments: Any) -> ConvGeometry:
    return ConvGeometry._validated(*arguments)
