"""What the demo leaves behind: the table, and the pictures of the training and of the feature maps."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from nbfftconv.demo.network import Network, Parameters


def results_table(report: dict[str, Any], names: dict[str, str], caption: str) -> Table:
    """Return the figures of a report as a table, what is compared with beside ours; `names` has their headings."""
    images, (other, ours) = report["test_images"], names
    before, after = report[f"{other}_seconds"], report[f"{ours}_seconds"]
    title = f"{images:,} held-out digits, the same trained weights"
    table = Table("", *names.values(), title=title, caption=caption)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("accuracy", f"{report[f'{other}_accuracy']:.2%}", f"{report['accuracy']:.2%}")
    table.add_row("seconds", f"{before:.4f}", f"{after:.4f}")
    table.add_row("images a second", f"{images / before:,.0f}", f"{images / after:,.0f}")
    table.add_row(f"speed, {names[other]} = 1", "1.00", f"{before / after:.2f}", end_section=True)
    table.add_row("equal predictions", "", f"{report['predictions_equal']:,} of {images:,}")
    table.add_row("largest difference of a logit", "", f"{report['max_abs_logit_difference']:.1e}")
    table.add_row("largest logit", "", f"{report['max_abs_logit']:.1f}")
    return table


def draw_training(history: list[tuple[float, float]], how: str, path: Path) -> None:
    """Draw loss and accuracy of each epoch, under a title that says how the network was trained."""
    losses, accuracies = zip(*history, strict=True) if history else ((), ())
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(f"Training digits, means over the batches of an epoch; {how}")
    for axes, values, label in zip(figure.subplots(1, 2), (losses, accuracies), ("loss", "accuracy"), strict=True):
        axes.plot(epochs, values, marker="o")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, dpi=120)


def draw_feature_maps(parameters: Parameters, image: np.ndarray, path: Path) -> None:
    """Draw one digit (1, 28, 28) and its first layer's feature maps: direct, FFT, and their difference."""
    direct, fft = (
        Network(parameters, algorithm=name, training=False).convolutions[0](image[None])[0]
        for name in ("direct", "fft")
    )
    difference = fft - direct
    bound = np.abs(difference).max()
    panels = [
        ("digit", image[0], {"cmap": "gray"}),
        ("feature maps, direct", mosaic(direct), {"cmap": "viridis", "vmin": 0, "vmax": direct.max()}),
        ("feature maps, FFT", mosaic(fft), {"cmap": "viridis", "vmin": 0, "vmax": direct.max()}),
        ("FFT minus direct", mosaic(difference), {"cmap": "RdBu", "vmin": -bound, "vmax": bound}),
    ]
    figure = Figure(figsize=(14, 3.7), layout="constrained")
    figure.suptitle(f"First layer of the trained network, 16 filters of 5×5; largest difference {bound:.1e}")
    for axes, (title, values, style) in zip(figure.subplots(1, 4), panels, strict=True):
        axes.set_title(title)
        axes.set_axis_off()
        figure.colorbar(axes.imshow(values, **style), ax=axes, shrink=0.85)
    figure.savefig(path, dpi=120)


def mosaic(maps: np.ndarray) -> np.ndarray:
    """Lay 16 maps out as 4 by 4, a blank (NaN) line between them."""
    framed = np.pad(maps, ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return np.block([list(row) for row in framed.reshape(4, 4, *framed.shape[1:])])[:-1, :-1]
