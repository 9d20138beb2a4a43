"""Which nodes are computed here: by models of the time of both engines, or by races of the whole network.

A node that is faster alone may be slower in its network, since threads of both engines are woken in turn. So races are
of networks; what single nodes take, each in its place, only says in which order they are worth trying.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime

from nbfftconv import planner, scratch, simd, threads
from nbfftconv.machine import get_machine
from nbfftconv.onnx.graph import CannotSplit, Graph
from nbfftconv.onnx.layers import Convolution
from nbfftconv.onnx.report import Choice, Report
from nbfftconv.onnx.split import Engines, Split
from nbfftconv.rounding import round_up

#: A node, or a network, is changed if it takes at most this part of onnxruntime's time: less is noise.
_GAIN = 0.95
# What onnxruntime's convolution is taken to do: a part of a core's operations, of groups of fewer channels than that a
# smaller one; bytes of input and output as fast as memory is copied; seconds a call. On one thread 1×1 and 3×3 of 64
# channels and more took 0.85 to 1.1 of what this says, depthwise layers 0.9 to 1.6. Filters are computed by as many as
# a vector has lanes: of 7×7 and 64 channels, 1 to 16 filters all took 17 ms, at a rate as of few channels.
_HOST_RATE, _HOST_FEW, _HOST_CHANNELS, _HOST_CALL = 0.85, 0.6, 8, 1e-5
#: Seconds of a call, and of handing over: a sub-session is begun, and its threads are woken.
_CALL = 1e-4
#: So many times longer than its model says an algorithm may take in a network, where others have used the caches.
_CAUTION = {"direct": 1.75, "fft": 1.25, "winograd": 1.25}
#: Times that differ by less than this are the same.
_SAME = 1.03
#: Turns that are timed, more of short ones as long as they take no more than so many seconds; seconds of a turn.
_ROUNDS, _RACE, _TURN = 5, 0.5, 0.01
#: Networks that are raced, besides onnxruntime's, and seconds after which no more begin.
_TRIALS, _SECONDS = 8, 10.0
#: A call of so many seconds is not preceded by one that is not timed, to let threads of the other engine fall asleep.
_LONG = 0.05

#: Told what is being done, and how much of it is done, from 0 to 1.
Progress = Callable[[str, float], None]


def quiet(doing: str, part: float) -> None:
    """Tell nobody."""


def whole(graph: Graph, why: str) -> tuple[None, Report]:
    """Return the choice that leaves all to onnxruntime."""
    return None, Report(_left(graph, "was not asked about"), why)


def forced(engines: Engines) -> tuple[Split, Report]:
    """Return the choice for a model that onnxruntime cannot run: all that can be computed here is."""
    graph = engines.graph
    split = engines.split({each.node for each in graph.candidates if not each.why_not})
    why = "onnxruntime cannot run it"
    choices = {
        graph.nodes[each.node].name: Choice("", math.nan, math.nan, not each.why_not, each.why_not or why)
        for each in graph.candidates
    }
    return split, Report(choices, why)


def by_model(engines: Engines, shapes: dict[int, tuple[int, ...]]) -> tuple[Split | None, Report]:
    """Choose by the cost model of this package and a rule for onnxruntime's, for inputs of nodes of those shapes."""
    graph = engines.graph
    choices, ours = _left(graph, "onnxruntime says what is wrong with it"), set()
    for candidate in graph.candidates:
        if candidate.node not in shapes:
            continue
        convolution, shape = engines.convolution(candidate), shapes[candidate.node]
        try:
            algorithm, seconds = convolution.seconds(shape)
            host = _host_seconds(convolution, shape, graph.options.threads)
        except (TypeError, ValueError):  # onnxruntime says what is wrong when the node is run
            continue
        seconds = _CALL + _CAUTION.get(algorithm, 1.0) * seconds / graph.options.threads
        is_faster = seconds <= _GAIN * host
        name = graph.nodes[candidate.node].name
        why = f"{host / seconds:.2f} times as fast, by the cost model"
        choices[name] = Choice(convolution.text(shape), host, seconds, is_faster, why)
        if is_faster:
            ours.add(candidate.node)
    if not ours:
        return None, Report(choices, "onnxruntime runs it alone: no node is expected to be faster here")
    try:
        split = engines.split(ours)
    except CannotSplit as error:
        return None, Report(_undone(choices), f"onnxruntime runs it alone: {error}")
    return split, Report(choices, f"{len(ours)} nodes are computed here, by the cost model")


def by_race(
    engines: Engines, plain: onnxruntime.InferenceSession, feeds: dict[str, Any], progress: Progress = quiet
) -> tuple[Split | None, Report]:
    """Choose by races of the network on given inputs, with more and with fewer nodes computed here."""
    graph, end = engines.graph, time.perf_counter() + _SECONDS
    possible = {each.node for each in graph.candidates if not each.why_not}
    progress("onnxruntime's nodes are timed", 0.0)
    host = _host_times(graph, feeds)
    progress("nodes are timed here, each in its place", 0.15)
    try:
        ours = _our_times(engines.split(possible), graph, feeds)
    except CannotSplit as error:
        return whole(graph, f"onnxruntime runs it alone: {error}")
    gains = {index: host.get(index, 0.0) - ours[index] for index in possible}
    order = sorted(possible, key=lambda index: -gains[index])
    race = _Race(engines, plain, feeds, order)
    for trial in range(_TRIALS):
        count = race.next(sum(gain > 0 for gain in gains.values()))
        if count is None or (trial > 0 and time.perf_counter() > end):
            break
        progress(f"the network is raced with {count} of {len(order)} nodes", 0.3 + 0.7 * trial / _TRIALS)
        race.run(count)
    race.confirm()
    progress("chosen", 1.0)
    scratch.release()
    best = race.best()
    chosen = frozenset(order[:best])
    choices = _left(graph, "")
    shapes = graph.static_shapes() or graph.shapes(feeds)
    for candidate in graph.candidates:
        if candidate.node in possible:
            index = candidate.node
            seconds, theirs, is_ours = ours[index], host.get(index, math.nan), index in chosen
            why = f"{theirs / seconds:.2f} times as fast, measured in its place"
            if not is_ours and theirs > seconds:
                why += "; handing over costs more"
            text = engines.convolution(candidate).text(shapes[index])
            choices[graph.nodes[index].name] = Choice(text, theirs, seconds, is_ours, why)
    before, after = race.seconds[0], race.seconds[best]
    if not best:
        fastest = min((count for count in race.seconds if count), key=race.ratios.__getitem__, default=0)
        why = f"with {fastest} nodes computed here it takes {race.ratios[fastest]:.2f} times as long"
        why = f"onnxruntime runs it alone: {why}"
        return None, Report(choices, why, before, before)
    why = f"{best} nodes are computed here: {1 / race.ratios[best]:.2f} times as fast, measured"
    return race.splits[best], Report(choices, why, before, after)


def race_plans(engines: Engines, feeds: dict[str, Any], progress: Progress = quiet) -> None:
    """Race the plans of each convolution on random data, and keep the winners in the profile."""
    graph = engines.graph
    shapes = graph.shapes(feeds)
    for done, candidate in enumerate(each for each in graph.candidates if each.node in shapes):
        progress(f"plans of {graph.nodes[candidate.node].name} are raced", done / len(shapes))
        convolution = engines.convolution(candidate)
        geometry, direction = convolution.convolution(shapes[candidate.node])
        with threads.holding(graph.options.threads):
            planner.race_plans(geometry.of_images, direction, convolution.dtype)


class _Race:
    """Races of a network with the first nodes of an order computed here, of any number; 0 is onnxruntime alone.

    Attributes
    ----------
    seconds : dict from int to float
        Of a run, by the number of nodes.
    ratios : dict from int to float
        The same by onnxruntime's, of runs in turns with it.
    splits : dict from int to Split
        The best only, after `run`.
    """

    def __init__(
        self, engines: Engines, plain: onnxruntime.InferenceSession, feeds: dict[str, Any], order: list[int]
    ) -> None:
        self._engines, self._plain, self._feeds, self._order = engines, plain, feeds, order
        self.seconds: dict[int, float] = {}
        self.ratios = {0: 1.0}
        self._times: dict[int, tuple[list[float], list[float]]] = {}
        self.splits: dict[int, Split] = {}

    def next(self, promising: int) -> int | None:
        """Return the number to race next: all, the promising ones, then halfway from the best to those beside it."""
        for count in (promising, len(self._order), promising // 2):
            if count not in self.ratios:
                return count
        known = sorted(self.ratios)
        best = known.index(min(known, key=self.ratios.__getitem__))
        for beside in (best - 1, best + 1):
            if 0 <= beside < len(known):
                middle = (known[best] + known[beside]) // 2
                if middle not in self.ratios:
                    return middle
        return None

    def run(self, count: int) -> None:
        """Race with so many nodes, in turns with onnxruntime alone; once more if there was such a race."""
        split = self.splits.get(count) or self._engines.split(self._order[:count])
        names = self._engines.graph.outputs
        runs = lambda: self._plain.run(names, self._feeds), lambda: split.run(names, self._feeds)
        times = self._times.setdefault(count, ([], []))
        for run in runs:  # plans are made, and kernels transformed, at the first call
            run()
        end = time.perf_counter() + _RACE
        for turn in itertools.count(1):
            for run, found in zip(runs, times, strict=True):
                found.append(_seconds(run))
            if turn >= _ROUNDS and time.perf_counter() > end:
                break
        host, ours = map(statistics.median, times)
        self.seconds[count] = ours
        self.seconds[0] = min(host, self.seconds.get(0, math.inf))
        # Both have to be good: other processes disturb medians, and what happens once in a while is not in the least.
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        self.ratios[count] = max(ratio, min(times[1]) / min(times[0]))
        self.splits[count] = split
        # of those that are about as fast, the one with the fewest nodes: it keeps less
        least = _SAME * min(self.ratios[each] for each in self.splits)
        kept = min(each for each in self.splits if self.ratios[each] <= least)
        self.splits = {kept: self.splits[kept]}

    def confirm(self) -> None:
        """Race the fastest again: of many races one may seem faster by chance."""
        for count in list(self.splits):
            self.run(count)

    def best(self) -> int:
        """Return the number of nodes of the fastest network; 0 unless one is clearly faster."""
        return next((count for count in self.splits if self.ratios[count] <= _GAIN), 0)


def _seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of a run, once the threads of the other engine are asleep."""
    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    if first > _LONG:
        return first
    count = max(1, math.ceil(_TURN / first))
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


def _host_times(graph: Graph, feeds: dict[str, Any]) -> dict[int, float]:
    """Return the seconds that onnxruntime takes for each candidate, with what it fused to it, as its profile says."""
    session = graph.whole(enable_profiling=True, profile_file_prefix=str(Path(graph.folder, "profile")))
    for _ in range(1 + _ROUNDS):
        session.run(graph.outputs, graph.defaults | feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            durations.setdefault(name, []).append(1e-6 * event["dur"])
    users: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.input:
            users.setdefault(value, []).append(index)
    found = {}
    for candidate in graph.candidates:
        node = graph.nodes[candidate.node]
        # A node in blocked layout has the name of its output, or of that of the activation that was fused to it.
        after = [graph.nodes[index].output[0] for index in users.get(node.output[0], [])]
        names = [node.name, *(f"{value}_nchwc" for value in (node.output[0], *after))]
        if candidate.relu is not None:
            names.append(graph.nodes[candidate.relu].name)
        times = [statistics.median(durations[name][1:]) for name in names if name in durations]
        if times:
            found[candidate.node] = sum(times)
    return found


def _our_times(split: Split, graph: Graph, feeds: dict[str, Any]) -> dict[int, float]:
    """Return the seconds that this package takes for each candidate, in its place."""
    split.run(graph.outputs, feeds)
    times: dict[int, list[float]] = {}
    for _ in range(_ROUNDS):
        split.run(graph.outputs, feeds, times=times)
    return {index: statistics.median(found) for index, found in times.items() if index >= 0}


def _host_seconds(convolution: Convolution, shape: tuple[int, ...], threads: int) -> float:
    """Return the seconds of onnxruntime's convolution, by rule of thumb."""
    geometry, direction = convolution.convolution(shape)
    machine, itemsize = get_machine(), convolution.dtype.itemsize
    filters, lanes = geometry.weight_size[0] // geometry.groups, simd.lanes(convolution.dtype.type)
    is_few, blocks = min(filters, geometry.weight_size[1]) < _HOST_CHANNELS, 1.0
    if direction == "forward" and geometry.groups == 1:
        is_few, blocks = is_few or filters <= lanes, round_up(filters, lanes) / filters
    rate = (_HOST_FEW if is_few else _HOST_RATE) * machine.flops
    moved = itemsize * (math.prod(geometry.input_size) + math.prod(geometry.output_size))
    return _HOST_CALL + max(2 * blocks * geometry.multiply_adds / (rate * threads), moved / machine.bandwidth)


def _left(graph: Graph, why: str) -> dict[str, Choice]:
    """Return choices that leave every node to onnxruntime."""
    return {
        graph.nodes[each.node].name: Choice("", math.nan, math.nan, False, each.why_not or why)
        for each in graph.candidates
    }


def _undone(choices: dict[str, Choice]) -> dict[str, Choice]:
    return {name: replace(choice, is_replaced=False) for name, choice in choices.items()}
