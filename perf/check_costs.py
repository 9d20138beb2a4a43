"""The cost model against measured plans: what the planner chooses for the layers in layers.py, and what wins a race.

A forward pass with the kernels' spectra kept. The race is that of ``plan_conv2d(measure=True)``; its winners go to a
profile that is thrown away, so that nothing changes on the machine.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from layers import LAYERS

WITHIN = 1.15


def main() -> int:
    """Race, report, and return 1 if the model's choice is too slow on more than two layers."""
    names = [layer.name for layer in LAYERS]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", choices=names, default=names, metavar="NAME", help="some layers only")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["NBFFTCONV_PROFILE"] = str(Path(folder) / "profile.json")
        import nbfftconv  # reads the variable
        from nbfftconv.profile import get_profile

        nbfftconv.set_num_threads(args.threads)
        slow = []
        print("| layer | the model's choice | ms | the fastest measured | ms | times the fastest |")
        print("| --- | --- | ---: | --- | ---: | ---: |")
        for layer in LAYERS:
            if layer.name not in args.layers:
                continue
            problem = {"padding": layer.padding, "groups": layer.groups, "weight_is_transformed": True}
            chosen = nbfftconv.plan_conv2d(layer.input_size, layer.weight_size, **problem)
            nbfftconv.plan_conv2d(layer.input_size, layer.weight_size, **problem, measure=True)
            winner = next(
                winner
                for key, winner in get_profile().winners.items()
                if key.geometry == chosen.geometry and key.weight_is_transformed
            )
            factor = winner.model_seconds / winner.seconds
            if factor > WITHIN:
                slow.append(layer.name)
            fastest = nbfftconv.plan_conv2d(layer.input_size, layer.weight_size, **problem)  # as the profile says
            cells = [layer.name]
            for plan, seconds in ((chosen, winner.model_seconds), (fastest, winner.seconds)):
                cells += [plan.summary, f"{seconds * 1e3:.2f}"]
            print(f"| {' | '.join(cells)} | {factor:.2f} |")
            sys.stdout.flush()
    print(f"\nMore than {WITHIN:.0%} of the fastest: {', '.join(slow) or 'none'}.")
    return len(slow) > 2


if __name__ == "__main__":
    raise SystemExit(main())
