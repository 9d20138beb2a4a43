"""InferenceSession: an ONNX model, run by onnxruntime and this package, as onnxruntime's own class would."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import helper

from nbfftconv.forking import fork_safe_lock
from nbfftconv.geometry import check_flag, integer
from nbfftconv.onnx import choice
from nbfftconv.onnx.binding import IOBinding, keep, run_alone
from nbfftconv.onnx.graph import TYPES, CannotSplit, Graph, has_convolutions, read
from nbfftconv.onnx.options import ERRORS, NOT_IMPLEMENTED, Options
from nbfftconv.onnx.report import Report
from nbfftconv.onnx.split import Engines, Split

#: What looking at a model may raise. Then it is onnxruntime's, which says what is wrong, or runs it all the same.
_REFUSALS = CannotSplit, OSError, ValueError, DecodeError, *ERRORS

#: Of all sessions, since races at the same time would disturb each other.
_deciding = fork_safe_lock()


class InferenceSession:
    """An ONNX model whose convolutions are computed here wherever that is faster; all else is onnxruntime's.

    It has the methods of `onnxruntime.InferenceSession`, results that agree with it up to rounding, and its errors.

    Parameters
    ----------
    path_or_bytes : str, path-like or bytes
        As of onnxruntime.
    sess_options : onnxruntime.SessionOptions, optional
        As of onnxruntime; not changed.
    measure : bool, default False
        Race the network, with more and with fewer nodes computed here, on the inputs of the first run, which then takes
        some seconds; else models of the time of both engines decide, when the session is made, or, if sizes of inputs
        are not known then, at the first run.
    threads : int, optional
        Of both engines; those of `sess_options`, or of `nbfftconv.get_num_threads` if these are 0.

    Raises
    ------
    TypeError
        If `measure` is no bool, `threads` no integer, or `sess_options` are none of onnxruntime.
    ValueError
        If `threads` is less than 1.

    Notes
    -----
    Whatever onnxruntime raises for a model or an input is raised here, too. Any number of threads may run a session at
    once. Convolutions in subgraphs of control flow, and those whose weights are inputs, are onnxruntime's.

    Examples
    --------
    >>> import numpy as np
    >>> import onnx
    >>> from nbfftconv.onnx import InferenceSession
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["" : 17]>
    ...     net (float[N, 1, H, W] x) => (float[N, 1, H, W] y)
    ...         <int64[4] size = {1, 1, 5, 5}> {
    ...         w = ConstantOfShape <value: tensor = float[1] {0.04}> (size)
    ...         y = Conv <auto_pad = "SAME_UPPER"> (x, w)
    ...     }''')
    >>> session = InferenceSession(model.SerializeToString())
    >>> (y,) = session.run(None, {"x": np.ones((1, 1, 8, 8), np.float32)})
    >>> y.shape, round(float(y[0, 0, 4, 4]), 5)
    ((1, 1, 8, 8), 1.0)
    >>> list(session.report.choices)
    ['Conv_0']
    """

    def __init__(
        self,
        path_or_bytes: str | bytes | os.PathLike,
        sess_options: onnxruntime.SessionOptions | None = None,
        *,
        measure: bool = False,
        threads: int | None = None,
    ) -> None:
        check_flag("measure", measure)
        if threads is not None:
            integer("threads", threads, 1)
        if sess_options is not None and not isinstance(sess_options, onnxruntime.SessionOptions):
            raise TypeError(f"sess_options must be onnxruntime.SessionOptions, got {type(sess_options).__name__}")
        self._options, self._measure = Options(sess_options, threads), measure
        # One of these once it is decided: onnxruntime alone, or both engines. Before that, what is to decide on.
        self._plain: onnxruntime.InferenceSession | None = None
        self._split: Split | None = None
        self._undecided: Engines | None = None
        self._report = Report({}, "is decided on at the first run")
        refusal = self._open(path_or_bytes)
        if refusal:
            self._plain = self._options.session(path_or_bytes)
            self._face, self._report = self._plain, Report({}, f"onnxruntime runs it alone: {refusal}")
        given = self._face.get_inputs()
        self._required = frozenset(each.name for each in given)
        self._inputs = {each.name: _Input.of(each) for each in (*given, *self._face.get_overridable_initializers())}
        self._outputs = [each.name for each in self._face.get_outputs()]

    @property
    def report(self) -> Report:
        """What was chosen for each convolution, and why; as text, a table."""
        return self._report

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, Any],
        run_options: onnxruntime.RunOptions | None = None,
    ) -> list[Any]:
        """Compute outputs, as `onnxruntime.InferenceSession.run` does.

        Parameters
        ----------
        output_names : sequence of str or None
            All if it is None or empty.
        input_feed : dict from str to array_like
            Inputs by their names.
        run_options : onnxruntime.RunOptions, optional
            As of onnxruntime, for each of its parts of the model.

        Returns
        -------
        list
            The outputs, in the order of the names.
        """
        if self._plain is None:
            names = output_names or self._outputs
            feeds = self._as_arrays(names, input_feed)
            if feeds is None:  # onnxruntime says what is wrong, or knows what to do with it
                return self._face.run(output_names, input_feed, run_options)
            if self._split is None:
                self._decide(feeds)
            if self._split is not None:
                return self._split.run(names, feeds, run_options)
        assert self._plain is not None
        return self._plain.run(output_names, input_feed, run_options)

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: dict[str, onnxruntime.OrtValue],
        run_options: onnxruntime.RunOptions | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """Compute outputs as values of onnxruntime, from such values.

        Parameters
        ----------
        output_names : sequence of str or None
            All if it is None or empty.
        input_dict_ort_values : dict from str to onnxruntime.OrtValue
            Inputs by their names, in the CPU's memory.
        run_options : onnxruntime.RunOptions, optional
            As of onnxruntime.

        Returns
        -------
        list of onnxruntime.OrtValue
            The outputs, in the order of the names.
        """
        binding = self.io_binding()
        for name, value in input_dict_ort_values.items():
            binding.bind_ortvalue_input(name, value)
        for name in output_names or self._outputs:
            binding.bind_output(name)
        self.run_with_iobinding(binding, run_options)
        return binding.get_outputs()

    def io_binding(self) -> IOBinding:
        """Return what binds inputs and outputs to memory of the caller.

        Returns
        -------
        IOBinding
            With the methods of `onnxruntime.IOBinding`, for the CPU's memory.
        """
        return IOBinding()

    def run_with_iobinding(self, iobinding: IOBinding, run_options: onnxruntime.RunOptions | None = None) -> None:
        """Compute the outputs that are bound from the inputs that are.

        Parameters
        ----------
        iobinding : IOBinding
            Of `io_binding`. Outputs that nodes of onnxruntime or of this package made elsewhere are copied to the
            memory that they are bound to.
        run_options : onnxruntime.RunOptions, optional
            As of onnxruntime.

        Raises
        ------
        TypeError
            If `iobinding` is not of `io_binding`.
        ValueError
            If an output is bound to memory of another shape or dtype.
        """
        if not isinstance(iobinding, IOBinding):
            raise TypeError(f"iobinding must be of io_binding(), got {type(iobinding).__name__}")
        if self._plain is None:
            names = list(iobinding.outputs)
            feeds = self._as_arrays(names, iobinding.inputs)
            if feeds is not None and self._split is None:
                self._decide(feeds)
            if feeds is not None and self._split is not None:
                keep(iobinding, self._split.run(names, feeds, run_options))
                return
        run_alone(iobinding, self._plain or self._face, run_options)

    def get_inputs(self) -> Sequence[Any]:
        """Return what the inputs are.

        Returns
        -------
        sequence of onnxruntime.NodeArg
            As of onnxruntime.
        """
        return self._face.get_inputs()

    def get_outputs(self) -> Sequence[Any]:
        """Return what the outputs are.

        Returns
        -------
        sequence of onnxruntime.NodeArg
            As of onnxruntime.
        """
        return self._face.get_outputs()

    def get_overridable_initializers(self) -> Sequence[Any]:
        """Return constants that may be given as inputs.

        Returns
        -------
        sequence of onnxruntime.NodeArg
            As of onnxruntime.
        """
        return self._face.get_overridable_initializers()

    def get_modelmeta(self) -> Any:
        """Return what the model says of itself.

        Returns
        -------
        onnxruntime.ModelMetadata
            As of onnxruntime.
        """
        return self._face.get_modelmeta()

    def get_providers(self) -> list[str]:
        """Return the execution providers.

        Returns
        -------
        list of str
            That of the CPU.
        """
        return list(self._face.get_providers())

    def get_session_options(self) -> onnxruntime.SessionOptions:
        """Return the options.

        Returns
        -------
        onnxruntime.SessionOptions
            Those that were given, or onnxruntime's.
        """
        return self._options.given or self._face.get_session_options()

    def end_profiling(self) -> str:
        """End a profile, as of a session whose options ask for one; such a session is all onnxruntime's.

        Returns
        -------
        str
            The file.
        """
        return str(self._face.end_profiling())

    def _open(self, path_or_bytes: Any) -> str:
        """Look at a model, and decide on it if that can be done already; return why onnxruntime has to run it alone."""
        if not isinstance(path_or_bytes, (str, bytes, os.PathLike)):
            return "it is no model"
        try:
            if refusal := self._options.refusal():
                return refusal
            if not has_convolutions(read(path_or_bytes)):
                return "it has no convolutions"
            try:
                engines = Engines(Graph.optimized(path_or_bytes, self._options))
            except NOT_IMPLEMENTED:  # it has no convolutions of float64
                engines = Engines(Graph.as_written(path_or_bytes, self._options))
                self._face = engines.graph.stand_in()
                self._settle(engines, choice.forced(engines))
                return ""
            if all(each.why_not for each in engines.graph.candidates):
                self._settle(engines, choice.whole(engines.graph, "no convolution can be computed here"))
                return ""
            self._face = engines.graph.face()
            shapes = None if self._measure else engines.graph.static_shapes()
            if shapes is None:
                self._undecided = engines
            else:
                self._settle(engines, choice.by_model(engines, shapes))
        except _REFUSALS as error:
            return str(error)
        return ""

    def _decide(
        self, feeds: dict[str, np.ndarray], progress: choice.Progress = choice.quiet, writes_plans: bool = False
    ) -> None:
        """Decide on a model at its first run; before, on request, on the plans of its convolutions."""
        with _deciding:
            engines = self._undecided
            if engines is None:  # another thread was first
                return
            if writes_plans:
                choice.race_plans(engines, feeds, progress)
            if self._measure:
                plain = engines.graph.plain()
                self._settle(engines, choice.by_race(engines, plain, feeds, progress))
            else:
                self._settle(engines, choice.by_model(engines, engines.graph.shapes(feeds)))

    def _settle(self, engines: Engines, chosen: tuple[Split | None, Report]) -> None:
        """Take a choice; the files of the model are needed no more."""
        split, self._report = chosen
        if split is None:
            self._plain = self._face = engines.graph.plain()
        self._split, self._undecided = split, None
        engines.graph.close()

    def _as_arrays(self, names: Sequence[str], given: dict[str, Any]) -> dict[str, np.ndarray] | None:
        """Return inputs as arrays; None if onnxruntime would not take them, or is better asked."""
        if (
            isinstance(names, str)
            or not isinstance(given, dict)
            or not self._required <= given.keys()
            or not set(names).issubset(self._outputs)
        ):
            return None
        feeds = {}
        for name, value in given.items():
            if isinstance(value, onnxruntime.OrtValue):
                value = value.numpy()
            expected = self._inputs.get(name)
            if expected is None or not isinstance(value, np.ndarray) or not expected.takes(value):
                return None
            feeds[name] = value
        return feeds


def dtype_of(kind: str) -> np.dtype | None:
    """Return the dtype of a type by onnxruntime's name for it; None if NumPy has none."""
    found = TYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    return None if found is None else np.dtype(helper.tensor_dtype_to_np_dtype(found))


class _Input(NamedTuple):
    """What an input has to be: its dtype, None if that is none of NumPy's; and its sizes, None for any."""

    dtype: np.dtype | None
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, argument: Any) -> "_Input":
        """Return what onnxruntime's description of an input says."""
        return cls(dtype_of(argument.type), tuple(size if isinstance(size, int) else None for size in argument.shape))

    def takes(self, value: np.ndarray) -> bool:
        """Return whether an array is that."""
        if value.dtype != self.dtype or value.ndim != len(self.shape):
            return False
        return all(size is None or size == n for n, size in zip(value.shape, self.shape, strict=True))
