"""nbfftconv for Keras 3: models converted by one line, with PyTorch, TensorFlow or JAX behind them.

Needs Keras 3 and one of these (``pip install nbfftconv[keras]``); the rest of the package never imports it.
"""

from nbfftconv.hosts import Choice
from nbfftconv.keras.conversion import Report, convert, report, revert

__all__ = ["Choice", "Report", "convert", "report", "revert"]
