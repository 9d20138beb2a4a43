"""PyTorch's own samples of its convolutions, which its wheel carries: the same results in both dtypes."""

from __future__ import annotations

import numpy as np
import pytest

import nbfftconv

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest", reason="torch's own tests need it")
# It is of torch's tests, and warns while it is imported.
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")


def as_numpy(value):
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [f"{name}{axes}d" for name in ("conv", "conv_transpose") for axes in (1, 2, 3)])
def test_samples(name, dtype):
    (operator,) = (each for each in invocations.op_db if each.name == f"nn.functional.{name}")
    samples = list(operator.sample_inputs("cpu", getattr(torch, dtype)))
    assert len(samples) >= 10
    for sample in samples:
        expected = as_numpy(operator(sample.input, *sample.args, **sample.kwargs))
        arguments = map(as_numpy, (sample.input, *sample.args))
        found = getattr(nbfftconv, name)(*arguments, **sample.kwargs)
        assert found.shape == expected.shape and found.dtype == expected.dtype, sample
        bound = {"float32": 2e-5, "float64": 1e-12}[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=str(sample))
