"""IOBinding: inputs and outputs that a run finds and leaves in memory of the caller, as onnxruntime's own class has it.

What was bound is kept as it was said: it is told to onnxruntime's own binding where that runs the model alone.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper


def _array_at(element_type: Any, shape: Sequence[int], address: int) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(element_type) if isinstance(element_type, int) else np.dtype(element_type)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return memory.view(dtype).reshape(tuple(shape))


def _check_device(device_type: str) -> None:
    if device_type != "cpu":
        raise ValueError(f"device_type must be 'cpu', got {device_type!r}")


class IOBinding:
    """What a run is to take and to leave where; made by `InferenceSession.io_binding`.

    Attributes
    ----------
    inputs : dict from str to numpy.ndarray or onnxruntime.OrtValue
    outputs : dict from str to numpy.ndarray, onnxruntime.OrtValue or None
        None where memory is made for them.
    results : list of onnxruntime.OrtValue
        Of the last run, in the order of `outputs`.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.results: list[onnxruntime.OrtValue] = []

    def bind_cpu_input(self, name: str, arr_on_cpu: np.ndarray) -> None:
        """Take an input from an array."""
        self.inputs[name] = arr_on_cpu

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        """Take an input from an address."""
        _check_device(device_type)
        self.inputs[name] = _array_at(element_type, shape, buffer_ptr)

    def bind_ortvalue_input(self, name: str, ortvalue: onnxruntime.OrtValue) -> None:
        """Take an input from a value of onnxruntime."""
        self.inputs[name] = ortvalue

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """Leave an output at an address, or in memory that is made for it."""
        _check_device(device_type)
        if buffer_ptr is not None and (element_type is None or shape is None):
            raise ValueError("`element_type` and `shape` are to be provided if pre-allocated memory is provided")
        self.outputs[name] = None
        if buffer_ptr is not None and shape is not None:
            self.outputs[name] = _array_at(element_type, shape, buffer_ptr)

    def bind_ortvalue_output(self, name: str, ortvalue: onnxruntime.OrtValue) -> None:
        """Leave an output in a value of onnxruntime."""
        self.outputs[name] = ortvalue

    def get_outputs(self) -> list[onnxruntime.OrtValue]:
        """Return the outputs of the last run."""
        return list(self.results)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        """Return the outputs of the last run as arrays."""
        return [each.numpy() for each in self.results]

    def clear_binding_inputs(self) -> None:
        """Forget all inputs."""
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        """Forget all outputs."""
        self.outputs.clear()

    def synchronize_inputs(self) -> None:
        """Do nothing: memory is the CPU's."""

    def synchronize_outputs(self) -> None:
        """Do nothing: memory is the CPU's."""

    def run_by(self, session: onnxruntime.InferenceSession, run_options: onnxruntime.RunOptions | None) -> None:
        """Run a model by onnxruntime alone."""
        binding = session.io_binding()
        for name, value in self.inputs.items():
            if isinstance(value, onnxruntime.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, value)
        for name, value in self.outputs.items():
            if value is None:
                binding.bind_output(name)
            else:
                binding.bind_ortvalue_output(name, _as_value(value))
        session.run_with_iobinding(binding, run_options)
        self.results = binding.get_outputs()

    def keep(self, arrays: Sequence[np.ndarray]) -> None:
        """Leave outputs, in the order in which they were bound, where they are to be."""
        results = []
        for (name, bound), array in zip(self.outputs.items(), arrays, strict=True):
            if bound is None:
                results.append(_as_value(array))
                continue
            target = bound.numpy() if isinstance(bound, onnxruntime.OrtValue) else bound
            if target.shape != array.shape or target.dtype != array.dtype:
                raise ValueError(
                    f"output {name} is of shape {array.shape} and {array.dtype}, but is bound to memory of "
                    f"{target.shape} and {target.dtype}"
                )
            if isinstance(bound, onnxruntime.OrtValue):
                bound.update_inplace(np.ascontiguousarray(array))
            else:
                target[...] = array
            results.append(_as_value(bound))
        self.results = results


def _as_value(value: Any) -> onnxruntime.OrtValue:
    if isinstance(value, onnxruntime.OrtValue):
        return value
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)
