"""A model run by both engines: parts of it by onnxruntime's sub-sessions, between them nodes that are computed here."""

import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from nbfftconv import threads
from nbfftconv.onnx.graph import Candidate, CannotSplit, Graph, needs
from nbfftconv.onnx.layers import Convolution

#: Threads of all parts of a model in all. Each has a pool; where there would be more, only parts that do more than what
#: is in `_LIGHT`, a few operations a number, have threads.
_MOST_THREADS = 256
_LIGHT = {
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "Div", "Dropout", "Elu", "Equal", "Expand",
    "Flatten", "Floor", "Gather", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "Max", "Min",
    "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Range", "Relu", "Reshape", "Shape", "Sigmoid", "Slice",
    "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


class Part(NamedTuple):
    """Nodes that onnxruntime computes at once.

    Attributes
    ----------
    nodes : tuple of int
    inputs, outputs : tuple of str
    threads : int
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    threads: int


class _Step(NamedTuple):
    """What is run at once: a part by its session, or a candidate by its convolution; and what is let go after it."""

    session: onnxruntime.InferenceSession | None
    inputs: Sequence[str]
    outputs: Sequence[str]
    candidate: int
    convolution: Convolution | None
    dropped: Sequence[str]


class Engines:
    """Makes splits of one model; what two have in common, sessions and convolutions, is made once.

    Sessions are there as long as a split is that has them, and so are their threads.

    Parameters
    ----------
    graph : Graph

    Attributes
    ----------
    graph : Graph
        As above.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._sessions: weakref.WeakValueDictionary[Part, onnxruntime.InferenceSession] = weakref.WeakValueDictionary()
        self._convolutions: dict[int, Convolution] = {}

    def split(self, ours: Collection[int]) -> "Split":
        """Return a split in which the candidates of those indices are computed here; raise `CannotSplit` if none is."""
        return Split(self, frozenset(ours))

    def convolution(self, candidate: Candidate) -> Convolution:
        """Return what computes a candidate."""
        found = self._convolutions.get(candidate.node)
        if found is None:
            found = self._convolutions[candidate.node] = self.graph.convolution(candidate)
        return found

    def session(self, part: Part) -> onnxruntime.InferenceSession:
        """Return the session of a part."""
        session = self._sessions.get(part)
        if session is None:
            session = self._sessions[part] = self.graph.session(*part)
        return session


class Split:
    """A model run by both engines.

    Parameters
    ----------
    engines : Engines
    ours : frozenset of int
        The candidates that are computed here.

    Attributes
    ----------
    ours : frozenset of int
        As above.
    """

    def __init__(self, engines: Engines, ours: frozenset[int]) -> None:
        graph = engines.graph
        self.ours, self._threads, self._outputs = ours, graph.options.threads, graph.outputs
        self._given = graph.defaults
        constants = {name: graph.arrays[name] for name in graph.outputs if name in graph.arrays}
        self._constants = {name: array for name, array in constants.items() if name not in self._given}
        self._steps = list(_steps(engines, ours))

    def run(
        self,
        names: Sequence[str],
        feeds: dict[str, Any],
        run_options: onnxruntime.RunOptions | None = None,
        times: dict[int, list[float]] | None = None,
    ) -> list[Any]:
        """Return the outputs of those names.

        With `times`, the seconds of each candidate are added to it, and of all parts those of onnxruntime under -1.
        """
        values, wanted = self._given | feeds, frozenset(names)
        with threads.holding(self._threads):
            for step in self._steps:
                begin = time.perf_counter()
                if step.session is not None:
                    made = step.session.run(step.outputs, {name: values[name] for name in step.inputs}, run_options)
                    values.update(zip(step.outputs, made, strict=True))
                elif step.convolution is not None:
                    values[step.outputs[0]] = step.convolution(values[step.inputs[0]])
                if times is not None:
                    times.setdefault(step.candidate, []).append(time.perf_counter() - begin)
                for name in step.dropped:
                    if name not in wanted:
                        del values[name]
        return [self._output(name, values, feeds) for name in names]

    def _output(self, name: str, values: dict[str, Any], feeds: dict[str, Any]) -> Any:
        """Return an output, which is the caller's: what is an input or a constant is copied."""
        if name in self._constants:
            return self._constants[name].copy()
        value = values[name]
        return np.array(value) if value is feeds.get(name) or value is self._given.get(name) else value


def _steps(engines: Engines, ours: frozenset[int]) -> Iterator[_Step]:
    """Yield the steps of a split."""
    graph = engines.graph
    phases = _phases(graph, ours)
    last = _last_uses(graph, phases)
    later: set[str] = set(graph.outputs)
    parts: list[tuple[list[int], list[str], list[str], Candidate | None]] = []
    for nodes, candidate in reversed(phases):
        made = {name for index in nodes for name in graph.nodes[index].output if name}
        needed = set().union(*(needs(graph.nodes[index]) for index in nodes))
        outputs = sorted(made & later)
        inputs = sorted(name for name in needed - made if name in graph.replaceable or name not in graph.arrays)
        parts.append((nodes, inputs, outputs, candidate))
        later |= needed
    most = graph.options.threads
    are_many = sum(candidate is None for *_, candidate in parts) * (most - 1) > _MOST_THREADS
    for number, (nodes, inputs, outputs, candidate) in enumerate(reversed(parts)):
        dropped = [name for name in (*inputs, *outputs) if last[name] == number]
        if candidate is None and outputs:
            is_light = are_many and all(graph.nodes[index].op_type in _LIGHT for index in nodes)
            part = Part(tuple(nodes), tuple(inputs), tuple(outputs), 1 if is_light else most)
            yield _Step(engines.session(part), inputs, outputs, -1, None, dropped)
        elif candidate is not None:
            convolution, given = engines.convolution(candidate), graph.nodes[candidate.node].input[0]
            yield _Step(None, [given], outputs, candidate.node, convolution, dropped)


def _phases(graph: Graph, ours: frozenset[int]) -> list[tuple[list[int], Candidate | None]]:
    """Return all nodes in turns: as many as onnxruntime can compute at once, then all candidates that are due."""
    candidates = {each.node: each for each in graph.candidates if each.node in ours}
    waiting = list(range(len(graph.nodes)))
    known = {*graph.inputs, *graph.arrays}
    phases: list[tuple[list[int], Candidate | None]] = []
    with_others = {each.relu for each in candidates.values()}
    while waiting:
        part, rest = [], []
        for index in waiting:
            node = graph.nodes[index]
            if index in with_others:
                continue
            if index not in candidates and needs(node) <= known:
                part.append(index)
                known.update(node.output)
            else:
                rest.append(index)
        if part:
            phases.append((part, None))
        due = [index for index in rest if index in candidates and needs(graph.nodes[index]) <= known]
        if not part and not due:
            raise CannotSplit("its nodes have no order")
        for index in due:
            candidate = candidates[index]
            nodes = [index] if candidate.relu is None else [index, candidate.relu]
            phases.append((nodes, candidate))
            known.update(name for each in nodes for name in graph.nodes[each].output)
        waiting = [index for index in rest if index not in due]
    return phases


def _last_uses(graph: Graph, phases: list[tuple[list[int], Candidate | None]]) -> dict[str, int]:
    """Return the phase after which each value can be let go; those of outputs never come."""
    last: dict[str, int] = {}
    for number, (nodes, _) in enumerate(phases):
        for index in nodes:
            for name in (*graph.nodes[index].output, *needs(graph.nodes[index])):
                last[name] = number
    return last | dict.fromkeys(graph.outputs, len(phases))
