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
    """What a run is to take from where, and to leave where: memory of the caller.

    Of `InferenceSession.io_binding`, with the methods of `onnxruntime.IOBinding`, for the CPU's memory.

    Attributes
    ----------
    inputs : dict from str to numpy.ndarray or onnxruntime.OrtValue
        What was bound.
    outputs : dict from str to numpy.ndarray, onnxruntime.OrtValue or None
        The same; None where memory is made for an output.
    results : list of onnxruntime.OrtValue
        Of the last run, in the order of `outputs`.

    Examples
    --------
    >>> import numpy as np
    >>> import onnx
    >>> from nbfftconv.onnx import InferenceSession
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["" : 17]>
    ...     net (float[N] x) => (float[N] y) { y = Relu (x) }''')
    >>> session = InferenceSession(model.SerializeToString())
    >>> binding, out = session.io_binding(), np.zeros(2, np.float32)
    >>> binding.bind_cpu_input("x", np.array([-3, 4], np.float32))
    >>> binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    >>> session.run_with_iobinding(binding)
    >>> out
    array([0., 4.], dtype=float32)
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.results: list[onnxruntime.OrtValue] = []

    def bind_cpu_input(self, name: str, arr_on_cpu: np.ndarray) -> None:
        """Take an input from an array.

        Parameters
        ----------
        name : str
            Of the input.
        arr_on_cpu : numpy.ndarray
            Its memory is read at each run.
        """
        self.inputs[name] = arr_on_cpu

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        """Take an input from an address.

        Parameters
        ----------
        name : str
            Of the input.
        device_type : str
            "cpu".
        device_id : int
            Of no meaning.
        element_type : dtype or int
            A dtype, or an element type of ONNX.
        shape : sequence of int
            Of the input.
        buffer_ptr : int
            Address of its first element.

        Raises
        ------
        ValueError
            If the memory is not the CPU's.
        """
        _check_device(device_type)
        self.inputs[name] = _array_at(element_type, shape, buffer_ptr)

    def bind_ortvalue_input(self, name: str, ortvalue: onnxruntime.OrtValue) -> None:
        """Take an input from a value of onnxruntime.

        Parameters
        ----------
        name : str
            Of the input.
        ortvalue : onnxruntime.OrtValue
            In the CPU's memory, which is read at each run.
        """
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
        """Leave an output at an address, or in memory that is made for it.

        Parameters
        ----------
        name : str
            Of the output.
        device_type : str, default "cpu"
            "cpu".
        device_id : int, default 0
            Of no meaning.
        element_type : dtype or int, optional
            A dtype, or an element type of ONNX.
        shape : sequence of int, optional
            Of the output.
        buffer_ptr : int, optional
            Address of its first element; with it, the two before have to be given.

        Raises
        ------
        ValueError
            If the memory is not the CPU's, or there is an address without shape or element type.
        """
        _check_device(device_type)
        if buffer_ptr is None:
            self.outputs[name] = None
        elif element_type is None or shape is None:
            raise ValueError("`element_type` and `shape` are to be provided if pre-allocated memory is provided")
        else:
            self.outputs[name] = _array_at(element_type, shape, buffer_ptr)

    def bind_ortvalue_output(self, name: str, ortvalue: onnxruntime.OrtValue) -> None:
        """Leave an output in a value of onnxruntime.

        Parameters
        ----------
        name : str
            Of the output.
        ortvalue : onnxruntime.OrtValue
            In the CPU's memory, of the output's shape and type.
        """
        self.outputs[name] = ortvalue

    def get_outputs(self) -> list[onnxruntime.OrtValue]:
        """Return the outputs of the last run.

        Returns
        -------
        list of onnxruntime.OrtValue
            In the order in which they were bound.
        """
        return list(self.results)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        """Return the outputs of the last run as arrays.

        Returns
        -------
        list of numpy.ndarray
            In the order in which they were bound.
        """
        return [np.array(each.numpy()) for each in self.results]

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


def run_alone(
    binding: IOBinding, session: onnxruntime.InferenceSession, run_options: onnxruntime.RunOptions | None
) -> None:
    """Run a session of onnxruntime with what was bound."""
    own = session.io_binding()
    for name, value in binding.inputs.items():
        if isinstance(value, onnxruntime.OrtValue):
            own.bind_ortvalue_input(name, value)
        else:
            own.bind_cpu_input(name, value)
    for name, value in binding.outputs.items():
        if value is None:
            own.bind_output(name)
        else:
            own.bind_ortvalue_output(name, _as_value(value))
    session.run_with_iobinding(own, run_options)
    binding.results = own.get_outputs()


def keep(binding: IOBinding, arrays: Sequence[np.ndarray]) -> None:
    """Leave outputs, in the order in which they were bound, where they are to be."""
    results = []
    for (name, bound), array in zip(binding.outputs.items(), arrays, strict=True):
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
    binding.results = results


def _as_value(value: Any) -> onnxruntime.OrtValue:
    if isinstance(value, onnxruntime.OrtValue):
        return value
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)
