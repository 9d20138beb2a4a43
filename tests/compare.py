"""What it means for a result to equal the oracle's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ERROR_BOUND = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}  # of the largest value


def relative_error(actual: NDArray, expected: NDArray[np.float64]) -> float:
    """The largest error, relative to the oracle's largest value; absolute where the oracle is all zeros."""
    scale = np.abs(expected).max(initial=0) or 1.0
    return float(np.abs(actual - expected).max(initial=0) / scale)


def assert_accurate(actual: NDArray, expected: NDArray[np.float64], dtype: Any) -> None:
    """Shape, dtype and every value, all of them finite."""
    assert isinstance(actual, np.ndarray)
    assert actual.shape == expected.shape
    assert actual.dtype == np.dtype(dtype)
    assert np.isfinite(actual).all()
    assert relative_error(actual, expected) <= ERROR_BOUND[actual.dtype]


def assert_accurate_where_finite(actual: NDArray, expected: NDArray[np.float64], dtype: Any) -> None:
    """The same outputs NaN, +inf and -inf as the oracle's, and the others as accurate as ever."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.dtype(dtype)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(actual), kind(expected), err_msg=kind.__name__)
    finite = np.isfinite(expected)
    assert_accurate(actual[finite], expected[finite], dtype)
