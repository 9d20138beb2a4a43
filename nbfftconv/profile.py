"""The profile: what was measured on a machine and is used from then on, the fastest plans and the thread counts."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbfftconv import environment, epoch
from nbfftconv.forking import fork_safe_lock
from nbfftconv.geometry import FLAT, ConvGeometry, Depth, integer
from nbfftconv.implementations import registry
from nbfftconv.paths import absolute
from nbfftconv.plan import DIRECTIONS, Choices
from nbfftconv.report import report
from nbfftconv.store import ABSENT, Document
from nbfftconv.threads import begin_with

_FORMAT = "nbfftconv profile 1"
_DTYPES = ("float32", "float64")
#: Of the numbers of a `Depth`.
_LEAST = 1, 1, 1, 1, 1, -(2**31)


@dataclass(frozen=True)
class Problem:
    """What an automatic plan is made for. Build it with `of`.

    Attributes
    ----------
    geometry : ConvGeometry
    direction : str
    dtype : str
    weight_is_transformed : bool
    """

    geometry: ConvGeometry
    direction: str
    dtype: str
    weight_is_transformed: bool

    @classmethod
    def of(cls, geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_transformed: bool) -> "Problem":
        """Return the problem; grad_weight transforms no kernels."""
        return cls(geometry, direction, dtype.name, weight_is_transformed and direction != "grad_weight")


@dataclass(frozen=True)
class Winner:
    """The fastest of the plans that were measured for a problem.

    Attributes
    ----------
    algorithm : str
    choices : tuple
        The plan's.
    seconds, model_seconds : float
        Time of a call, and of one by the plan that the cost model would have chosen.
    threads : int
        Threads at which it was measured.
    """

    algorithm: str
    choices: Choices
    seconds: float
    model_seconds: float
    threads: int


@dataclass(frozen=True)
class Profile:
    """What is known of a machine.

    Attributes
    ----------
    threads : tuple of int or None
        The best numbers of threads, of all loops but those of a library's transforms, and of these; None if they were
        not measured.
    winners : dict from Problem to Winner
    """

    threads: tuple[int, int] | None = None
    winners: dict[Problem, Winner] = field(default_factory=dict)


_lock = fork_safe_lock()
_profiles: dict[str | None, Profile] = {}  # by the file that is named; None for that of the cache folder
_chosen: str | None = None  # as set


def _named() -> str | None:
    return _chosen or environment.text(environment.PROFILE)


def _document(named: str | None) -> Document:
    return Document(Path(named)) if named else Document.of_machine("profile")


def profile_file() -> Path:
    """Return the file of the profile; it need not exist.

    Returns
    -------
    pathlib.Path
        What ``NBFFTCONV_PROFILE`` names, or a file of the cache folder.

    Examples
    --------
    >>> from nbfftconv.profile import profile_file
    >>> profile_file().suffix
    '.json'
    """
    return _document(_named()).path


def set_profile_file(path: str | os.PathLike | None) -> None:
    """Use this file from now on, in this process.

    Plans follow at once; thread counts are the profile's in a process that has not needed them yet.

    Parameters
    ----------
    path : path-like or None
        It need not exist; None for what the environment says.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is empty, or in the home of a user that there is not.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.set_profile_file("layers.json")
    >>> config.get_profile_file().name
    'layers.json'
    >>> config.set_profile_file(None)
    """
    global _chosen
    _chosen = None if path is None else absolute("the profile", path)
    epoch.begin()


def profile_source() -> str:
    """Return where the file's place comes from: "set", "environment" or "default"."""
    return environment.source(_chosen, environment.PROFILE)


def get_profile() -> Profile:
    """Return the profile, read at the first request; what other processes add later is for later processes."""
    key = _named()
    if (profile := _profiles.get(key)) is not None:
        return profile
    with _lock:
        if key not in _profiles:
            _profiles[key] = _read_or_ignore(_document(key))
        return _profiles[key]


def remember(threads: tuple[int, int] | None = None, winners: dict[Problem, Winner] | None = None) -> None:
    """Add to the profile, on disk and in this process.

    A file that is no profile of this machine is not lost but renamed, to end in ".ignored".
    """
    key, new = _named(), winners or {}
    document = _document(key)
    with _lock, document.locked():  # or not: what took a user minutes to measure is kept all the same
        known = get_profile()
        try:
            kept = _read_or_set_aside(document)
            kept = Profile(threads or kept.threads, kept.winners | new)
            document.replace_of_machine(_FORMAT, _to_json(kept))
        except OSError as error:
            name = os.fspath(document.path)
            report(f"the profile is kept for this process only, {name!r} cannot be written: {error}")
            kept = Profile(threads or known.threads, new)
        _profiles[key] = Profile(kept.threads, known.winners | kept.winners)
    epoch.begin()


def _read_or_ignore(document: Document) -> Profile:
    try:
        return _read(document)
    except ABSENT:
        pass
    except (OSError, ValueError) as error:
        report(f"ignored: {error}")
    return Profile()


def _read_or_set_aside(document: Document) -> Profile:
    try:
        return _read(document)
    except ABSENT:
        pass
    except ValueError:  # reported when it was read first
        document.set_aside()
    return Profile()


def _read(document: Document) -> Profile:
    """Return what the file holds; single winners that make no sense are reported and ignored."""
    content, name = document.read_of_machine(_FORMAT), os.fspath(document.path)
    entries, counts = content.get("winners"), content.get("threads")
    if not isinstance(entries, list):
        raise ValueError(f"{name!r} is damaged: winners {entries!r}")
    try:
        threads = (
            None if counts is None else (integer("loops", counts["loops"], 1), integer("library", counts["library"], 1))
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{name!r} is damaged: threads {counts!r}") from error
    winners = {}
    for entry in entries:
        try:
            winners[_problem(entry)] = _winner(entry)
        except (TypeError, ValueError, KeyError) as error:
            report(f"ignored in {name!r}: {error!r} in {entry!r}")
    return Profile(threads, winners)


def _problem(entry: dict[str, Any]) -> Problem:
    names = [name for name in ConvGeometry.__dataclass_fields__ if name not in ("depth", "channels_last")]
    geometry = ConvGeometry.from_arguments(**{name: entry[name] for name in names})
    if "depth" in entry:
        geometry = _of_volumes(geometry, entry["depth"])
    kept = entry["weight_is_transformed"]
    if entry["direction"] not in DIRECTIONS or entry["dtype"] not in _DTYPES or not isinstance(kept, bool):
        raise ValueError("direction, dtype or weight_is_transformed is unknown")
    return Problem.of(geometry, entry["direction"], np.dtype(entry["dtype"]), kept)


def _of_volumes(geometry: ConvGeometry, numbers: Any) -> ConvGeometry:
    """Return the geometry with the third axis of volumes, which is written as its numbers."""
    depth = Depth(*(integer("depth", number, least) for number, least in zip(numbers, _LEAST, strict=True)))
    if geometry.input_size[0] % depth.outputs or geometry.weight_size[1] % depth.taps:
        raise ValueError(f"depth {numbers!r} does not go with {geometry}")
    return replace(geometry, depth=depth)


def _winner(entry: dict[str, Any]) -> Winner:
    algorithm = entry["algorithm"]
    others = {*Problem.__dataclass_fields__, *ConvGeometry.__dataclass_fields__, *Winner.__dataclass_fields__}
    written = {name: value for name, value in entry.items() if name not in others and value is not None}
    choices = registry.get(algorithm).read_choices(written)
    seconds, model_seconds = entry["seconds"], entry["model_seconds"]
    if not all(isinstance(time, float) and 0 < time < float("inf") for time in (seconds, model_seconds)):
        raise ValueError("seconds must be positive numbers")
    return Winner(algorithm, choices, seconds, model_seconds, integer("threads", entry["threads"], 1))


def _to_json(profile: Profile) -> dict[str, Any]:
    threads = None if profile.threads is None else dict(zip(("loops", "library"), profile.threads, strict=True))
    winners = []
    for problem, winner in profile.winners.items():
        entry, found = asdict(problem), asdict(winner)
        geometry = entry.pop("geometry")
        del geometry["channels_last"]  # races are of channels first
        if problem.geometry.depth == FLAT:
            del geometry["depth"]
        winners.append(geometry | entry | dict(found.pop("choices")) | found)
    return {"threads": threads, "winners": winners}


begin_with(lambda: get_profile().threads)
