"""Volumes as the images that passes see, in arrays of their own: for what does not read their planes where they are."""

from dataclasses import replace

import numpy as np

from nbfftconv.geometry import FLAT, ConvGeometry


def unfolded(geometry: ConvGeometry) -> ConvGeometry:
    """Return the convolution of the images."""
    return replace(geometry, depth=FLAT)


def unfold_input(geometry: ConvGeometry, input: np.ndarray) -> np.ndarray:
    """Return the images of the input, of whose planes each is there as often as there are taps that meet it."""
    depth = geometry.depth
    padded = np.pad(input, ((0, 0), (0, 0), (depth.before, depth.after), (0, 0), (0, 0)))
    image, channel, plane, *of_plane = padded.strides
    shape = input.shape[0], depth.outputs, input.shape[1], depth.taps, *input.shape[3:]
    strides = image, plane * depth.stride, channel, plane * depth.dilation, *of_plane
    planes = np.lib.stride_tricks.as_strided(padded, shape, strides, writeable=False)
    return np.ascontiguousarray(planes).reshape(geometry.input_size)


def fold_input(geometry: ConvGeometry, images: np.ndarray, result: np.ndarray) -> None:
    """Add gradients at the images up to that at the input: of each plane, in the order of the taps that meet it."""
    depth = geometry.depth
    count, channels, planes, *image = result.shape
    padded = np.zeros((count, channels, depth.before + planes + depth.after, *image), result.dtype)
    parts = images.reshape(count, depth.outputs, channels, depth.taps, *image).swapaxes(1, 2)
    end = (depth.outputs - 1) * depth.stride + 1
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN here as everywhere
        for tap in range(depth.taps):
            first = tap * depth.dilation
            padded[:, :, first : first + end : depth.stride] += parts[:, :, :, tap]
    result[...] = padded[:, :, depth.before : depth.before + planes]


def unfold_output(geometry: ConvGeometry, output: np.ndarray) -> np.ndarray:
    """Return the images of the output."""
    return np.ascontiguousarray(output.swapaxes(1, 2)).reshape(geometry.output_size)
