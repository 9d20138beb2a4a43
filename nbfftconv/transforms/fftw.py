"""FFTW as pyFFTW ships it: planning, wisdom, and tile transforms that compiled code calls from any thread.

pyFFTW's own objects hold the GIL while they run, so plans are made and executed through the library that pyFFTW has
loaded. Plans are for one thread: parallelism goes over tiles, and a plan that knew the number of threads could round
differently for each. FFTW's interleaved output is half as fast again as its split output, splitting afterwards
included.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyfftw

from nbfftconv import rates, simd
from nbfftconv.forking import fork_safe_lock
from nbfftconv.jit import Callback
from nbfftconv.report import report
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.store import ABSENT, Document
from nbfftconv.transforms import COMPLEX_BYTES, Functions, Layout, Operations, TileTransform, Transform, signature

# Symbols are found through the libraries that pyFFTW's extension module is linked to.
_library = ctypes.CDLL(pyfftw.pyfftw.__file__)
_PREFIX: dict[type, str] = {np.float32: "fftwf_", np.float64: "fftw_"}
_FLAGS = {"measure": 0, "estimate": 1 << 6, "patient": 1 << 5, "exhaustive": 1 << 3}
_DESTROY_INPUT = 1 << 0

# `transform`, beside those of `Transform`: fraction of the machine's `flops`; pyFFTW's FFTW has vectors of 32 bytes.
_RATES = rates.of("fftw")

_effort = "measure"
_effort_source = "default"
_lock = fork_safe_lock()  # FFTW's planner is one for the process
_MOST_TRANSFORMS = 64  # that are kept though nobody uses them
_transforms: dict[tuple, TileTransform] = {}  # what was used last is last


class _Dimension(ctypes.Structure):
    """fftw_iodim64."""

    _fields_ = [
        ("n", ctypes.c_ssize_t),
        ("input_stride", ctypes.c_ssize_t),
        ("output_stride", ctypes.c_ssize_t),
    ]


def set_planning_effort(effort: str) -> None:
    """Set how long FFTW looks for a fast plan for a size that it has not planned yet.

    Parameters
    ----------
    effort : {"estimate", "measure", "patient", "exhaustive"}
        At first "measure". What was measured is kept on disk as wisdom, so a size is measured once a machine.

    Raises
    ------
    ValueError
        If `effort` is none of these.

    Examples
    --------
    >>> from nbfftconv.transforms import fftw
    >>> before = fftw.get_planning_effort()
    >>> fftw.set_planning_effort("patient")
    >>> fftw.get_planning_effort()
    'patient'
    >>> fftw.set_planning_effort(before)
    """
    global _effort, _effort_source
    if effort not in _FLAGS:
        raise ValueError(f"planning effort must be one of {sorted(_FLAGS)}, got {effort!r}")
    _effort, _effort_source = effort, "set"


def get_planning_effort() -> str:
    """Return the planning effort in force.

    Returns
    -------
    str
        One of "estimate", "measure", "patient" and "exhaustive".

    Examples
    --------
    >>> from nbfftconv.transforms import fftw
    >>> fftw.get_planning_effort() in ("estimate", "measure", "patient", "exhaustive")
    True
    """
    return _effort


def planning_effort_source() -> str:
    """Return where the planning effort comes from: "set" or "default"."""
    return _effort_source


def save_wisdom(path: str | os.PathLike) -> None:
    """Write all that FFTW has learnt in this process to a file, which another process or machine can load.

    Parameters
    ----------
    path : str or os.PathLike
        The file, replaced in one step if it exists.

    Raises
    ------
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from nbfftconv.transforms import fftw
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fftw.save_wisdom(Path(folder, "wisdom.json"))
    ...     fftw.load_wisdom(Path(folder, "wisdom.json"))
    """
    _save_wisdom(Document(Path(path)))


def load_wisdom(path: str | os.PathLike) -> None:
    """Add a file of `save_wisdom` to what FFTW knows. Sizes that were planned before keep their plans.

    Parameters
    ----------
    path : str or os.PathLike
        The file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, or FFTW refuses it: damaged, or of another FFTW.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from nbfftconv.transforms import fftw
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fftw.save_wisdom(Path(folder, "wisdom.json"))
    ...     fftw.load_wisdom(Path(folder, "wisdom.json"))
    """
    _load_wisdom(Document(Path(path)))


def _save_wisdom(document: Document) -> None:
    with _lock:
        double, single, _ = pyfftw.export_wisdom()
    document.replace({"format": "nbfftconv wisdom", "double": double.decode(), "single": single.decode()})


def _load_wisdom(document: Document) -> None:
    path = os.fspath(document.path)
    try:
        content = document.read()
        wisdom = content["double"].encode(), content["single"].encode(), b""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path!r} is no wisdom file: {error!r}") from error
    with _lock:
        accepted = pyfftw.import_wisdom(wisdom)
    if not (accepted[0] and accepted[1]):
        raise ValueError(f"FFTW does not accept the wisdom in {path!r}: damaged, or of another FFTW")


@contextlib.contextmanager
def _shared_wisdom() -> Iterator[None]:
    """Within, FFTW knows what other processes have measured, and what it measures they will know.

    One process measures at a time: two that measured the same size might choose plans with other last bits. Where the
    cache folder cannot be written, or the other one takes too long, what there is is used, and nothing is added.
    """
    document = Document.in_cache("fftw-wisdom.json")
    with document.locked() as is_locked:
        try:
            _load_wisdom(document)
        except ABSENT:
            pass
        except (OSError, ValueError) as error:
            report(f"ignored: {error}")
        yield
        if is_locked:
            with contextlib.suppress(OSError):
                _save_wisdom(document)


def _function(real: type, name: str, result: type | None, arguments: list) -> Any:
    function = getattr(_library, _PREFIX[real] + name)
    function.restype, function.argtypes = result, arguments
    return function


def _plan(real: type, name: str, dimensions: list[tuple[int, int, int]], addresses: list[int], flags: int) -> int:
    array = (_Dimension * len(dimensions))(*dimensions)  # type: ignore[misc]
    word, count = ctypes.c_void_p, ctypes.c_int
    planner = _function(real, name, word, [count, word, count, word, word, word, word, ctypes.c_uint])
    plan = planner(len(dimensions), array, 0, None, *addresses, flags)
    if not plan:
        raise RuntimeError(f"FFTW made no plan for {name} {dimensions}")
    return plan


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra."""
    lanes = simd.lanes(real)
    return Layout(1, round_up(width, lanes), cdiv(height * (width // 2 + 1), lanes))


def fftw(real: type, height: int, width: int) -> TileTransform:
    """Return FFTW's transform of tiles of ``height * width`` scalars, planned at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    height, width : int
        At least 1.
    """
    key = (real, height, width, _effort)
    with _lock:
        if key in _transforms:
            _transforms[key] = _transforms.pop(key)
        else:
            with _shared_wisdom():
                _transforms[key] = _make(real, height, width, _FLAGS[_effort] | _DESTROY_INPUT)
            _destroy_unused()
        return _transforms[key]


def _destroy_unused() -> None:
    """Destroy FFTW's plans past the bound, but those of the last transform and of any that somebody else holds."""
    for key in list(_transforms)[:-1]:
        if len(_transforms) <= _MOST_TRANSFORMS:
            return
        if sys.getrefcount(_transforms[key]) <= 2:  # the dictionary's, and this argument; others get one by the lock
            context = _transforms.pop(key).kept
            destroy = _function(key[0], "destroy_plan", None, [ctypes.c_void_p])
            destroy(int(context["forward"]))
            destroy(int(context["inverse"]))


def _make(real: type, height: int, width: int, flags: int) -> TileTransform:
    half = width // 2 + 1
    itemsize = np.dtype(real).itemsize
    shape = layout(real, height, width)
    tile = pyfftw.zeros_aligned(height * shape.pitch, dtype=real, n=64)
    spectrum = pyfftw.zeros_aligned(2 * height * half, dtype=real, n=64)
    real_part, imaginary_part = spectrum.ctypes.data, spectrum.ctypes.data + itemsize
    _function(real, "plan_with_nthreads", None, [ctypes.c_int])(1)
    forward = _plan(
        real, "plan_guru64_split_dft_r2c", [(height, shape.pitch, 2 * half), (width, 1, 2)],
        [tile.ctypes.data, real_part, imaginary_part], flags,
    )  # fmt: skip
    inverse = _plan(
        real, "plan_guru64_split_dft_c2r", [(height, 2 * half, shape.pitch), (width, 2, 1)],
        [real_part, imaginary_part, tile.ctypes.data], flags,
    )  # fmt: skip
    execute = _execute(real, "execute_split_dft_r2c"), _execute(real, "execute_split_dft_c2r")
    context = np.array((*execute, forward, inverse, shape.bins), _CONTEXT)
    return TileTransform.of_all(
        Functions(_forward.address(real), _inverse.address(real), context.ctypes.data),
        shape,
        divisor=height * width,
        work_items=2 * shape.bins * simd.lanes(real),
        kept=context,
    )


def _execute(real: type, name: str) -> int:
    return ctypes.cast(getattr(_library, _PREFIX[real] + name), ctypes.c_void_p).value  # type: ignore[return-value]


# Addresses of FFTW's functions, of the plans that they execute, and the bins of a spectrum.
_CONTEXT = np.dtype([(name, np.intp) for name in ("execute_forward", "execute_inverse", "forward", "inverse", "bins")])


def _forward_factory(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def forward(c, tile, work, spectrum, stride, rows, columns):
        simd.call(c.execute_forward, (c.forward, tile, work, work + itemsize))
        for index in range(c.bins):
            interleaved = simd.pointer(real, work + index * COMPLEX_BYTES)
            parts = simd.pointer(real, spectrum + index * stride)
            for lane in range(lanes):
                parts[lane] = interleaved[2 * lane]
                parts[lanes + lane] = interleaved[2 * lane + 1]

    return forward


def _inverse_factory(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def inverse(c, tile, work, spectrum, stride, rows, columns):
        for index in range(c.bins):
            interleaved = simd.pointer(real, work + index * COMPLEX_BYTES)
            parts = simd.pointer(real, spectrum + index * stride)
            for lane in range(lanes):
                interleaved[2 * lane] = parts[lane]
                interleaved[2 * lane + 1] = parts[lanes + lane]
        simd.call(c.execute_inverse, (c.inverse, work, work + itemsize, tile))

    return inverse


_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=7))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=7))


def _operations(height, width, frequencies):
    samples = height * width
    rate = _RATES["transform"] * min(32, simd.VECTOR_BYTES) / simd.VECTOR_BYTES
    return Operations(2.5 * samples * np.log2(samples + 1) / rate, 0.0, 0.0)


def _is_available() -> bool:
    """Tell whether FFTW's functions are found through pyFFTW; on Windows they are not."""
    names = "plan_guru64_split_dft_r2c", "plan_guru64_split_dft_c2r", "execute_split_dft_r2c", "execute_split_dft_c2r"
    return all(hasattr(_library, prefix + name) for prefix in _PREFIX.values() for name in names)


TRANSFORM = Transform(
    "fftw", lambda real, tile, taps: fftw(real, *tile), layout, None, _operations,
    product_rate=_RATES["product"], spectra_rate=_RATES["spectra"], stream_rate=_RATES["stream"], row=_RATES["row"],
    is_library=True, is_available=_is_available(),
)  # fmt: skip
