"""Session options: copies of a user's for the sub-sessions, and the memory that these share.

A user's own object is never changed.
"""

import functools
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as raised

from nbfftconv.threads import get_num_threads

PROVIDERS = ["CPUExecutionProvider"]
_LEVELS = onnxruntime.GraphOptimizationLevel
BASIC, NONE = _LEVELS.ORT_ENABLE_BASIC, _LEVELS.ORT_DISABLE_ALL
#: What onnxruntime raises for a model that it does not take, and for one with a node that it does not compute.
ERRORS = (
    raised.Fail,
    raised.InvalidArgument,
    raised.InvalidGraph,
    raised.InvalidProtobuf,
    raised.NoSuchFile,
    raised.NotImplemented,
    raised.RuntimeException,
)
NOT_IMPLEMENTED = raised.NotImplemented
#: Entries that hold for parts of a model as for all of it. Entries cannot be listed, only asked for.
_ENTRIES = (
    "mlas.enable_gemm_fastmath_arm64_bfloat16",
    "session.disable_prepacking",
    "session.disable_quant_qdq",
    "session.dynamic_block_base",
    "session.enable_gelu_approximation",
    "session.qdq_matmulnbits_accuracy_level",
    "session.qdqisint8allowed",
    "session.set_denormal_as_zero",
)
_FOLDER = "session.model_external_initializers_file_folder_path"
_FIELDS = (
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "enable_mem_reuse",
    "execution_mode",
    "execution_order",
    "graph_optimization_level",
    "inter_op_num_threads",
    "log_severity_level",
    "log_verbosity_level",
    "logid",
    "use_deterministic_compute",
)


def entry(options: onnxruntime.SessionOptions, key: str) -> str | None:
    """Return an entry of some options; None if it is not set."""
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:
        return None


class Options:
    """What sessions are to be like.

    Parameters
    ----------
    given : onnxruntime.SessionOptions or None
        Of the user.
    threads : int or None
        Of the user.

    Attributes
    ----------
    given : onnxruntime.SessionOptions or None
        As above.
    threads : int
        Of both engines.
    """

    def __init__(self, given: onnxruntime.SessionOptions | None, threads: int | None) -> None:
        self.given = given
        self.threads = threads or (given.intra_op_num_threads if given is not None else 0) or get_num_threads()

    def refusal(self) -> str:
        """Return what a user wants that only one session of the whole model can do; empty if there is nothing."""
        given = self.given
        if given is None:
            return ""
        wants = {
            "it is profiled": given.enable_profiling,
            "its optimized form is written": given.optimized_model_filepath,
            "its threads are shared": not given.use_per_session_threads,
            "it has providers of its own": given.has_providers(),
        }
        return next((text for text, is_wanted in wants.items() if is_wanted), "")

    def plain(self) -> onnxruntime.SessionOptions:
        """Return options for onnxruntime on its own: the user's object where it says all there is to say."""
        if self.given is not None and self.given.intra_op_num_threads == self.threads:
            return self.given
        options = self._copy()
        if self.given is not None:
            for name in ("enable_profiling", "optimized_model_filepath", "profile_file_prefix"):
                setattr(options, name, getattr(self.given, name))
            for key in ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning", _FOLDER):
                self._take(options, key)
        return options

    def session(self, path_or_bytes: Any) -> onnxruntime.InferenceSession:
        """Return a session of onnxruntime on its own; raises what it raises."""
        options = self.plain()
        try:
            return onnxruntime.InferenceSession(path_or_bytes, options, providers=PROVIDERS)
        except ERRORS:
            if self.given is None or options is self.given:
                raise
            # operators that a user registered are in no copy
            return onnxruntime.InferenceSession(path_or_bytes, self.given, providers=PROVIDERS)

    def part(self, folder: str | None, **changes: Any) -> onnxruntime.SessionOptions:
        """Return options for a sub-session, whose weights are in files of a folder, with changes.

        Without a folder they are where the user says, or beside the model. Threads that spin while they wait would take
        the CPUs from the engine whose turn it is.
        """
        options = self._copy()
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
        if folder is None:
            self._take(options, _FOLDER)
        else:
            options.add_session_config_entry(_FOLDER, folder)
        if options.enable_cpu_mem_arena:
            _share_memory()
            options.add_session_config_entry("session.use_env_allocators", "1")
        for name, value in changes.items():
            setattr(options, name, value)
        return options

    def _copy(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        if self.given is not None:
            for name in _FIELDS:
                setattr(options, name, getattr(self.given, name))
            for key in _ENTRIES:
                self._take(options, key)
        options.intra_op_num_threads = self.threads
        return options

    def _take(self, options: onnxruntime.SessionOptions, key: str) -> None:
        value = None if self.given is None else entry(self.given, key)
        if value is not None:
            options.add_session_config_entry(key, value)


@functools.cache
def _share_memory() -> None:
    """Let sub-sessions take their memory from one arena: 20 with 16 MB each kept 1 GB in arenas of their own."""
    arena = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(place, None)
