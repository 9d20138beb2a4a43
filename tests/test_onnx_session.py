"""Sessions of ONNX models: results, errors and metadata are onnxruntime's, whatever is computed here."""

from __future__ import annotations

import gc
import threading
import warnings

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import nbfftconv  # noqa: E402
from nbfftconv import simd, threads  # noqa: E402
from nbfftconv.onnx import InferenceSession, choice, graph, layers, split  # noqa: E402
from nbfftconv.onnx.graph import captured, needs  # noqa: E402
from nbfftconv.onnx.options import Options  # noqa: E402

with warnings.catch_warnings():  # it computes the samples of all operators
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    SAMPLES = [sample for operator in ("Conv", "ConvTranspose") for sample in collect_testcases(operator)]

NEWEST = min(onnx.defs.onnx_opset_version(), 24)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Let every node be replaced that can be."""
    monkeypatch.setattr(choice, "_GAIN", np.inf)


@pytest.fixture
def never(monkeypatch):
    monkeypatch.setattr(choice, "_GAIN", 0.0)


def plain(model, **fields):
    """Return onnxruntime's session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in fields.items():
        setattr(options, name, value)
    model = model if isinstance(model, (str, bytes)) else model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ours(model, **options):
    given = onnxruntime.SessionOptions()
    given.log_severity_level = 3
    return InferenceSession(model if isinstance(model, (str, bytes)) else model.SerializeToString(), given, **options)


def replaced(session):
    return sum(each.is_replaced for each in session.report.choices.values())


def close(found, expected, bound=1e-5):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1.0, np.abs(b).max(initial=0)))


def check(model, feeds, count, **options):
    """Compare a session with onnxruntime's, at the first run and after it; return it."""
    session, host = ours(model, **options), plain(model)
    expected = host.run(None, feeds)
    for _ in range(2):
        close(session.run(None, feeds), expected)
    assert replaced(session) == count, str(session.report)
    assert [(a.name, a.type, a.shape) for a in session.get_inputs()] == [
        (a.name, a.type, a.shape) for a in host.get_inputs()
    ]
    assert [(a.name, a.type) for a in session.get_outputs()] == [(a.name, a.type) for a in host.get_outputs()]
    return session


def parse(text, opset=17, **weights):
    """Return a model by ONNX's own notation, of constants that are given as arrays."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


NETWORK = """net (float[N, 3, H, W] x) => (float[N, 4] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    n = BatchNormalization (a, scale, shift, mean, var)
    c = Relu (n)
    d = Conv <pads = [2, 2, 2, 2], group = 2> (c, w2)
    e = Add (c, d)
    f = LeakyRelu <alpha = 0.1> (e)
    g = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (f)
    h = ConvTranspose <strides = [2, 2]> (g, w3, b3)
    r = Relu (h)
    p = GlobalAveragePool (r)
    q = Flatten (p)
    y = Softmax (q)
}"""


WEIGHTS = {
    "w1": normal(8, 3, 3, 3), "b1": normal(8), "scale": normal(8), "shift": normal(8), "mean": normal(8),
    "var": np.abs(normal(8)) + 1, "w2": 0.2 * normal(8, 4, 5, 5), "w3": normal(8, 4, 2, 2), "b3": normal(4),
}  # fmt: skip


def network(**options):
    return parse(NETWORK, **WEIGHTS, **options)


X = {"x": normal(2, 3, 20, 24)}


# Nodes -----------------------------------------------------------------------------------------------


def with_constants(model, arrays, kind=None):
    """Return the model of one node, all of whose inputs but the first are constants."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    names = [each.name for each in made.graph.input]
    del made.graph.input[1:]
    made.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in zip(names[1:], arrays[1:], strict=True)
    )
    return made


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_samples_of_onnx(sample):
    for arrays, (expected,) in sample.data_sets:
        model = with_constants(sample.model, arrays)
        feeds = {model.graph.input[0].name: arrays[0]}
        session = check(model, feeds, 1)
        close(session.run(None, feeds), [expected])


def node_model(operator, x_shape, weight, bias=None, dtype=np.float32, opset=17, **attributes):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = [weight] if bias is None else [weight, bias]
    names = ["w", "b"][: len(weights)]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, ["x", *names], ["y"], **attributes)],
            "node",
            [helper.make_tensor_value_info("x", kind, x_shape)],
            [helper.make_tensor_value_info("y", kind, None)],
            [numpy_helper.from_array(array.astype(dtype), name) for array, name in zip(weights, names, strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


GEOMETRIES = [
    ("Conv", (2, 4, 9, 11), (6, 4, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ("Conv", (2, 4, 9, 11), (6, 4, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    ("Conv", (2, 4, 9, 11), (6, 4, 3, 3), {"auto_pad": "VALID", "dilations": [2, 2]}),
    ("Conv", (2, 4, 9, 11), (6, 2, 3, 3), {"pads": [0, 1, 2, 3], "group": 2, "kernel_shape": [3, 3]}),
    ("Conv", (2, 4, 9, 11), (4, 1, 5, 5), {"pads": [2, 2, 2, 2], "group": 4}),
    ("Conv", (2, 4, 30), (6, 4, 5), {"pads": [4, 0], "strides": [2]}),
    ("Conv", (2, 4, 30), (6, 4, 5), {"auto_pad": "SAME_UPPER", "strides": [4]}),
    ("Conv", (1, 2, 5, 6, 7), (3, 2, 3, 3, 3), {"pads": [1, 0, 1, 1, 2, 1], "strides": [1, 2, 1]}),
    ("Conv", (0, 4, 9, 11), (6, 4, 3, 3), {}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 3, 3), {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 3, 3), {"strides": [3, 2], "output_padding": [2, 1], "group": 2}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 4, 4), {"strides": [2, 2], "output_shape": [20, 24]}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 4, 4), {"strides": [2, 2], "output_shape": [17, 19]}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 4, 3), {"strides": [3, 2], "auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", (2, 4, 9, 11), (4, 3, 3, 3), {"dilations": [2, 1], "auto_pad": "VALID"}),
    ("ConvTranspose", (2, 4, 30), (4, 3, 5), {"strides": [3], "pads": [1, 2]}),
    ("ConvTranspose", (1, 2, 5, 6, 7), (2, 3, 2, 2, 2), {"strides": [2, 2, 2]}),
]


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: f"{case[0]} {case[2]}")
def test_geometries(case, is_dynamic):
    operator, shape, weight_shape, attributes = case
    filters = weight_shape[0] if operator == "Conv" else weight_shape[1] * attributes.get("group", 1)
    given = [f"n{axis}" for axis in range(len(shape))] if is_dynamic else shape
    model = node_model(operator, given, normal(*weight_shape), normal(filters), **attributes)
    session = check(model, {"x": normal(*shape)}, 1)
    if is_dynamic:
        larger = shape[0] + 1, shape[1], *(size + 3 for size in shape[2:])
        if "output_shape" not in attributes:
            close(session.run(None, {"x": normal(*larger)}), plain(model).run(None, {"x": normal(*larger)}))


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_what_is_no_convolution_is_onnxruntimes_to_say(operator):
    """Sizes are known at the run only: of other channels, or too small."""
    model = node_model(
        operator, ["n", "c", "h", "w"], normal(4, 4, 5, 5), pads=[4, 4, 4, 4] if operator != "Conv" else [0] * 4
    )
    session, host = ours(model), plain(model)
    close(session.run(None, {"x": normal(1, 4, 9, 9)}), host.run(None, {"x": normal(1, 4, 9, 9)}))
    for shape in (1, 3, 9, 9), (1, 4, 2, 2):
        errors = []
        for each in session, host:
            with pytest.raises(Exception) as info:
                each.run(None, {"x": normal(*shape)})
            errors.append(info.type)
        assert errors[0] is errors[1]


# Models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 15, 17, 19, 21, NEWEST])
def test_opsets(opset):
    check(network(opset=opset), X, 3)


def test_a_relu_that_others_need_as_well_is_not_fused_away():
    model = parse(
        """net (float[N, 2, H, W] x) => (float[N, 2, H, W] y, float[N, 2, H, W] z, float[N, 2, H, W] r) {
            y = Conv <pads = [1, 1, 1, 1]> (x, w)
            z = Relu (y)
            s = Conv <pads = [1, 1, 1, 1]> (z, w)
            r = Relu (s)
        }""",
        w=normal(2, 2, 3, 3),
    )
    session = check(model, {"x": normal(1, 2, 7, 8)}, 2)
    (z,) = session.run(["z"], {"x": normal(1, 2, 7, 8)})
    close([z], plain(model).run(["z"], {"x": normal(1, 2, 7, 8)}))


def test_dynamic_shapes():
    session = check(network(), X, 3)
    host = plain(network())
    for seed, shape in enumerate([(1, 3, 8, 8), (3, 3, 33, 17), (2, 3, 20, 24), (1, 3, 4, 90)]):
        feeds = {"x": normal(*shape, seed=seed)}
        close(session.run(None, feeds), host.run(None, feeds))


def test_static_shapes_are_decided_on_at_once():
    model = network()
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, X["x"].shape, strict=True):
        dimension.dim_value = size
    assert replaced(ours(model)) == 3
    check(model, X, 3)


def test_measured():
    model = node_model("Conv", ["n", 8, "h", "w"], normal(8, 8, 31, 31), pads=[15] * 4)  # 20 times as fast
    assert " times as fast, measured" in check(model, {"x": normal(1, 8, 64, 64)}, 1, measure=True).report.why
    session = ours(network(), measure=True)
    for _ in range(2):
        close(session.run(None, X), plain(network()).run(None, X))
    report = session.report
    assert report.host > 0 and report.ours > 0 and "measured" in str(report)
    assert all(each.host > 0 and each.ours > 0 for each in report.choices.values())


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("measure", [False, True])
def test_nothing_is_replaced(measure):
    session = check(network(), X, 0, measure=measure)
    assert "onnxruntime runs it alone" in session.report.why
    assert {each.is_replaced for each in session.report.choices.values()} == {False}


def test_no_convolutions():
    model = parse("net (float[N] x) => (float[N] y) { y = Relu (x) }")
    session = check(model, {"x": normal(3)}, 0)
    assert str(session.report) == "onnxruntime runs it alone: it has no convolutions"


CONTROL = """net (float[N, 2, H, W] x, bool is_first) => (float[N, 2, H, W] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    d = If (is_first) <
        then_branch = first () => (float[N, 2, H, W] t) { t = Conv <pads = [1, 1, 1, 1]> (c, w) },
        else_branch = second () => (float[N, 2, H, W] e) { e = Add (c, x) }
    >
    y = Conv <pads = [1, 1, 1, 1]> (d, w)
}"""


@pytest.mark.parametrize("is_first", [False, True])
def test_if(is_first):
    feeds = {"x": normal(1, 2, 9, 8), "is_first": np.array(is_first)}
    session = check(parse(CONTROL, w=normal(2, 2, 3, 3)), feeds, 2)
    feeds["is_first"] = np.array(not is_first)
    close(session.run(None, feeds), plain(parse(CONTROL, w=normal(2, 2, 3, 3))).run(None, feeds))


def test_loop():
    model = parse(
        """net (float[N, 2, H, W] x, int64 count) => (float[N, 2, H, W] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            go = Constant <value = bool {1}> ()
            d = Loop (count, go, c) <
                body = step (int64 i, bool before, float[N, 2, H, W] s)
                    => (bool after, float[N, 2, H, W] t) {
                    after = Identity (before)
                    u = Conv <pads = [1, 1, 1, 1]> (s, w)
                    t = Add (u, c)
                }
            >
            y = Conv <pads = [1, 1, 1, 1]> (d, w)
        }""",
        w=0.3 * normal(2, 2, 3, 3),
    )
    for count in 3, 0:
        check(model, {"x": normal(1, 2, 9, 8), "count": np.array(count)}, 2)


def test_what_subgraphs_take_from_around_them():
    model = parse(CONTROL, w=normal(2, 2, 3, 3))
    branch = model.graph.node[1]
    assert needs(branch) == {"is_first", "c", "w", "x"}
    assert captured(branch.attribute[0].g) <= {"c", "w", "x"}


def test_shared_weights():
    """Of two nodes of other strides, and of another operator."""
    model = parse(
        """net (float[N, 2, H, W] x) => (float[N, 2, A, B] y, float[2, 2, 3, 3] w) {
            a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
            c = Conv <pads = [1, 1, 1, 1]> (a, w, b)
            d = ConvTranspose (c, w, b)
            s = ReduceSum <keepdims = 0> (w)
            y = Mul (d, s)
        }""",
        w=normal(2, 2, 3, 3),
        b=normal(2),
    )
    check(model, {"x": normal(1, 2, 9, 8)}, 3)


def test_outputs_are_the_callers():
    """Also those that are an input or a constant: what is done to them changes no later run."""
    model = parse(
        "net (float[1, 2, 8, 8] x) => (float[1, 2, 8, 8] y, float[1, 2, 8, 8] z, float[2, 2, 1, 1] v) "
        "{ y = Conv (x, w) z = Identity (x) v = Identity (w) }",
        w=normal(2, 2, 1, 1),
    )
    feeds = {"x": normal(1, 2, 8, 8)}
    session = check(model, feeds, 1)
    first = session.run(None, feeds)
    expected = [each.copy() for each in first]
    for each in first:
        assert not np.shares_memory(each, feeds["x"])
        each[...] = 7
    close(session.run(None, feeds), expected, 0)


def test_weights_that_are_inputs():
    model = parse("net (float[N, 2, H, W] x, float[3, 2, 3, 3] w) => (float[N, 3, A, B] y) { y = Conv (x, w) }")
    session = check(model, {"x": normal(1, 2, 9, 8), "w": normal(3, 2, 3, 3)}, 0)
    assert session.report.choices["Conv_0"].why == "its weights are no constants"


def test_constants_that_may_be_given():
    """A weight that has a value and is an input as well; by version 3 of the format all weights were, and none may."""
    model = parse(
        "net (float[N, 2, H, W] x, float[2, 2, 3, 3] w, float[2] b) => (float[N, 2, A, B] y) "
        "{ c = Conv (x, w, b) y = Conv (c, v) }",
        w=normal(2, 2, 3, 3),
        b=normal(2),
        v=normal(2, 2, 3, 3),
    )
    feeds = {"x": normal(1, 2, 9, 8)}
    session = check(model, feeds, 1)
    assert [each.name for each in session.get_overridable_initializers()] == ["w", "b"]
    given = feeds | {"w": normal(2, 2, 3, 3, seed=4)}
    close(session.run(None, given), plain(model).run(None, given))
    close(session.run(None, feeds), plain(model).run(None, feeds))
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, 2, 3, 3]))
    check(model, feeds, 2)


def test_external_data(tmp_path):
    path = str(tmp_path / "model.onnx")
    onnx.save(network(), path, save_as_external_data=True, location="weights", size_threshold=0)
    check(path, X, 3)


def test_bytes_and_paths(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    expected = plain(network()).run(None, X)
    close(InferenceSession(path).run(None, X), expected)
    close(InferenceSession(str(path)).run(None, X), expected)


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = ours(network())
    assert list(tmp_path.iterdir())
    session.run(None, X)
    assert not list(tmp_path.iterdir())
    session = ours(network())
    del session
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_float64(operator):
    """onnxruntime has no such convolution: its errors are those of its session, and ours are right."""
    w, b, x = normal(3, 3, 3, 3, dtype=np.float64), normal(3, dtype=np.float64), normal(2, 3, 9, 8, dtype=np.float64)
    model = node_model(operator, ["n", 3, "h", "w"], w, b, np.float64, pads=[1, 1, 1, 1])
    model.graph.node.append(helper.make_node("Mul", ["y", "two"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2.0), "two"))
    model.graph.output[0].name = "z"
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        plain(model)
    session = ours(model)
    convolve = {"Conv": nbfftconv.conv2d, "ConvTranspose": nbfftconv.conv_transpose2d}[operator]
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, 2 * convolve(x, w, b, padding=1), rtol=0, atol=1e-12)
    assert replaced(session) == 1 and [each.shape for each in session.get_inputs()] == [["n", 3, "h", "w"]]
    with pytest.raises(Exception, match="Unexpected input data type"):
        session.run(None, {"x": x.astype(np.float32)})


def test_float16_is_onnxruntimes():
    model = node_model("Conv", ["n", 3, "h", "w"], normal(3, 3, 3, 3), dtype=np.float16)
    check(model, {"x": normal(1, 3, 9, 8, dtype=np.float16)}, 0)


def test_sequences_stay_with_onnxruntime():
    """What is no tensor lives within a part; where it would have to leave one, the whole model is onnxruntime's."""
    model = parse(
        """net (float[2, 2, 8, 8] x) => (float[2, 2, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            s = SplitToSequence <axis = 0> (c)
            t = ConcatFromSequence <axis = 0> (s)
            y = Conv <pads = [1, 1, 1, 1]> (t, w)
        }""",
        w=normal(2, 2, 3, 3),
    )
    check(model, {"x": normal(2, 2, 8, 8)}, 2)
    crossing = parse(
        """net (float[2, 2, 8, 8] x) => (float[2, 2, 8, 8] y, float[2, 2, 8, 8] z) {
            s = SplitToSequence <axis = 0> (x)
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            n = ReduceMax <keepdims = 0> (c)
            i = Cast <to = 7> (n)
            o = Sub (i, i)
            p = SequenceAt (s, o)
            y = Add (c, p)
            z = ConcatFromSequence <axis = 0> (s)
        }""",
        w=normal(2, 2, 3, 3),
    )
    session = check(crossing, {"x": normal(2, 2, 8, 8)}, 0)
    assert "no tensor" in session.report.why


def test_functions_of_a_model():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        net (float[N, 2, H, W] x, float[2, 2, 3, 3] w) => (float[N, 2, A, B] y) { y = own.twice (x, w) }
        <opset_import: ["" : 17], domain: "own">
        twice (x, w) => (y) { c = Conv (x, w) y = Conv (c, w) }"""
    )
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(normal(2, 2, 3, 3), "w"))
    check(model, {"x": normal(1, 2, 9, 8)}, 2)


def test_a_model_that_was_optimized_before(tmp_path):
    """With onnxruntime's fused nodes: those with a ReLU are computed here."""
    path = str(tmp_path / "optimized.onnx")
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    plain(network(), graph_optimization_level=level, optimized_model_filepath=path)
    assert "FusedConv" in {node.op_type for node in onnx.load(path).graph.node}
    check(path, X, 3)


# Calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (None, {}),
        (None, {"x": X["x"], "more": X["x"]}),
        (None, {"x": X["x"].astype(np.float64)}),
        (None, {"x": X["x"][0]}),
        (None, {"x": X["x"][:, :2]}),
        (["nothing"], X),
        (["y", "nothing"], X),
        ("y", X),
        (None, [1]),
        (None, {"x": "text"}),
    ],
    ids=[
        "none",
        "one more",
        "float64",
        "no batch",
        "channels",
        "output",
        "outputs",
        "output as text",
        "list",
        "text",
    ],  # fmt: skip
)
@pytest.mark.parametrize("is_decided", [False, True])
def test_wrong_calls(arguments, is_decided):
    session, host = ours(network()), plain(network())
    if is_decided:
        session.run(None, X)
    errors = []
    for each in session, host:
        try:
            errors.append([*map(np.shape, each.run(*arguments))])
        except Exception as error:
            errors.append((type(error), str(error)[:60]))  # then, where arrays are in memory
    assert errors[0] == errors[1]
    close(session.run(None, X), host.run(None, X))


def test_wrong_models(tmp_path):
    (tmp_path / "text.onnx").write_text("text")
    for model in b"", b"nothing", str(tmp_path / "absent.onnx"), str(tmp_path / "text.onnx"), 5, None:
        errors = []
        for kind in InferenceSession, onnxruntime.InferenceSession:
            with pytest.raises(Exception) as info:
                kind(model)
            errors.append((info.type, str(info.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threads": 0}, ValueError),
        ({"threads": 1.5}, TypeError),
        ({"measure": 1}, TypeError),
        ({"sess_options": {}}, TypeError),
    ],
)
def test_wrong_options(options, error):
    with pytest.raises(error):
        InferenceSession(network().SerializeToString(), **options)


def test_inputs_of_other_kinds():
    """Lists, values of onnxruntime, arrays that are not contiguous."""
    session, host = ours(network()), plain(network())
    x = normal(2, 20, 24, 3).transpose(0, 3, 1, 2)
    for value in X["x"].tolist(), onnxruntime.OrtValue.ortvalue_from_numpy(X["x"]), x, x[::-1]:
        close(session.run(None, {"x": value}), host.run(None, {"x": value}))


@pytest.mark.parametrize("way", ["computed here", "onnxruntime", "undecided"])
def test_binding(way, monkeypatch):
    if way == "onnxruntime":
        monkeypatch.setattr(choice, "_GAIN", 0.0)
    session, (expected,) = ours(network()), plain(network()).run(None, X)
    if way != "undecided":
        session.run(None, X)
    x = X["x"].copy()
    out = np.zeros_like(expected)
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    close(binding.copy_outputs_to_cpu(), [expected])
    binding.clear_binding_inputs()
    binding.clear_binding_outputs()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    session.run_with_iobinding(binding)
    close([out], [expected])
    assert binding.get_outputs()[0].data_ptr() == out.ctypes.data
    x *= 2
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(expected))
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", value)
    session.run_with_iobinding(binding)
    close([value.numpy()], plain(network()).run(None, {"x": x}))
    (found,) = session.run_with_ort_values(["y"], {"x": onnxruntime.OrtValue.ortvalue_from_numpy(x)})
    close([found.numpy()], [value.numpy()], 0)
    with pytest.raises(TypeError):
        session.run_with_iobinding(onnxruntime.IOBinding(plain(network())))
    with pytest.raises(ValueError):
        binding.bind_output("y", "cuda")


def test_binding_to_memory_of_another_shape():
    session = ours(network())
    binding = session.io_binding()
    binding.bind_cpu_input("x", X["x"])
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((2, 5), np.float32)))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        session.run_with_iobinding(binding)


def test_metadata():
    model = network()
    model.producer_name, model.model_version, model.doc_string, model.domain = "who", 7, "what", "where"
    helper.set_model_props(model, {"key": "value"})
    model.graph.doc_string = "of the graph"
    names = (
        "producer_name",
        "version",
        "description",
        "domain",
        "custom_metadata_map",
        "graph_name",
        "graph_description",
    )
    session = ours(model)
    session.run(None, X)
    found, expected = session.get_modelmeta(), plain(model).get_modelmeta()
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_many_threads_at_once():
    session, host = ours(network()), plain(network())
    inputs = [{"x": normal(1 + seed % 3, 3, 16 + seed, 20, seed=seed)} for seed in range(8)]
    expected = [host.run(None, feeds) for feeds in inputs]
    errors = []

    def work(turn):
        try:
            for index in range(12):
                which = (index + turn) % len(inputs)
                close(session.run(None, inputs[which]), expected[which])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(turn,)) for turn in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


def test_threads(restore_threads):
    nbfftconv.set_num_threads(1)
    given = onnxruntime.SessionOptions()
    assert Options(None, None).threads == 1 and Options(given, 2).threads == 2
    given.intra_op_num_threads = 3
    assert Options(given, None).threads == 3 and Options(given, 2).threads == 2
    seen = []
    original = threads.get_workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "get_workers", lambda *rest: seen.append(threads.get_num_threads()) or original(*rest))
        ours(network(), threads=2).run(None, X)
    assert set(seen) == {2} and threads.get_num_threads() == 1


def test_there_are_no_more_threads_than_needed(monkeypatch):
    """A pool for each part; light parts have none where there would be too many."""
    made = []
    start = graph.Graph._start
    monkeypatch.setattr(
        graph.Graph, "_start", staticmethod(lambda *rest: made.append(rest[1].intra_op_num_threads) or start(*rest))
    )
    model = parse(
        """net (float[N, 2, H, W] x) => (float[N, 2, H, W] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            b = Sigmoid (a)
            c = Conv <pads = [1, 1, 1, 1]> (b, w)
            y = Softmax (c)
        }""",
        w=normal(2, 2, 3, 3),
    )
    feeds = {"x": normal(1, 2, 9, 8)}
    for most, light in ((256, 2), (0, 1)):
        monkeypatch.setattr(split, "_MOST_THREADS", most)
        session = ours(model, threads=2)
        made.clear()
        close(session.run(None, feeds), plain(model).run(None, feeds))
        assert sorted(made[-2:]) == [light, 2]


def test_sessions_of_splits_that_lost_are_gone():
    engines = split.Engines(graph.Graph.optimized(network().SerializeToString(), Options(None, 1)))
    possible = [each.node for each in engines.graph.candidates]
    kept = engines.split(possible[:1])
    count = len(engines._sessions)
    other = engines.split(possible)
    assert len(engines._sessions) > count
    del other
    gc.collect()
    assert len(engines._sessions) == count
    close(kept.run(["y"], X), plain(network()).run(None, X))


def test_options_are_not_changed():
    given = onnxruntime.SessionOptions()
    given.log_severity_level = 3
    session = InferenceSession(network().SerializeToString(), given, threads=2)
    session.run(None, X)
    assert session.get_session_options() is given and given.intra_op_num_threads == 0
    with pytest.raises(RuntimeError):
        given.get_session_config_entry("session.intra_op.allow_spinning")


def test_profiled_sessions_are_onnxruntimes(tmp_path):
    given = onnxruntime.SessionOptions()
    given.enable_profiling, given.profile_file_prefix = True, str(tmp_path / "profile")
    session = InferenceSession(network().SerializeToString(), given)
    session.run(None, X)
    assert session.end_profiling().startswith(str(tmp_path)) and "profiled" in session.report.why


def test_onnxruntime_computes_few_filters_like_many():
    """By as many as a vector has lanes, in the model of its time."""
    lanes, seconds = simd.lanes(np.float32), {}
    for filters in (1, lanes, 4 * lanes):
        node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[3, 3, 3, 3])
        convolution = layers.Convolution(node, np.ones((filters, 64, 7, 7), np.float32), None, clips=False)
        seconds[filters] = choice._host_seconds(convolution, (1, 64, 128, 128), 1)
    assert seconds[1] == seconds[lanes] < seconds[4 * lanes] < 4 * seconds[lanes]
