"""Races: calls that take turns, whose seconds are compared by their medians."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Length(NamedTuple):
    """When a race ends: after so many rounds and seconds, or after one round and `limit` seconds."""

    rounds: int
    seconds: float
    limit: float


def race(turns: Sequence[Callable[[], float]], length: Length) -> list[float]:
    """Return the median of the seconds that each of several functions returns, called in turns."""
    times: list[list[float]] = [[] for _ in turns]
    start = time.perf_counter()
    for number in itertools.count():
        for turn, of_turn in zip(turns, times, strict=True):
            seconds = turn()
            if number > 0:  # plans are made, and kernels transformed, at the first call
                of_turn.append(seconds)
        spent = time.perf_counter() - start
        if number > 0 and spent > (length.seconds if number >= length.rounds else length.limit):
            return list(map(statistics.median, times))
    raise AssertionError("unreachable")


def clock(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
