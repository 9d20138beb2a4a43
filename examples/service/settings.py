"""What can be set for the service, all by environment variables, as both servers pass these on to their workers."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbfftconv.threads import available

ENGINES = "nbfftconv", "onnxruntime"
VALUES = "unit", "standard"
OUTPUTS = "image", "map"


class SettingError(ValueError):
    """A variable that says nothing of use."""


@dataclass(frozen=True)
class Settings:
    """What is in force; README.md has the same as a table.

    Attributes
    ----------
    model : Path or None
        An ONNX file; None for the network of `make_model`.
    engine : str
        What computes convolutions: "nbfftconv" where it is expected to be faster, or "onnxruntime" alone.
    sides : tuple of int
        Heights and widths, in pixels, that the network is run with. Images are filled up to the next of them.
    values : str
        What the network is given: "unit" for values from 0 to 1; "standard" for mean 0 and deviation 1 of each image.
    output : str
        What it makes: an "image" of such values, or a "map", which is stretched to be seen.
    threads : int
        Images that a process computes at once.
    queue : int
        Images that wait in a process, at most.
    batch, batch_pixels : int
        Images of a batch, and the pixels of all of them, at most.
    batch_wait : float
        Seconds that an image waits for others of its size.
    body_bytes, body_seconds : int
        Bytes of an upload, and seconds that it takes, at most.
    """

    model: Path | None = None
    engine: str = "nbfftconv"
    sides: tuple[int, ...] = (64, 128, 256, 384)
    values: str = "unit"
    output: str = "image"
    threads: int = 1
    queue: int = 64
    batch: int = 8
    batch_pixels: int = 32768
    batch_wait: float = 0.002
    body_bytes: int = 8 * 2**20
    body_seconds: int = 20


def from_environment(variables: Mapping[str, str] = os.environ) -> Settings:
    """Return what variables say, ``SERVICE_`` and the setting in capitals; raise `SettingError` if one is wrong."""

    def read(name: str, parse: Callable[[str], Any], default: Any) -> Any:
        text = variables.get(f"SERVICE_{name.upper()}", "").strip()
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise SettingError(f"SERVICE_{name.upper()}: {error}, got {text!r}") from None

    usual = Settings(threads=available())
    parsers: dict[str, Callable[[str], Any]] = {
        "model": _file,
        "engine": _one_of(ENGINES),
        "sides": lambda text: tuple(sorted({_count(each) for each in text.split(",")})),
        "values": _one_of(VALUES),
        "output": _one_of(OUTPUTS),
        "batch_wait": _seconds,
    }
    names = Settings.__dataclass_fields__
    return Settings(**{name: read(name, parsers.get(name, _count), getattr(usual, name)) for name in names})


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError("must be an integer") from None
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 <= value <= 60:
        raise ValueError("must be from 0 to 60 seconds")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ValueError("must be a file")
    return path


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return parse
