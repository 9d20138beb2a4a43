"""Do processes that start at once on an empty cache folder compute what is right, and those that come later?

Every round, six workers with a tile and a dtype each start together, with nothing compiled; then one process computes
with all that they have kept. The largest differences from sums by NumPy are printed. With delays, a slow disk is
simulated: files are written in small pieces, and pieces and renaming take their time. With --kill, half of the workers
are killed at some moment.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

CASES = [(tile, dtype) for tile in (30, 36, 40) for dtype in ("float32", "float64")]
LIMIT = {"float32": 1e-4, "float64": 1e-12}


def difference(tile: int, dtype: str) -> float:
    """Largest difference of a convolution from NumPy's sums, in units of what is allowed."""
    import nbfftconv

    x = np.random.default_rng(tile).standard_normal((1, 1, 70, 70)).astype(dtype)
    w = np.ones((1, 1, 5, 5), dtype)
    plan = nbfftconv.plan_conv2d(x.shape, w.shape, algorithm="fft", transform="four_step", tile=tile, dtype=dtype)
    expected = np.lib.stride_tricks.sliding_window_view(x.astype(float), (5, 5), (2, 3)).sum((-1, -2))
    return float(np.abs(nbfftconv.conv2d(x, w, plan=plan) - expected).max() / LIMIT[dtype])


def slow_down(seed: int) -> None:
    """Let this process's disk be slow."""
    chance, write, replace = random.Random(seed), os.write, os.replace

    def write_slowly(descriptor, content):
        time.sleep(chance.uniform(0, 0.02))
        return write(descriptor, content[: max(1000, len(content) // 4)])

    def replace_slowly(*arguments, **keywords):
        time.sleep(chance.uniform(0, 0.6))
        return replace(*arguments, **keywords)

    os.write, os.replace = write_slowly, replace_slowly


def start(folder: str, *arguments: object) -> subprocess.Popen:
    """Start this script as a worker."""
    environment = os.environ | {"NBFFTCONV_CACHE_DIR": folder}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> float:
    """Return the difference that a worker found; infinity if it failed."""
    text, _ = process.communicate()
    return float(text) if process.returncode == 0 else float("inf")


def run_round(number: int, delays: bool, kill: bool) -> bool:
    """Run and print one round; tell whether all was right."""
    chance = random.Random(number)
    options = ["--delays"] if delays else []
    with tempfile.TemporaryDirectory() as folder:
        workers = [start(folder, "--worker", case, "--seed", chance.random(), *options) for case in range(len(CASES))]
        killed = chance.sample(workers, len(workers) // 2) if kill else []
        for worker in killed:
            time.sleep(chance.uniform(0, 4))
            worker.kill()
        cold = max(result(worker) for worker in workers if worker not in killed)
        for worker in killed:
            worker.communicate()
        later = result(start(folder, "--worker", *range(len(CASES))))
    right = max(cold, later) <= 1
    kind = "with delays" if delays else "at full speed"
    print(
        f"{number:3} {kind:14} {len(killed)} killed, cold {cold:9.2g}, later {later:9.2g} of what is allowed",
        flush=True,
    )
    return right


def main() -> int:
    """Run rounds, or what one worker does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--delays", choices=["with", "without", "both"], nargs="?", const="with", default="both")
    parser.add_argument("--kill", action="store_true", help="kill half of the workers at some moment")
    parser.add_argument("--worker", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        if arguments.delays == "with":
            slow_down(arguments.seed)
        print(max(difference(*CASES[case]) for case in arguments.worker))
        return 0
    modes = [name == "with" for name in ("with", "without") if arguments.delays in (name, "both")]
    rounds = [
        run_round(number, delays, arguments.kill) for number in range(1, arguments.rounds + 1) for delays in modes
    ]
    print(f"{sum(rounds)} of {len(rounds)} rounds were right")
    return 0 if all(rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
