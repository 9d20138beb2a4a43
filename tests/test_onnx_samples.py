"""The ONNX standard's own tests of Conv and ConvTranspose, which its wheel carries."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import nbfftconv

onnx = pytest.importorskip("onnx")

with warnings.catch_warnings():  # it computes the samples of all operators
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    SAMPLES = [sample for operator in ("Conv", "ConvTranspose") for sample in collect_testcases(operator)]


def same_pads(total: list[int], auto_pad: str) -> tuple[tuple[int, int], ...]:
    """What is padded, or left out, in all along each axis, as ONNX divides it: the odd one at the end, or before."""
    return tuple((n // 2, n - n // 2) if auto_pad == "SAME_UPPER" else (n - n // 2, n // 2) for n in total)


def options_of(node, x, w) -> dict:
    """The arguments of this package for a node."""
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    kernel, axes = w.shape[2:], w.ndim - 2
    stride, dilation = (tuple(attributes.get(name, (1,) * axes)) for name in ("strides", "dilations"))
    options = {"stride": stride, "dilation": dilation, "groups": attributes.get("group", 1)}
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    auto_pad = attributes.get("auto_pad", b"NOTSET").decode()
    ends = attributes.get("pads", (0,) * (2 * axes))
    pads = tuple(zip(ends[:axes], ends[axes:], strict=True))
    if node.op_type == "Conv":
        if auto_pad.startswith("SAME"):
            total = [
                max(0, (-(-n // s) - 1) * s + r + 1 - n) for n, s, r in zip(x.shape[2:], stride, reach, strict=True)
            ]
            pads = same_pads(total, auto_pad)
        return options | {"padding": pads}
    added = tuple(attributes.get("output_padding", (0,) * axes))
    full = [(n - 1) * s + r + 1 for n, s, r in zip(x.shape[2:], stride, reach, strict=True)]
    shape = attributes.get("output_shape")
    if shape is None and auto_pad.startswith("SAME"):
        shape = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
    if shape is not None:
        total = [f + more - n for f, more, n in zip(full, added, shape, strict=True)]
        pads = same_pads([max(0, n) for n in total], auto_pad)
        added = tuple(more + max(0, -n) for more, n in zip(added, total, strict=True))
    return options | {"padding": pads, "output_padding": added}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_node(sample):
    (node,) = sample.model.graph.node
    name = {"Conv": "conv", "ConvTranspose": "conv_transpose"}[node.op_type]
    for (x, w, *bias), (expected,) in sample.data_sets:
        convolve = getattr(nbfftconv, f"{name}{w.ndim - 2}d")
        found = convolve(x, w, *bias, **options_of(node, x, w))
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_there_are_samples():
    assert len(SAMPLES) >= 10
