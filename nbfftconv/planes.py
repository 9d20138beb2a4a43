"""Planes: where the channels of an image are, in arrays of images and of volumes (see `nbfftconv.geometry.Depth`)."""

from nbfftconv.geometry import ConvGeometry, Depth
from nbfftconv.jit import njit
from nbfftconv.records import Record, fields

#: Channels of an image or volume of the array, and the numbers of its `Depth`.
PLANES_FIELDS = ("channels", *Depth._fields)
PLANES = fields(*PLANES_FIELDS)


def input_planes(geometry: ConvGeometry) -> tuple[int, ...]:
    """Return the numbers of `PLANES` for the input."""
    return geometry.input_shape[1], *geometry.depth


def put_planes(record: Record, planes: tuple[int, ...]) -> None:
    """Set the field `planes` of a record."""
    for name, value in zip(PLANES_FIELDS, planes, strict=True):
        record[f"planes.{name}"] = value


@njit()
def plane_of(p, image, channel):
    """Return which of all planes of the input an image has as a channel; -1 if it is before the first or after the
    last, and zero."""
    z = -p.before
    if p.taps != 1:
        z += channel % p.taps * p.dilation
        channel //= p.taps
    if p.outputs != 1:
        z += image % p.outputs * p.stride
        image //= p.outputs
    return (image * p.channels + channel) * p.planes + z if 0 <= z < p.planes else -1


@njit()
def output_plane_of(p, filters, image, filter):
    """Return which of all planes of the output an image has as a filter's; its next filter's is `p.outputs` on."""
    return (image // p.outputs * filters + filter) * p.outputs + image % p.outputs
