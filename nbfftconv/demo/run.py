"""What `nbfftconv demo` does."""

import json
import sys
import time
from pathlib import Path

import numpy as np


def run_demo(out: Path, epochs: int, seed: int) -> int:
    """Train, compare, write `report.json` and the pictures, and return 0 if all predictions agree."""
    try:
        from rich.console import Console

        from nbfftconv.demo.compare import compare
        from nbfftconv.demo.data import load_digits
        from nbfftconv.demo.network import Network, initial_parameters
        from nbfftconv.demo.report import draw_feature_maps, draw_training, results_table
        from nbfftconv.demo.train import train
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module == "nbfftconv":
            raise
        print(f'nbfftconv demo needs {module}: pip install "nbfftconv[demo]"', file=sys.stderr)
        return 1

    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = load_digits()
    rng = np.random.default_rng(seed)
    network = Network(initial_parameters(rng), algorithm="fft")
    console.print(f"Training on {len(training.labels):,} digits; the convolutions use the FFT in all three passes")
    start = time.perf_counter()
    history = train(network, training, epochs, rng, console)
    report = {
        "train_images": len(training.labels),
        "epochs": epochs,
        "seed": seed,
        "train_seconds": time.perf_counter() - start,
        "epoch_losses": [loss for loss, _ in history],
        "epoch_accuracies": [accuracy for _, accuracy in history],
        **compare(network.parameters, held_out),
    }
    console.print(results_table(report))
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_feature_maps(network.parameters, held_out.images[0], out / "feature_maps.png")
    draw_training(history, out / "training.png")
    print(f"Wrote {out / 'report.json'}, {out / 'training.png'} and {out / 'feature_maps.png'}")
    return 0 if report["all_predictions_equal"] else 1
