"""nbfftconv for Keras 3: models converted by one line, with PyTorch, TensorFlow or JAX behind them.

Needs Keras 3.15 or later and one of these (``pip install nbfftconv[keras]``); the rest of the package never imports it.
"""

import keras as _keras

from nbfftconv.hosts import Choice
from nbfftconv.keras.conversion import Report, convert, report, revert

# Before, transposed convolutions had other edges in PyTorch than in the others.
if tuple(map(int, _keras.__version__.split(".")[:2])) < (3, 15):
    raise ImportError(f"nbfftconv.keras needs Keras 3.15 or later, got {_keras.__version__}")

__all__ = ["Choice", "Report", "convert", "report", "revert"]
