"""A model as onnxruntime's basic level leaves it, on disk, with its weights as arrays; parts of it as models.

That level folds constants and batch normalization, and writes nothing that is no ONNX. All parts, and the layers of
this package, read the weights from one file, where they are mapped.
"""

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from onnx import TensorProto, helper

from nbfftconv.forking import cached_property
from nbfftconv.onnx.layers import Convolution, why_not
from nbfftconv.onnx.options import BASIC, ERRORS, NONE, NOT_IMPLEMENTED, PROVIDERS, Options

#: By their domains, what may be computed here.
_OPERATORS = {("", "Conv"), ("", "ConvTranspose"), ("com.microsoft", "FusedConv")}
_MODEL, _WEIGHTS = "model.onnx", "weights.bin"
#: Bytes of the smallest weight that is in the file.
_LEAST = 1024
#: Types of tensors that NumPy has, by onnxruntime's names.
TYPES = {
    "bool": TensorProto.BOOL,
    "double": TensorProto.DOUBLE,
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "string": TensorProto.STRING,
    **{f"int{bits}": getattr(TensorProto, f"INT{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(TensorProto, f"UINT{bits}") for bits in (8, 16, 32, 64)},
}


class CannotSplit(Exception):
    """A model, or a part of it, has to be left to onnxruntime; the text says why."""


class _Folder:
    """A folder for a while, which goes with the object at the latest; not with that of a forked child."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="nbfftconv-")
        self.remove = weakref.finalize(self, _remove, self.name, os.getpid())


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


class Candidate(NamedTuple):
    """A node that this package may compute.

    Attributes
    ----------
    node : int
        Its index.
    relu : int or None
        Index of a Relu node that is computed with it.
    why_not : str
        Why it cannot be computed here; empty if it can.
    """

    node: int
    relu: int | None
    why_not: str


def operator(node: onnx.NodeProto) -> tuple[str, str]:
    """Return a node's domain and operator."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def read(path_or_bytes: Any) -> onnx.ModelProto:
    """Return a model without what is in other files."""
    if isinstance(path_or_bytes, bytes):
        return onnx.load_model_from_string(path_or_bytes)
    return onnx.load(path_or_bytes, load_external_data=False)


def has_convolutions(model: onnx.ModelProto) -> bool:
    """Return whether a model, or a function of it, has nodes that could be computed here."""
    graphs = model.graph, *model.functions
    return any(operator(node) in _OPERATORS for graph in graphs for node in graph.node)


def captured(graph: onnx.GraphProto) -> set[str]:
    """Return the values that a subgraph takes from around it."""
    made = {each.name for each in (*graph.input, *graph.initializer)}
    made.update(sparse.values.name for sparse in graph.sparse_initializer)
    used = {each.name for each in graph.output}
    for node in graph.node:
        used.update(needs(node))
        made.update(node.output)
    return used - made


def needs(node: onnx.NodeProto) -> set[str]:
    """Return the values that a node needs, those of its subgraphs included."""
    found = set(filter(None, node.input))
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            found |= captured(graph)
    return found


class Graph:
    """A model to be computed by both engines.

    Attributes
    ----------
    folder : str
        Where the model and its weights are, until `close` is called.
    nodes : list of onnx.NodeProto
        Each after those whose outputs it needs; all have names.
    inputs, outputs : list of str
    arrays : dict from str to numpy.ndarray
        What is constant.
    candidates : list of Candidate
    types : dict from str to onnx.TypeProto
        Of all values that NumPy's types can hold.
    options : Options
    """

    def __init__(self, folder: "_Folder", options: Options) -> None:
        self._folder, self.folder, self.options = folder, folder.name, options
        self._model = onnx.load(self._path, load_external_data=False)
        graph = self._model.graph
        self.nodes = list(graph.node)
        self._name_nodes()
        constants = {each.name: each for each in graph.initializer}
        self._given = {each.name: each.type for each in graph.input}
        given = list(self._given)
        if self._model.ir_version < 4:  # all constants are inputs as well, and none can be given
            given = [name for name in given if name not in constants]
        #: Constants that a caller may replace.
        self.replaceable = [name for name in given if name in constants]
        self.inputs, self.outputs = given, [each.name for each in graph.output]
        self._constants = {name: each for name, each in constants.items() if name not in self.replaceable}
        self.arrays = {name: self._array(each) for name, each in constants.items()}
        self.candidates = list(self._find_candidates())

    @classmethod
    def optimized(cls, path_or_bytes: Any, options: Options) -> "Graph":
        """Return what onnxruntime makes of a model; raises what it raises."""
        folder = _Folder()
        settings = options.part(None, optimized_model_filepath=str(Path(folder.name, _MODEL)))
        if settings.graph_optimization_level.value > BASIC.value:
            settings.graph_optimization_level = BASIC
        prefix = "session.optimized_model_external_initializers_"
        settings.add_session_config_entry(f"{prefix}file_name", _WEIGHTS)
        settings.add_session_config_entry(f"{prefix}min_size_in_bytes", str(_LEAST))
        settings.add_session_config_entry("session.disable_prepacking", "1")
        onnxruntime.InferenceSession(path_or_bytes, settings, providers=PROVIDERS)
        return cls(folder, options)

    @classmethod
    def as_written(cls, path_or_bytes: Any, options: Options) -> "Graph":
        """Return a model that onnxruntime cannot run, as it is."""
        folder = _Folder()
        load = onnx.load_model_from_string if isinstance(path_or_bytes, bytes) else onnx.load
        model = load(path_or_bytes)
        model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
        onnx.save(
            model, Path(folder.name, _MODEL), save_as_external_data=True, location=_WEIGHTS, size_threshold=_LEAST
        )
        return cls(folder, options)

    @cached_property
    def types(self) -> dict[str, onnx.TypeProto]:
        """By name, the types of values; where onnxruntime cannot run the model, as far as ONNX knows them."""
        graph = self._model.graph
        found = {each.name: each.type for each in (*graph.input, *graph.value_info, *graph.output)}
        made = [name for node in self.nodes for name in node.output if name]
        try:
            session = self._session_of(self.nodes, self.inputs, list(dict.fromkeys((*self.outputs, *made))))
        except NOT_IMPLEMENTED:
            return found
        for each in (*session.get_inputs(), *session.get_outputs()):
            kind = TYPES.get(re.sub(r"^tensor\((.*)\)$", r"\1", each.type))
            if kind is None:
                found.pop(each.name, None)
            else:
                # what has no sizes may be a scalar, or of any dimensions
                found[each.name] = helper.make_tensor_type_proto(kind, each.shape or None)
        return found

    def convolution(self, candidate: Candidate) -> Convolution:
        """Return what computes a candidate."""
        node = self.nodes[candidate.node]
        weight, bias = self._weights(node)
        assert weight is not None
        return Convolution(node, weight, bias, candidate.relu is not None)

    def static_shapes(self) -> dict[int, tuple[int, ...]] | None:
        """Return the input's shape of each candidate, by its index; None if they depend on the inputs."""
        found = {}
        for candidate in self._possible:
            kind = self.types.get(self.nodes[candidate.node].input[0])
            if kind is None or not kind.tensor_type.HasField("shape"):
                return None
            dimensions = kind.tensor_type.shape.dim
            if not all(each.HasField("dim_value") for each in dimensions):
                return None
            found[candidate.node] = tuple(each.dim_value for each in dimensions)
        return found

    def shapes(self, feeds: dict[str, Any]) -> dict[int, tuple[int, ...]]:
        """Return the same for given inputs, by a run of onnxruntime; raises what it raises."""
        asked = {f"nbfftconv shape {each.node}": self.nodes[each.node].input[0] for each in self._possible}
        nodes = [helper.make_node("Shape", [value], [name]) for name, value in asked.items()]
        session = self._session_of([*self.nodes, *nodes], self.inputs, list(asked))
        found = session.run(list(asked), self.defaults | feeds)
        return {each.node: tuple(map(int, shape)) for each, shape in zip(self._possible, found, strict=True)}

    def session(
        self, indices: Iterable[int], inputs: Sequence[str], outputs: Sequence[str], threads: int
    ) -> onnxruntime.InferenceSession:
        """Return a part of the model as a session; raise `CannotSplit` if there is none, or NumPy lacks a type."""
        for name in (*inputs, *outputs):
            if name not in self.types:
                raise CannotSplit(f"{name} is no tensor that NumPy has a type for")
        model = self._part([self.nodes[index] for index in indices], inputs, outputs)
        try:
            return self._start(model, self.options.part(self.folder, intra_op_num_threads=threads))
        except ERRORS as error:
            raise CannotSplit(f"a part of it is refused: {error}") from error

    def whole(self, **changes: Any) -> onnxruntime.InferenceSession:
        """Return all of the model as a session."""
        model = self._part(self.nodes, self.inputs, self.outputs)
        return self._start(model, self.options.part(self.folder, **changes))

    def face(self) -> onnxruntime.InferenceSession:
        """Return a session that says what onnxruntime's says of the model, and raises what it raises."""
        settings = self.options.part(self.folder, graph_optimization_level=NONE, intra_op_num_threads=1)
        settings.add_session_config_entry("session.disable_prepacking", "1")
        return onnxruntime.InferenceSession(self._path, settings, providers=PROVIDERS)

    def plain(self) -> onnxruntime.InferenceSession:
        """Return a session as a user would make it."""
        return self.options.session(self._path)

    def stand_in(self) -> onnxruntime.InferenceSession:
        """Return the same for a model that onnxruntime cannot run: one with the same inputs and outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        for field in ("node", "initializer", "sparse_initializer", "value_info"):
            graph.ClearField(field)
        # Of a shape that is not known before it is run, so that it goes with what is said of any output.
        nodes = [
            helper.make_node("Constant", [], ["nbfftconv ones"], value_ints=[1]),
            helper.make_node("NonZero", ["nbfftconv ones"], ["nbfftconv places"]),
            helper.make_node("Flatten", ["nbfftconv places"], ["nbfftconv flat"], axis=0),
            helper.make_node("Constant", [], ["nbfftconv axis"], value_ints=[0]),
            helper.make_node("Squeeze", ["nbfftconv flat", "nbfftconv axis"], ["nbfftconv shape"]),
        ]
        for output in graph.output:
            value = helper.make_tensor("value", output.type.tensor_type.elem_type, [1], [0])
            nodes.append(helper.make_node("ConstantOfShape", ["nbfftconv shape"], [output.name], value=value))
        graph.node.extend(nodes)
        return self._start(model, self.options.part(self.folder, graph_optimization_level=NONE))

    def close(self) -> None:
        """Remove the files. What is mapped stays as long as it is in use."""
        self._folder.remove()

    @cached_property
    def _weights_file(self) -> np.ndarray:
        return np.memmap(Path(self.folder, _WEIGHTS), np.uint8, "r").view(np.ndarray)

    @property
    def _path(self) -> str:
        return str(Path(self.folder, _MODEL))

    @property
    def _possible(self) -> list[Candidate]:
        return [each for each in self.candidates if not each.why_not]

    @property
    def defaults(self) -> dict[str, np.ndarray]:
        """What inputs are that need not be given."""
        return {name: self.arrays[name] for name in self.replaceable}

    def _name_nodes(self) -> None:
        """Give each node a name of its own, by which it is found in a profile."""
        names = set()
        for index, node in enumerate(self.nodes):
            if not node.name or node.name in names:
                node.name = f"{node.op_type}_{index}"
            names.add(node.name)

    def _array(self, constant: TensorProto) -> np.ndarray:
        if not constant.external_data:
            return onnx.numpy_helper.to_array(constant)
        entries = {each.key: each.value for each in constant.external_data}
        begin = int(entries.get("offset", 0))
        values = self._weights_file[begin : begin + int(entries["length"])]
        return values.view(helper.tensor_dtype_to_np_dtype(constant.data_type)).reshape(tuple(constant.dims))

    def _weights(self, node: onnx.NodeProto) -> tuple[np.ndarray | None, np.ndarray | None]:
        names = [name if name in self._constants else "" for name in node.input]
        weight = self.arrays.get(names[1])
        return weight, self.arrays.get(names[2]) if len(names) > 2 else None

    def _find_candidates(self) -> Iterator[Candidate]:
        users: dict[str, list[int]] = {name: [-1] for name in self.outputs}
        for index, node in enumerate(self.nodes):
            for name in needs(node):
                users.setdefault(name, []).append(index)
        for index, node in enumerate(self.nodes):
            if operator(node) in _OPERATORS:
                weight, bias = self._weights(node)
                after = users.get(node.output[0], [])
                relu = after[0] if len(after) == 1 and after[0] >= 0 else None
                if relu is not None and operator(self.nodes[relu]) != ("", "Relu"):
                    relu = None
                why = "its input is a constant" if node.input[0] in self.arrays else why_not(node, weight, bias)
                yield Candidate(index, relu, why)

    def _part(self, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """Return a model of some nodes, with the constants that they need."""
        used = set(outputs).union(*map(needs, nodes))
        graph = helper.make_graph(
            nodes,
            self._model.graph.name or "part",
            [_value(name, self._given.get(name) or self.types[name]) for name in inputs],
            [_value(name, None) for name in outputs],
            [each for name, each in self._constants.items() if name in used and name not in inputs],
        )
        version = max(4, self._model.ir_version)
        return helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=version)

    def _session_of(
        self, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], outputs: Sequence[str]
    ) -> onnxruntime.InferenceSession:
        """Return a session to ask or to run once, of the model and more outputs."""
        settings = self.options.part(self.folder, graph_optimization_level=NONE)
        settings.add_session_config_entry("session.disable_prepacking", "1")
        return self._start(self._part(nodes, inputs, outputs), settings)

    @staticmethod
    def _start(model: onnx.ModelProto, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=PROVIDERS, enable_fallback=0)


def _value(name: str, kind: onnx.TypeProto | None) -> onnx.ValueInfoProto:
    """Return what says of a value what it is; without a type, onnxruntime infers it."""
    value = onnx.ValueInfoProto(name=name)
    if kind is not None:
        value.type.CopyFrom(kind)
    return value
