"""Conv and ConvTranspose nodes, computed here: their attributes, and the geometry that each size of input gives them.

A node computes what onnxruntime would, on arrays of any size. What is no convolution by this package's rules, an input
of other channels for instance, goes to onnxruntime's own node, which computes it or says what is wrong.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from nbfftconv import tables
from nbfftconv.arrays import is_compact
from nbfftconv.geometry import ConvGeometry, TransposedGeometry
from nbfftconv.kept_kernels import KeptKernels, keep_call
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan
from nbfftconv.run import ReadyForward, run_forward
from nbfftconv.transposed import run_transposed

#: What this package computes in, and its names in ONNX.
DTYPES = {onnx.TensorProto.FLOAT: np.dtype(np.float32), onnx.TensorProto.DOUBLE: np.dtype(np.float64)}
#: Sizes of inputs whose geometry a node remembers.
_KNOWN = 256

_Pads = tuple[tuple[int, int], ...]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes, texts as str."""
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def why_not(node: onnx.NodeProto, weight: np.ndarray | None, bias: np.ndarray | None) -> str:
    """Return why a node cannot be computed here; an empty text if it can, by what is known before any input."""
    if weight is None or (len(node.input) > 2 and node.input[2] and bias is None):
        return "its weights are no constants"
    if weight.dtype not in DTYPES.values():
        return f"its weights are {weight.dtype}"
    if not 3 <= weight.ndim <= 5 or 0 in weight.shape:
        return f"its weights are of shape {weight.shape}"
    given = attributes_of(node)
    if tuple(given.get("kernel_shape", weight.shape[2:])) != weight.shape[2:]:
        return "its kernel_shape is not that of its weights"
    if given.get("auto_pad", "").startswith("SAME") and any(each != 1 for each in given.get("dilations", ())):
        return "onnxruntime takes no such auto_pad with dilations"
    if node.op_type == "FusedConv" and (given.get("activation", "Relu") != "Relu" or len(node.input) > 3):
        return "more than a ReLU is fused to it"
    return ""


def _pass_of(geometry: ConvGeometry | TransposedGeometry) -> tuple[ConvGeometry, str]:
    """Return the convolution, and the direction of its pass that a node is."""
    if isinstance(geometry, TransposedGeometry):
        return geometry.convolution, "grad_input"
    return geometry, "forward"


class Convolution:
    """A Conv node, or one of ConvTranspose, with its weights.

    Parameters
    ----------
    node : onnx.NodeProto
        For which `why_not` has no reason.
    weight : numpy.ndarray
        Not copied.
    bias : numpy.ndarray or None
    clips : bool
        Whether results are clipped at zero, as by a Relu node that follows.

    Attributes
    ----------
    clips : bool
        As above.
    is_transposed : bool
    dtype : numpy.dtype
    """

    def __init__(self, node: onnx.NodeProto, weight: np.ndarray, bias: np.ndarray | None, clips: bool) -> None:
        self._node, self._bias, self.clips = node, bias, clips
        self._kernels, self._axes = KeptKernels(weight), weight.ndim - 2
        given, ones = attributes_of(node), (1,) * self._axes
        self.dtype = weight.dtype
        self.is_transposed = node.op_type == "ConvTranspose"
        self._activation = "relu" if clips or "activation" in given else None
        self._stride: tuple[int, ...] = tuple(given.get("strides", ones))
        self._dilation: tuple[int, ...] = tuple(given.get("dilations", ones))
        self._groups: int = given.get("group", 1)
        self._auto_pad: str = given.get("auto_pad", "NOTSET")
        ends = given.get("pads", (0,) * (2 * self._axes)) if self._auto_pad == "NOTSET" else (0,) * (2 * self._axes)
        self._pads: _Pads = tuple(zip(ends[: self._axes], ends[self._axes :], strict=True))
        self._added: tuple[int, ...] = tuple(given.get("output_padding", (0,) * self._axes))
        self._output_shape: tuple[int, ...] | None = given.get("output_shape")
        self._reach = tuple(d * (k - 1) for k, d in zip(weight.shape[2:], self._dilation, strict=True))
        self._known: dict[tuple[int, ...], Any] = {}
        self._host: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the node's output."""
        kernels, calls = self._kernels, self._kernels.calls
        call = calls.get((x.shape, x.dtype))
        if call is not None and call.is_current() and is_compact(x):
            result: np.ndarray = call(x)
            return result
        try:
            geometry = self.geometry(x.shape)
        except (TypeError, ValueError):
            return self._by_onnxruntime(x)
        if isinstance(geometry, TransposedGeometry):
            plan = self._plan(geometry)
            return run_transposed(geometry, plan, kernels.of(plan), x, self._bias, self._activation)
        images = geometry.of_images
        plan = kernels.plan(images, self.dtype, "auto")
        transformed, kept = kernels.of(plan), kernels.forms.get(plan.kernel_form)
        if kept is not None and x.dtype == self.dtype:
            ready = ReadyForward(plan, kept, self._bias, self._activation == "relu", geometry.output_size)
            keep_call(calls, (x.shape, x.dtype), ready)
        y, _ = run_forward(plan, x.reshape(images.input_shape), transformed, self._bias, "zeros", self._activation)
        return y.reshape(geometry.output_size)

    def geometry(self, shape: tuple[int, ...]) -> ConvGeometry | TransposedGeometry:
        """Return the convolution of an input of that shape; raise TypeError or ValueError if there is none."""
        known = self._known.get(shape)
        if known is None:
            known = self._geometry(shape)
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[shape] = known
        return known

    def seconds(self, shape: tuple[int, ...]) -> tuple[str, float]:
        """Return the algorithm of a call, and the seconds that it is expected to take on one core."""
        plan = self._plan(self.geometry(shape))
        return plan.algorithm, plan.seconds

    def convolution(self, shape: tuple[int, ...]) -> tuple[ConvGeometry, str]:
        """Return what is convolved for an input of that shape, and the direction of the pass that it is."""
        return _pass_of(self.geometry(shape))

    def text(self, shape: tuple[int, ...]) -> str:
        """Return the geometry in a few words."""
        return tables.geometry(shape, self._kernels.weight.shape, self._stride, self._dilation, self._groups)

    def _plan(self, geometry: ConvGeometry | TransposedGeometry) -> ConvPlan:
        convolution, direction = _pass_of(geometry)
        return make_plan(convolution.of_images, direction, self.dtype, weight_is_transformed=True)

    def _geometry(self, shape: tuple[int, ...]) -> ConvGeometry | TransposedGeometry:
        size, weight_size = shape[2:], self._kernels.weight.shape
        if len(size) != self._axes:
            raise ValueError(f"input must have {self._axes + 2} dimensions, got shape {shape}")
        if not self.is_transposed:
            numbers = self._stride, self._pads_at(size), self._dilation, self._groups
            return ConvGeometry.from_arguments(shape, weight_size, *numbers, self._axes)
        pads, added = self._transposed_pads(size)
        transposed = self._stride, pads, added, self._groups, self._dilation
        return TransposedGeometry.from_arguments(shape, weight_size, *transposed, self._axes)

    def _pads_at(self, size: tuple[int, ...]) -> _Pads:
        if not self._auto_pad.startswith("SAME"):
            return self._pads
        along = zip(size, self._stride, self._reach, strict=True)
        return self._divided([max(0, (math.ceil(n / s) - 1) * s + r + 1 - n) for n, s, r in along])

    def _transposed_pads(self, size: tuple[int, ...]) -> tuple[_Pads, tuple[int, ...]]:
        """Return what is left out at both ends, and added at the end."""
        shape = self._output_shape
        if shape is None and self._auto_pad.startswith("SAME"):
            shape = tuple(n * s for n, s in zip(size, self._stride, strict=True))
        if shape is None:
            return self._pads, self._added
        along = zip(size, self._stride, self._reach, self._added, shape[-self._axes :], strict=True)
        total = [(n - 1) * s + r + 1 + more - wanted for n, s, r, more, wanted in along]
        added = tuple(more + max(0, -n) for more, n in zip(self._added, total, strict=True))
        return self._divided([max(0, n) for n in total]), added

    def _divided(self, total: list[int]) -> _Pads:
        """Return what is padded, or left out, in all along each axis, divided as ONNX does: the odd one at an end."""
        if self._auto_pad == "SAME_UPPER":
            return tuple((n // 2, n - n // 2) for n in total)
        return tuple((n - n // 2, n // 2) for n in total)

    def _by_onnxruntime(self, x: np.ndarray) -> np.ndarray:
        if self._host is None:
            self._host = self._of_onnxruntime()
        return self._host(x)

    def _of_onnxruntime(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the node as a session of its own."""
        arrays = {self._node.input[1]: self._kernels.weight}
        if self._bias is not None:
            arrays[self._node.input[2]] = self._bias
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        given, made = self._node.input[0], self._node.output[0]
        nodes, result = [self._node], made
        if self.clips:
            result = f"{made} clipped"
            nodes.append(helper.make_node("Relu", [made], [result]))
        graph = helper.make_graph(
            nodes,
            self._node.name or "node",
            [helper.make_tensor_value_info(given, kind, None)],
            [helper.make_tensor_value_info(result, kind, None)],
            [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
        )
        versions = helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)
        model = helper.make_model(graph, opset_imports=versions, ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return lambda x: session.run([result], {given: x})[0]
