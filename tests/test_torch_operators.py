"""Operators of PyTorch: its own checks of them, its own samples, and what a good citizen does."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest", reason="torch's own tests need it")
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")

nt = pytest.importorskip("nbfftconv.torch")
from torch import library  # noqa: E402

from nbfftconv.torch import kept_weights, operators, ready_calls  # noqa: E402

OPERATORS = torch.ops.nbfftconv
NAMES = [f"{name}{axes}d" for name in ("conv", "conv_transpose") for axes in (1, 2, 3)]

#: Spatial size, kernel, stride, padding before and after each axis, dilation; groups.
GEOMETRIES = [
    ((7,), (3,), (1,), (1, 1), (1,), 1),
    ((9,), (2,), (2,), (1, 0), (1,), 2),
    ((6, 7), (3, 2), (1, 1), (1, 0, 0, 1), (1, 2), 1),
    ((5, 5), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2),
    ((3, 4, 5), (2, 2, 3), (1, 2, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1), 1),
]


def arguments(geometry, dtype, rng, last=False):
    """Input, weight, bias, a gradient, and the numbers."""
    space, kernel, *numbers, groups = geometry
    x, w = rng.standard_normal((2, 4, *space)), rng.standard_normal((6, 4 // groups, *kernel))
    tensors = [torch.from_numpy(each).to(dtype) for each in (x, w, rng.standard_normal(6))]
    if last:
        tensors[0] = tensors[0].to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[tensors[0].dim()])
    numbers = [*map(list, numbers), groups]
    y = OPERATORS.convolution(*tensors, *numbers, False)
    g = torch.from_numpy(rng.standard_normal(tuple(y.shape))).to(dtype)
    return *tensors, g, numbers


def calls(geometry, dtype, rng, last=False):
    """Each operator with its arguments."""
    x, w, b, g, numbers = arguments(geometry, dtype, rng, last)
    return [
        (OPERATORS.convolution, (x, w, b, *numbers, False)),
        (OPERATORS.convolution, (x, w, None, *numbers, True)),
        (OPERATORS.convolution_input, (list(x.shape), w, g, torch.ones(4, dtype=dtype), *numbers)),
        (OPERATORS.convolution_weight, (x, list(w.shape), g, *numbers)),
    ]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(geometry, requires_grad, rng):
    last = [False] if len(geometry[0]) == 1 else [False, True]
    for is_last in last:
        for operator, given in calls(geometry, torch.float32, rng, is_last):
            given = [each.requires_grad_(requires_grad) if isinstance(each, torch.Tensor) else each for each in given]
            library.opcheck(operator.default, tuple(given))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_derivatives_of_first_and_second_order(geometry, rng):
    for operator, given in calls(geometry, torch.float64, rng):
        places = [i for i, each in enumerate(given) if isinstance(each, torch.Tensor)]

        def function(*tensors, operator=operator, given=given, places=places):
            filled = list(given)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return operator(*filled)

        tensors = [given[place].clone().requires_grad_() for place in places]
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def compare(found, expected, bound):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    limit = bound * max(1e-30, float(expected.detach().abs().max())) if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_and_their_gradients(name, dtype):
    (operator,) = (each for each in invocations.op_db if each.name == f"nn.functional.{name}")
    if not operator.supports_dtype(dtype, "cpu"):
        pytest.skip("PyTorch has none")
    bound = {torch.float32: 2e-5, torch.float64: 1e-12}.get(dtype, 0)
    for sample in operator.sample_inputs("cpu", dtype, requires_grad=True):
        results = []
        for function in (operator, getattr(nt, name)):
            arguments = [sample.input, *sample.args]
            inputs = [each for each in arguments if isinstance(each, torch.Tensor)]
            y = function(*arguments, **sample.kwargs)
            results.append((y, *torch.autograd.grad(y.sum().abs() if y.is_complex() else (y * y).sum(), inputs)))
        for found, expected in zip(*reversed(results), strict=True):
            compare(found, expected, bound)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_pytorch(name):
    x, w = torch.ones(1, 4, *[5] * int(name[-2])), torch.ones(4, 4, *[3] * int(name[-2]))
    wrong = [
        (x, w, torch.ones(3)), (x, torch.ones(4, 3, *w.shape[2:])), (x[0, 0], w), (x, w, None, 0), (x, w, None, 1, -1),
        (x, w.double()), (x, w, None, (1, 1, 1, 1)), (x, w, None, 1, "other"), (x, w[0]), (x, w, None, 1, 0, 1, 3),
    ]  # fmt: skip
    tried = 0
    for given in wrong:
        try:
            getattr(torch.nn.functional, name)(*given)
        except Exception as expected:
            tried += 1
            with pytest.raises(type(expected)):
                getattr(nt, name)(*given)
    assert tried >= 8


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name, rng):
    axes = int(name[-2])
    x = torch.from_numpy(rng.standard_normal((3, 2, 4, *[6] * axes)))
    w = torch.from_numpy(rng.standard_normal((3, 4, 4, *[3] * axes)))
    function, expected = getattr(nt, name), getattr(torch.nn.functional, name)
    for dims, given in (((0, None), (x, w[0])), ((None, 0), (x[0], w)), ((0, 0), (x, w)), ((1, None), (x, w[0]))):
        given = tuple(each.movedim(0, dim) if dim else each for each, dim in zip(given, dims, strict=True))
        found = torch.vmap(function, dims)(*given)
        compare(found, torch.vmap(expected, dims)(*given), 1e-12)
    gradient = torch.vmap(torch.func.grad(lambda w, x: function(x, w).square().sum()), (None, 0))(w[0], x)
    reference = torch.vmap(torch.func.grad(lambda w, x: expected(x, w).square().sum()), (None, 0))(w[0], x)
    compare(gradient, reference, 1e-12)


def test_autocast_is_pytorchs(rng):
    x, w = torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert nt.conv2d(x, w).dtype == torch.bfloat16


def test_memory_formats(rng):
    x = torch.from_numpy(rng.standard_normal((2, 16, 20, 20), dtype=np.float32))
    w = torch.from_numpy(rng.standard_normal((8, 16, 3, 3), dtype=np.float32))
    first, last = nt.conv2d(x, w), nt.conv2d(x.to(memory_format=torch.channels_last), w)
    assert first.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, first)
    by_weight = nt.conv2d(x, w.to(memory_format=torch.channels_last))
    assert by_weight.stride() == torch.nn.functional.conv2d(x, w.to(memory_format=torch.channels_last)).stride()
    torch.testing.assert_close(by_weight, first)
    torch.testing.assert_close(nt.conv2d(x.mT, w), torch.nn.functional.conv2d(x.mT, w), rtol=0, atol=1e-4)


LAYERS = [
    (nt.Conv1d, torch.nn.Conv1d, (6, 8, 3), {"padding": "same", "padding_mode": "reflect"}),
    (nt.Conv2d, torch.nn.Conv2d, (6, 9, (3, 5)), {"padding": (1, 2), "groups": 3}),
    (nt.Conv3d, torch.nn.Conv3d, (6, 4, 3), {"stride": 2, "bias": False}),
    (nt.ConvTranspose1d, torch.nn.ConvTranspose1d, (6, 4, 4), {"stride": 3, "output_padding": 1}),
    (nt.ConvTranspose2d, torch.nn.ConvTranspose2d, (6, 4, 2), {"stride": 2, "dilation": 3, "output_padding": 2}),
    (nt.ConvTranspose3d, torch.nn.ConvTranspose3d, (6, 4, 2), {"stride": 2}),
]


@pytest.mark.parametrize(("ours", "theirs", "sizes", "options"), LAYERS)
def test_layers(ours, theirs, sizes, options):
    layer, reference = ours(*sizes, **options), theirs(*sizes, **options)
    assert isinstance(layer, theirs)
    layer.load_state_dict(reference.state_dict())
    axes = int(theirs.__name__[-2])
    x = torch.randn(2, 6, *[9] * axes)
    assert repr(layer) == repr(reference)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (layer, reference)]
    for _ in range(3):
        losses = [each(x).square().mean() for each in (layer, reference)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, reference.weight, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(each(x), layer(x))


def test_changes_of_a_weight_are_seen():
    layer, x = nt.Conv2d(4, 4, 3), torch.randn(1, 4, 9, 9)

    def check():
        expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)

    with torch.no_grad():
        check()
        layer.weight.mul_(2)
        check()
        layer.weight.data.mul_(2)  # counts no version up
        check()
        layer.weight.data = torch.randn_like(layer.weight)
        check()
        layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
        check()
        torch.nn.utils.parametrizations.weight_norm(layer)
        check()


def test_what_is_kept_of_a_weight_goes_with_it():
    gc.collect()
    before = len(kept_weights._entries)
    layer = nt.Conv2d(4, 4, 3).eval()
    with torch.inference_mode():
        layer(torch.ones(1, 4, 9, 9))
    assert len(kept_weights._entries) == before + 1
    layer.train()
    assert len(kept_weights._entries) == before
    layer(torch.ones(1, 4, 9, 9, requires_grad=True)).sum().backward()  # nothing, since the weight is about to change
    assert len(kept_weights._entries) == before
    with torch.inference_mode():
        layer.eval()(torch.ones(1, 4, 9, 9))
    assert len(kept_weights._entries) == before + 1
    del layer
    gc.collect()
    assert len(kept_weights._entries) == before


def test_a_first_layer_computes_no_gradient_of_its_input(monkeypatch):
    from nbfftconv.torch import operators

    def refuse(*arguments):
        raise AssertionError("not needed")

    monkeypatch.setattr(operators, "run_conv_transpose", refuse)
    layer = nt.Conv2d(3, 4, 3)
    layer(torch.ones(1, 3, 8, 8)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported(rng):
    model = torch.nn.Sequential(nt.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), nt.ConvTranspose2d(8, 2, 2, stride=2))
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:1].repeat(3, 1, 1, 1)), model(x[:1].repeat(3, 1, 1, 1)))


def test_calls_that_are_ready(monkeypatch):
    """The second call of a size computes what PyTorch does, and whatever is not as it was is looked at again."""
    ready, call = [], ready_calls.ReadyConvolution.__call__

    def counted(self, *tensors):
        result = call(self, *tensors)
        ready.append(result is not None)
        return result

    monkeypatch.setattr(ready_calls.ReadyConvolution, "__call__", counted)
    layer = nt.Conv2d(4, 8, 3, padding=1).eval()
    x = torch.randn(2, 4, 20, 24)
    nan, wide = x.clone(), torch.randn(2, 4, 20, 48)
    nan[0, 1, 2, 3] = float("nan")

    def agrees(x):
        result, expected = layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(result, expected, equal_nan=True)

    with torch.no_grad():
        agrees(x)
        assert not ready
        for each in (x, nan, torch.zeros_like(x), x):
            agrees(each)
        assert ready == [True] * 4
        for each in (wide[..., ::2], torch._neg_view(x)):
            agrees(each)
        assert ready[4:] == [False, False]
        agrees(x.to(memory_format=torch.channels_last))  # which has a plan of its own
        assert len(ready) == 6
        for each in (x, nan):
            agrees(each.to(memory_format=torch.channels_last))
            assert ready.pop()
        ready.clear()
        layer.weight.data.mul_(2)
        agrees(x)
        layer.bias.data.mul_(3)
        agrees(x)
        layer.weight.copy_(torch.randn_like(layer.weight))
        agrees(x)
        assert ready == [True]  # after the change of the bias
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert nt.conv2d(x, layer.weight, layer.bias, [1, 1], [1, 1]).shape == x.shape[:1] + (8, 20, 24)
    y = layer(x)
    assert y.requires_grad and ready == [True]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_weights_that_learn_are_planned_for_as_such(is_frozen, monkeypatch):
    """Their kernels are transformed by every pass, and not kept; those of frozen weights are."""
    planned, make_plan = [], operators.make_plan

    def spy(geometry, direction, dtype, *rest, weight_is_transformed=False):
        planned.append((direction, weight_is_transformed))
        return make_plan(geometry, direction, dtype, *rest, weight_is_transformed=weight_is_transformed)

    monkeypatch.setattr(operators, "make_plan", spy)
    before = len(kept_weights._entries)
    layer, x = nt.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 9, 10, requires_grad=True)
    layer.weight.requires_grad_(not is_frozen)
    for _ in range(2):
        planned.clear()
        layer(x).sum().backward()
        expected = torch.autograd.grad(torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1).sum(), x)
        torch.testing.assert_close(x.grad, *expected)
        x.grad = None
        if is_frozen:
            assert planned == [("grad_input", True)]
        else:
            assert sorted(planned) == [("forward", False), ("grad_input", False), ("grad_weight", False)]
    assert len(kept_weights._entries) == before + is_frozen
    with torch.no_grad():
        layer(x)
    assert len(kept_weights._entries) == before + 1
