"""nbfftconv for ONNX Runtime: sessions that compute convolutions here wherever that is faster.

Needs onnx and onnxruntime (``pip install nbfftconv[onnx]``); the rest of the package never imports it.
"""

from nbfftconv.onnx.binding import IOBinding
from nbfftconv.onnx.report import Choice, Report
from nbfftconv.onnx.session import InferenceSession

__all__ = ["Choice", "IOBinding", "InferenceSession", "Report"]
