"""Edges in three dimensions: a noisy volume under the derivatives of a Gaussian, drawn as slices.

``python examples/edges_of_a_volume.py [FILE]`` writes the picture, edges_of_a_volume.png if no other is named. It needs
matplotlib, as ``pip install nbfftconv[demo]`` installs it. The volume is made up, from a seed: ellipsoids within each
other, as in a phantom for tomography.
"""

import sys
import time

import numpy as np
from matplotlib import pyplot as plt

import nbfftconv

SIZE = 96, 128, 128
SIGMA, RADIUS = 2.0, 6  # voxels


def phantom() -> np.ndarray:
    """Return ellipsoids in noise, (1, 1, depth, height, width)."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in SIZE), indexing="ij")
    volume = np.zeros(SIZE)
    for (a, b, c), (u, v, w), value in (
        ((0.9, 0.85, 0.7), (0.0, 0.0, 0.0), 1.0),
        ((0.8, 0.75, 0.6), (0.0, 0.0, 0.0), -0.6),
        ((0.4, 0.3, 0.15), (0.1, 0.1, -0.25), -0.3),
        ((0.5, 0.35, 0.2), (-0.1, 0.0, 0.25), -0.3),
        ((0.2, 0.2, 0.2), (0.0, -0.45, 0.0), 0.5),
    ):
        volume += value * (((z - u) / a) ** 2 + ((y - v) / b) ** 2 + ((x - w) / c) ** 2 < 1)
    volume += np.random.default_rng(0).normal(0, 0.25, SIZE)
    return volume.astype(np.float32)[None, None]


def kernels() -> np.ndarray:
    """Return a Gaussian and its derivatives along the three axes, (4, 1, taps, taps, taps)."""
    t = np.arange(-RADIUS, RADIUS + 1)
    bell = np.exp(-0.5 * (t / SIGMA) ** 2)
    bell /= bell.sum()
    slope = t * bell / SIGMA**2
    each = [(bell, bell, bell), (slope, bell, bell), (bell, slope, bell), (bell, bell, slope)]
    return np.stack([np.einsum("i,j,k->ijk", *axes) for axes in each]).astype(np.float32)[:, None]


def main(file: str = "edges_of_a_volume.png") -> None:
    """Convolve, tell how long that took, and draw a slice across each axis."""
    volume, filters = phantom(), kernels()
    layer = nbfftconv.Conv3d(filters, padding="same", padding_mode="replicate", training=False)
    layer(volume)  # compiles, and transforms the kernels
    start = time.perf_counter()
    found = layer(volume)[0]
    print(f"{SIZE} voxels, 4 kernels of {filters.shape[2:]}: {(time.perf_counter() - start) * 1e3:.0f} ms")

    rows = {"volume": volume[0, 0], "blurred": found[0], "edges": np.sqrt((found[1:] ** 2).sum(axis=0))}
    figure, axes = plt.subplots(3, 3, figsize=(9, 8), layout="constrained")
    for of_row, (name, array) in zip(axes, rows.items(), strict=True):
        slices = array[SIZE[0] // 2], array[:, SIZE[1] // 2], array[:, :, SIZE[2] // 2]
        for axis, image, across in zip(of_row, slices, ("depth", "height", "width"), strict=True):
            axis.imshow(image, cmap="gray", aspect="auto")
            axis.set(title=f"{name}, across the {across}", xticks=[], yticks=[])
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
