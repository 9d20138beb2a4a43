"""The command line: `nbfftconv demo`, `info`, `cache`, `tune` and `bench`.

Exit codes: 0; 1 if what was asked for failed, or predictions of the demo differ; 2 for arguments that are no good; 130
for Ctrl-C. What only one command needs is imported by it.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

_Parsers = argparse._SubParsersAction


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process if it is left out.

    Returns
    -------
    int
        As above.

    Raises
    ------
    SystemExit
        After help and the version, with 0, and for arguments that are no good, with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a reader that is gone can be told
        return code
    except BrokenPipeError:  # as of `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 1
    except OSError as error:
        print(f"nbfftconv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nbfftconv: interrupted", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nbfftconv", description="Convolution layers on CPUs by FFT.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_info(commands)
    _add_cache(commands)
    _add_tune(commands, is_wanted="tune" in arguments)
    _add_bench(commands, is_wanted="bench" in arguments)
    return parser


class _Version(argparse.Action):
    """Prints the version; asked for when it is wanted."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from nbfftconv import __version__

        print(f"nbfftconv {__version__}")
        parser.exit()


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


_at_least_one.__name__ = _seed.__name__ = "int"  # so that an error says "invalid int value"


def _add_demo(commands: _Parsers) -> None:
    text = "train a CNN on real digits with FFT convolutions, and compare them with direct ones"
    parser = commands.add_parser(
        "demo", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default="nbfftconv-demo", metavar="DIR", help="where results go")
    parser.add_argument("--epochs", type=_at_least_one, default=8, help="passes over the training digits")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the initial weights and of the shuffling")
    parser.add_argument("--torch", action="store_true", help="train in PyTorch, and convert the network")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from nbfftconv.demo.run import run_demo

    return run_demo(args.out, args.epochs, args.seed, args.torch)


def _add_info(commands: _Parsers) -> None:
    text = "show versions, the machine, and every setting in force with where it comes from"
    commands.add_parser("info", help=text, description=text).set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import version

    from nbfftconv import __version__, config, matrix_unit, threads
    from nbfftconv.store import fingerprint
    from nbfftconv.target import TARGET

    packages = (f"{name} {version(name)}" for name in ("numpy", "numba", "llvmlite", "pyfftw"))
    masked = "with" if TARGET.has_masked_loads else "without"
    unit = ", a matrix unit" if matrix_unit.is_available() else ""
    vectors = f"vectors of {8 * TARGET.vector_bytes} bits, {TARGET.registers} registers, {masked} masked loads{unit}"
    rows = [
        ("nbfftconv", f"{__version__}, {Path(__file__).parent}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("packages", ", ".join(packages)),
        ("cpu", fingerprint().rpartition(", vectors")[0]),
        ("cpus", f"{os.cpu_count()}, of which {threads.available()} may be used; {vectors}"),
        ("cache size", _cache_size()),
    ]
    for name, text in rows:
        print(f"{name:<12}{text}")
    print()
    config.show()
    return 0


def _cache_size() -> str:
    from nbfftconv import cache

    try:
        amounts = cache.size().values()
    except OSError as error:
        return f"unknown: {error.strerror}"
    return _amount(sum(each.files for each in amounts), sum(each.nbytes for each in amounts))


def _amount(files: int, nbytes: int) -> str:
    return f"{files} file{'s' * (files != 1)}, {nbytes / 2**20:.1f} MiB"


def _add_cache(commands: _Parsers) -> None:
    text = "what is kept on disk: compiled kernels, wisdom, the machine's figures, the profile"
    actions = commands.add_parser("cache", help=text, description=text).add_subparsers(required=True, metavar="ACTION")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
        parser.set_defaults(run=_on_cache, run_on_cache=run)
        return parser

    add("path", "print the folder", _print_path)
    add("size", "print how much there is of what", _print_sizes)
    clear = add("clear", "remove what this package wrote there, and nothing else", _clear)
    clear.add_argument("--keep-profile", action="store_true", help="keep what was measured, which takes minutes")
    add("prune", "remove machine code of other versions of this package, Numba, NumPy and Python", _prune)


def _on_cache(args: argparse.Namespace) -> int:
    from nbfftconv.paths import cache_directory

    if cache_directory() is None:
        print("nbfftconv: error: there is no cache folder, as there is no home", file=sys.stderr)
        return 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a folder is not used is an error here
        return int(args.run_on_cache(args))


def _print_path(args: argparse.Namespace) -> int:
    from nbfftconv.paths import cache_directory

    print(cache_directory())
    return 0


def _print_sizes(args: argparse.Namespace) -> int:
    from nbfftconv import cache

    amounts = cache.size()
    width = max(map(len, amounts)) + 2
    for kind, amount in amounts.items():
        print(f"{kind:<{width}}{_amount(amount.files, amount.nbytes)}")
    total = _amount(sum(each.files for each in amounts.values()), sum(each.nbytes for each in amounts.values()))
    print(f"{'in all':<{width}}{total}")
    return 0


def _clear(args: argparse.Namespace) -> int:
    from nbfftconv import cache

    removed = cache.clear(keep_profile=args.keep_profile)
    print(f"removed {_amount(removed.files, removed.nbytes)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from nbfftconv import cache

    try:
        removed = cache.prune()
    except RuntimeError as error:
        print(f"nbfftconv: error: {error}", file=sys.stderr)
        return 1
    print(f"removed {_amount(removed.files, removed.nbytes)}")
    return 0


def _add_tune(commands: _Parsers, is_wanted: bool) -> None:
    text = "measure how many threads pay for your layers, and which plans; write it to the profile"
    if not is_wanted:  # its arguments need the number of CPUs, and NumPy
        commands.add_parser("tune", help=text)
        return
    from nbfftconv import tune

    parser = commands.add_parser(
        "tune", help=text, description=tune.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tune.add_arguments(parser)
    parser.set_defaults(run=lambda args: tune.run(args, parser))


def _add_bench(commands: _Parsers, is_wanted: bool) -> None:
    text = "race an ONNX model of your own: onnxruntime alone, and with its convolutions computed here"
    parser = commands.add_parser("bench", help=text)
    if not is_wanted:
        return
    try:
        from nbfftconv.onnx import bench
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module == "nbfftconv":
            raise
        parser.set_defaults(run=lambda args: parser.error(f'it needs {module}: pip install "nbfftconv[onnx]"'))
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        return
    parser.description = bench.__doc__
    bench.add_arguments(parser)
    parser.set_defaults(run=lambda args: bench.run(args, parser))


if __name__ == "__main__":
    sys.exit(main())
