"""The three passes as slow, obvious float64 loops, against which every fast result is tested.

Shares nothing with the package. Each loop runs over the kernel's taps; ``np.einsum`` (not BLAS) multiplies what one
tap meets, pair by pair, so that 0 * inf is NaN exactly where direct convolution multiplies the two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
NUMPY_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def resolve_padding(padding, kernel_size, dilation=1) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ((top, bottom), (left, right)) for any padding that the package accepts."""
    reach = [d * (k - 1) for d, k in zip(pair(dilation), kernel_size, strict=True)]
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        return tuple((r // 2, r - r // 2) for r in reach)
    if padding == "full":
        return tuple((r, r) for r in reach)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def output_size(input_size, weight_size, stride=1, padding=0, dilation=1) -> tuple[int, int, int, int]:
    pads = resolve_padding(padding, weight_size[2:], dilation)
    height, width = (
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, (before, after), k, s, d in zip(
            input_size[2:], pads, weight_size[2:], pair(stride), pair(dilation), strict=True
        )
    )
    return input_size[0], weight_size[0], height, width


def pad(input: Array, pads, padding_mode: str) -> Array:
    return np.pad(input, ((0, 0), (0, 0), *pads), NUMPY_PAD_MODES[padding_mode])


def taps(weight_size, grad_size, stride, dilation):
    """Yield each tap (i, j) and the pixels of the padded input that it meets, as an index of those."""
    (sy, sx), (dy, dx) = pair(stride), pair(dilation)
    for i in range(weight_size[2]):
        for j in range(weight_size[3]):
            rows = slice(i * dy, i * dy + (grad_size[2] - 1) * sy + 1, sy)
            columns = slice(j * dx, j * dx + (grad_size[3] - 1) * sx + 1, sx)
            yield i, j, (..., rows, columns)


def split(array: Array, axis: int, groups: int) -> Array:
    """Split the channel axis into (group, channel in group)."""
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Array:
    """Forward pass."""
    x, w = np.asarray(input, np.float64), np.asarray(weight, np.float64)
    size = output_size(x.shape, w.shape, stride, padding, dilation)
    padded = split(pad(x, resolve_padding(padding, w.shape[2:], dilation), padding_mode), 1, groups)
    kernels = split(w, 0, groups)
    result = split(np.zeros(size), 1, groups)
    with np.errstate(invalid="ignore", over="ignore"):
        for i, j, met in taps(w.shape, size, stride, dilation):
            result += np.einsum("ngchw,gkc->ngkhw", padded[met], kernels[..., i, j])
        result = result.reshape(size)
        if bias is not None:
            result += np.asarray(bias, np.float64)[:, None, None]
    if activation == "relu":
        result = np.where(result <= 0, 0.0, result)  # NaN stays
    return result


def conv2d_weight(
    input: ArrayLike,
    weight_size,
    grad_output: ArrayLike,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Gradient with respect to the weight."""
    x, g = np.asarray(input, np.float64), np.asarray(grad_output, np.float64)
    padded = split(pad(x, resolve_padding(padding, weight_size[2:], dilation), padding_mode), 1, groups)
    grads = split(g, 1, groups)
    result = split(np.zeros(weight_size), 0, groups)
    with np.errstate(invalid="ignore", over="ignore"):
        for i, j, met in taps(weight_size, g.shape, stride, dilation):
            result[..., i, j] = np.einsum("ngchw,ngkhw->gkc", padded[met], grads)
    return result.reshape(weight_size)


def conv2d_input(
    input_size,
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Gradient with respect to the input: scatter each product onto the padded image, undo the padding."""
    w, g = np.asarray(weight, np.float64), np.asarray(grad_output, np.float64)
    (top, bottom), (left, right) = pads = resolve_padding(padding, w.shape[2:], dilation)
    batch, channels, height, width = input_size
    padded = split(np.zeros((batch, channels, height + top + bottom, width + left + right)), 1, groups)
    grads, kernels = split(g, 1, groups), split(w, 0, groups)
    with np.errstate(invalid="ignore", over="ignore"):
        for i, j, met in taps(w.shape, g.shape, stride, dilation):
            padded[met] += np.einsum("ngkhw,gkc->ngchw", grads, kernels[..., i, j])
        padded = padded.reshape(batch, channels, height + top + bottom, width + left + right)
        if padding_mode == "zeros":
            return padded[:, :, top : top + height, left : left + width]
        # Padding copied pixel source[p] to p; its adjoint adds p's gradient back to source[p].
        source = np.pad(np.arange(height * width).reshape(height, width), pads, NUMPY_PAD_MODES[padding_mode])
        result = np.zeros((batch, channels, height * width))
        np.add.at(result, (slice(None), slice(None), source.ravel()), padded.reshape(batch, channels, source.size))
    return result.reshape(input_size)


def conv_transpose(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
    activation: str | None = None,
) -> Array:
    """Transposed convolution of any number of axes: each tap's products are added where it puts them, then cropped."""
    x, w = np.asarray(input, np.float64), np.asarray(weight, np.float64)
    axes = x.ndim - 2
    strides, dilations, added = (
        (each,) * axes if isinstance(each, int) else tuple(each) for each in (stride, dilation, output_padding)
    )
    pads = (padding,) * axes if isinstance(padding, int) else tuple(padding)
    pads = [(p, p) if isinstance(p, int) else tuple(p) for p in pads]
    filters = w.shape[1] * groups
    numbers = list(zip(x.shape[2:], strides, dilations, w.shape[2:], added, strict=True))
    full = np.zeros((x.shape[0], filters, *((n - 1) * s + d * (k - 1) + 1 + more for n, s, d, k, more in numbers)))
    per_group = x.shape[1] // groups
    with np.errstate(invalid="ignore", over="ignore"):
        for tap in np.ndindex(*w.shape[2:]):
            places = tuple(
                slice(t * d, t * d + (n - 1) * s + 1, s) for t, (n, s, d, _, _) in zip(tap, numbers, strict=True)
            )
            for group in range(groups):
                channels = slice(group * per_group, (group + 1) * per_group)
                out = slice(group * w.shape[1], (group + 1) * w.shape[1])
                products = np.einsum("nc...,ck->nk...", x[:, channels], w[(channels, slice(None), *tap)])
                full[(slice(None), out, *places)] += products
        kept = tuple(slice(before, size - after) for (before, after), size in zip(pads, full.shape[2:], strict=True))
        result = full[(slice(None), slice(None), *kept)]
        if bias is not None:
            result = result + np.asarray(bias, np.float64).reshape(-1, *[1] * axes)
    if activation == "relu":
        result = np.where(result <= 0, 0.0, result)  # NaN stays
    return result


def _volumes(stride, padding, dilation, kernel_size):
    """Return the numbers along the depth, (stride, (before, after), dilation), and those of planes."""
    strides, dilations = ((each,) * 3 if isinstance(each, int) else tuple(each) for each in (stride, dilation))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
    if isinstance(padding, str):
        pads = [{"valid": (0, 0), "same": (r // 2, r - r // 2), "full": (r, r)}[padding] for r in reach]
    else:
        pads = (padding,) * 3 if isinstance(padding, int) else tuple(padding)
        pads = [(p, p) if isinstance(p, int) else tuple(p) for p in pads]
    in_planes = {"stride": strides[1:], "padding": tuple(pads[1:]), "dilation": dilations[1:]}
    return (strides[0], pads[0], dilations[0]), in_planes


def conv3d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Array:
    """Forward pass of volumes: a plane of the output is a sum over the planes that it sees."""
    x, w = np.asarray(input, np.float64), np.asarray(weight, np.float64)
    (step, around, apart), in_planes = _volumes(stride, padding, dilation, w.shape[2:])
    padded = np.pad(x, ((0, 0), (0, 0), around, (0, 0), (0, 0)), NUMPY_PAD_MODES[padding_mode])
    planes = []
    with np.errstate(invalid="ignore", over="ignore"):
        for z in range(0, padded.shape[2] - apart * (w.shape[2] - 1), step):
            numbers = in_planes | {"groups": groups, "padding_mode": padding_mode}
            each = [conv2d(padded[:, :, z + t * apart], w[:, :, t], None, **numbers) for t in range(w.shape[2])]
            planes.append(np.sum(each, axis=0))
        result = np.stack(planes, axis=2)
        if bias is not None:
            result = result + np.asarray(bias, np.float64)[:, None, None, None]
    if activation == "relu":
        result = np.where(result <= 0, 0.0, result)  # NaN stays
    return result


def conv3d_weight(
    input: ArrayLike,
    weight_size,
    grad_output: ArrayLike,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Gradient with respect to the weight of volumes, tap after tap in depth, plane after plane."""
    x, g = np.asarray(input, np.float64), np.asarray(grad_output, np.float64)
    (step, around, apart), in_planes = _volumes(stride, padding, dilation, weight_size[2:])
    padded = np.pad(x, ((0, 0), (0, 0), around, (0, 0), (0, 0)), NUMPY_PAD_MODES[padding_mode])
    of_plane = (*weight_size[:2], *weight_size[3:])
    result = np.zeros(weight_size)
    with np.errstate(invalid="ignore", over="ignore"):
        for t in range(weight_size[2]):
            for o in range(g.shape[2]):
                plane, numbers = padded[:, :, o * step + t * apart], {"groups": groups, "padding_mode": padding_mode}
                result[:, :, t] += conv2d_weight(plane, of_plane, g[:, :, o], **in_planes, **numbers)
    return result


def conv3d_input(
    input_size,
    weight: ArrayLike,
    grad_output: ArrayLike,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Gradient with respect to the input of volumes: planes of the padded input add up, and the padding is undone."""
    w, g = np.asarray(weight, np.float64), np.asarray(grad_output, np.float64)
    (step, around, apart), in_planes = _volumes(stride, padding, dilation, w.shape[2:])
    batch, channels, depth, *plane = input_size
    source = np.pad(np.arange(depth), around, NUMPY_PAD_MODES[padding_mode])
    result = np.zeros((batch, channels, depth, *plane))
    with np.errstate(invalid="ignore", over="ignore"):
        for t in range(w.shape[2]):
            for o in range(g.shape[2]):
                z = o * step + t * apart
                if padding_mode == "zeros" and not around[0] <= z < around[0] + depth:
                    continue
                numbers = {"groups": groups, "padding_mode": padding_mode}
                result[:, :, source[z]] += conv2d_input(
                    (batch, channels, *plane), w[:, :, t], g[:, :, o], **in_planes, **numbers
                )
    return result
