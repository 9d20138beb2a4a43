"""What `nbfftconv demo` does."""

import json
import sys
import time
from pathlib import Path

import numpy as np


def run_demo(out: Path, epochs: int, seed: int, in_torch: bool = False) -> int:
    """Train, compare, write `report.json` and the pictures, and return 0 if all predictions agree."""
    try:
        from rich.console import Console

        from nbfftconv.demo.compare import compare
        from nbfftconv.demo.data import load_digits
        from nbfftconv.demo.network import initial_parameters
        from nbfftconv.demo.report import draw_training, results_table
        from nbfftconv.demo.train import train

        if in_torch:
            from nbfftconv.demo.in_torch import InTorch as Way
        else:
            from nbfftconv.demo.in_numpy import InNumPy as Way  # type: ignore[assignment]
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module == "nbfftconv":
            raise
        option, extra = (" --torch", ",torch") if in_torch else ("", "")
        print(f'nbfftconv demo{option} needs {module}: pip install "nbfftconv[demo{extra}]"', file=sys.stderr)
        return 1

    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = load_digits()
    rng = np.random.default_rng(seed)
    way = Way(initial_parameters(rng))
    console.print(f"Training on {len(training.labels):,} digits; {way.how}")
    start = time.perf_counter()
    history = train(way.learn, training, epochs, rng, console)
    report = {
        "train_images": len(training.labels),
        "epochs": epochs,
        "seed": seed,
        "train_seconds": time.perf_counter() - start,
        "epoch_losses": [loss for loss, _ in history],
        "epoch_accuracies": [accuracy for _, accuracy in history],
        **compare(way.substitute(held_out), held_out),
    }
    console.print(results_table(report, way.headings, way.caption))
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    way.draw(held_out, out / way.picture)
    draw_training(history, way.how, out / "training.png")
    print(f"Wrote {out / 'report.json'}, {out / 'training.png'} and {out / way.picture}")
    return 0 if report["all_predictions_equal"] else 1
