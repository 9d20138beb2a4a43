"""Networks that are converted: the same results, layers that are left alone, and the way back."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nt = pytest.importorskip("nbfftconv.torch")
from nbfftconv import hosts  # noqa: E402
from nbfftconv.torch import decisions, ways  # noqa: E402
from nbfftconv.torch.layers import COUNTERPARTS  # noqa: E402


class Block(torch.nn.Module):
    """Of a residual network: one ReLU module that is called twice."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Untraceable(torch.nn.Module):
    """A network whose way depends on values, of a part that can be traced."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, padding=2, groups=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
        )
        self.up = torch.nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.norm = torch.nn.BatchNorm2d(4)
        self.never = torch.nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.norm(self.up(x)) if float(x.detach().sum()) > -1e30 else self.never(x)


def networks():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 5, padding=2), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), Block(32), Block(32),
        torch.nn.ConvTranspose2d(32, 8, 4, stride=2, padding=1), torch.nn.BatchNorm2d(8, affine=False),
        torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 7, groups=8, padding="same", padding_mode="reflect"),
    )  # fmt: skip
    for model in (plain, Untraceable()):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean)
                torch.nn.init.uniform_(module.running_var, 0.5, 2)
                if module.affine:
                    torch.nn.init.normal_(module.weight)
                    torch.nn.init.normal_(module.bias)
    return [plain.eval(), Untraceable().eval()]


@pytest.fixture(params=[0, 1], ids=["plain", "untraceable"])
def network(request):
    return networks()[request.param]


@pytest.fixture
def always(monkeypatch):
    """Let every layer be converted."""
    monkeypatch.setattr(hosts, "GAIN", np.inf)
    monkeypatch.setattr(ways, "_GAIN", 0.0)


def check(model, expected, x):
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("way", ["model", "measure", "first call"])
def test_results_are_the_same(network, way):
    x = torch.randn(2, 3, 24, 20)
    expected = network(x).detach()
    examples = None if way == "first call" else (x,)
    assert nt.convert(network, examples, measure=way == "measure") is network
    for size in ((2, 3, 24, 20), (1, 3, 30, 31)):
        x = x if size == tuple(x.shape) else torch.randn(size)
        reference = expected if size[0] == 2 else nt.revert(copy.deepcopy(network))(x).detach()
        check(network, reference, x)
    kinds = {type(module) for module in network.modules()}
    assert kinds & set(COUNTERPARTS.values())
    choices = nt.report(network).choices
    assert len(choices) == sum(isinstance(module, tuple(COUNTERPARTS)) for module in network.modules())
    for name, choice in choices.items():
        called = name != "never"
        assert choice.is_converted is called
        assert (choice.host > 0 and choice.ours > 0) is called
    x = torch.randn(2, 3, 24, 20)
    expected = network(x).detach()
    assert nt.revert(network) is network
    check(network, expected, x)
    assert not {type(module) for module in network.modules()} & set(COUNTERPARTS.values())


@pytest.mark.usefixtures("always")
def test_norms_are_folded_and_relus_fused():
    model = networks()[0]
    x = torch.randn(1, 3, 16, 16)
    nt.convert(model, (x,))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert model[0].clips
    assert not model[3].conv1.clips  # its ReLU is called twice


@pytest.mark.usefixtures("always")
def test_a_network_in_training_keeps_its_norms():
    model = networks()[0].train()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16)
    nt.convert(model, (x,))
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 6
    for each in (model, reference):
        each(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        bound = 2e-4 * float(theirs.grad.abs().max()) + 1e-4
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=bound, msg=name)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_a_norm_that_is_frozen_in_training_stays():
    model = networks()[0].train()
    model[1].eval()
    weight = model[0].weight
    nt.convert(model, (torch.randn(2, 3, 16, 16),))
    assert isinstance(model[1], torch.nn.BatchNorm2d)
    assert model[0].weight is weight  # which an optimizer may have


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("way", ["model", "measure", "first call"])
def test_a_layer_in_training_is_judged_by_its_gradients(way, monkeypatch):
    planned = []

    def make_plan(images, direction, *arguments, weight_is_transformed=False, **options):
        planned.append((direction, weight_is_transformed))
        return right_make_plan(images, direction, *arguments, weight_is_transformed=weight_is_transformed, **options)

    right_make_plan = hosts.make_plan
    monkeypatch.setattr(hosts, "make_plan", make_plan)
    frozen = torch.nn.Conv2d(4, 4, 3)
    frozen.requires_grad_(False)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), frozen, torch.nn.ConvTranspose2d(4, 2, 2), torch.nn.ReLU())
    x = torch.randn(2, 3, 12, 12)
    nt.convert(model, None if way == "first call" else (x,), measure=way == "measure")
    model(x).sum().backward()
    first, input_only, both = [
        [("forward", False), ("grad_weight", False)],
        [("forward", True), ("grad_input", True)],
        [("grad_input", False), ("forward", False), ("grad_weight", False)],
    ]
    assert planned == ([] if way == "measure" else [*first, *input_only, *both])
    assert all("with gradients" in choice.why for choice in nt.report(model).choices.values())
    assert (frozen.weight.grad is None) and model[0].weight.grad is not None
    nt.convert(nt.revert(model.eval()), (x,))
    assert not any("gradients" in choice.why for choice in nt.report(model).choices.values())


@pytest.mark.usefixtures("always")
def test_a_race_in_training_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():  # which is of the caller
        nt.convert(model, (torch.randn(2, 3, 12, 12),), measure=True)
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert "with gradients" in nt.report(model).choices["2"].why
    with torch.inference_mode():  # there are no gradients
        nt.convert(nt.revert(model), (torch.randn(2, 3, 12, 12),), measure=True)
    assert "with gradients" not in nt.report(model).choices["2"].why


@pytest.mark.usefixtures("always")
def test_what_is_left_alone():
    class Own(torch.nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight, bias) + 1

    shared = torch.nn.Conv2d(4, 4, 3, padding=1)
    tied = torch.nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = shared.weight
    model = torch.nn.Sequential(
        Own(4, 4, 3, padding=1), shared, torch.nn.BatchNorm2d(4), shared, tied, torch.nn.BatchNorm2d(4),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(4, 4, 3, padding=1)),
    ).eval()  # fmt: skip
    x = torch.randn(1, 4, 12, 12)
    expected = model(x).detach()
    nt.convert(model, (x,))
    check(model, expected, x)
    assert type(model[0]) is Own
    assert type(model[1]) is nt.Conv2d
    assert model[1] is model[3]
    assert isinstance(model[2], torch.nn.BatchNorm2d)
    assert isinstance(model[5], torch.nn.BatchNorm2d)
    choices = nt.report(model).choices
    assert "Own" in choices["0"].why
    assert "Parametrized" in choices["6"].why
    text = str(nt.report(model))
    assert text.splitlines()[0].split()[:2] == ["layer", "geometry"]
    assert "1×4×12×12, 4×4×3×3" in text


@pytest.mark.usefixtures("always")
def test_copies_and_pickles():
    model = networks()[0]
    x = torch.randn(1, 3, 16, 16)
    nt.convert(model, (x,))
    expected = model(x).detach()
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 4 * sum(each.numel() for each in model.parameters()) + 60_000  # no spectra
    file.seek(0)
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        check(each, expected, x)


def test_a_layer_that_is_not_faster_stays(monkeypatch):
    monkeypatch.setattr(decisions, "_race", lambda layer, x: (1.0, 0.99))
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)), torch.randn(1, 3, 9, 9)
    nt.convert(model, (x,), measure=True)
    assert type(model[0]) is torch.nn.Conv2d
    assert not nt.report(model).choices["0"].is_converted


@pytest.fixture
def second(monkeypatch):
    """Let the second way win, with weights in the other order."""
    monkeypatch.setattr(
        ways, "race", lambda turns, length: [turn() + (place != 1) * 1e3 for place, turn in enumerate(turns)]
    )


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("is_first_last", [False, True])
@pytest.mark.parametrize("is_converted", [False, True])
def test_the_other_order_of_memory(monkeypatch, is_first_last, is_converted):
    monkeypatch.setattr(hosts, "GAIN", np.inf if is_converted else 0.0)
    orders = [torch.contiguous_format, torch.channels_last]
    model = networks()[0]
    x = torch.randn(2, 3, 16, 18)
    if is_first_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        orders.reverse()
    with torch.no_grad():
        expected = model(x)
    parameter = model[0].weight
    with torch.inference_mode():
        nt.convert(model, (x,), measure=True)
    assert {choice.is_converted for choice in nt.report(model).choices.values()} == {is_converted}
    assert model[0].weight.is_contiguous(memory_format=orders[1])
    for each in (model, copy.deepcopy(model)):
        check(each, expected, x)
    assert not torch.is_inference(model[0].weight)
    nt.revert(model)
    check(model, expected, x)
    assert all(layer.weight.is_contiguous(memory_format=orders[0]) for layer in (model[0], model[3].conv1, model[5]))
    assert isinstance(parameter, torch.nn.Parameter)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("gain", [0.0, np.inf])
def test_weights_that_were_made_for_inference(monkeypatch, gain):
    monkeypatch.setattr(hosts, "GAIN", gain)
    x = torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
        expected = model(x)
        for _ in range(2):
            nt.convert(model, (x,), measure=True)
            check(model, expected, x)
            nt.revert(model)
    check(model, expected, x)
    assert model[0].weight.is_inference()


@pytest.mark.usefixtures("second")
def test_a_network_that_wants_its_order(monkeypatch):
    monkeypatch.setattr(hosts, "GAIN", 0.0)

    class Viewing(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x).view(len(x), -1)

    model = Viewing(torch.nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = model(x)
    nt.convert(model, (x,), measure=True)
    assert model[0].weight.is_contiguous()
    check(model, expected, x)


def test_a_network_that_is_faster_without(monkeypatch):
    monkeypatch.setattr(hosts, "GAIN", np.inf)
    monkeypatch.setattr(ways, "race", lambda turns, length: [2.0, 2.0, 1.0, 2.0])
    model = networks()[0]
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = model(x)
    nt.convert(model, (x,), measure=True)
    choices = nt.report(model).choices.values()
    assert all(not choice.is_converted and choice.why.endswith("the network is faster without") for choice in choices)
    assert not {type(module) for module in model.modules()} & set(COUNTERPARTS.values())
    check(model, expected, x)


def test_converting_leaves_no_statistics_and_random_numbers():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for measure in (False, True):
        nt.convert(nt.revert(model), (torch.ones(2, 3, 12, 12),), measure=measure)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_bad_arguments():
    model = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(TypeError, match="list"):
        nt.convert([model])
    with pytest.raises(TypeError, match="Tensor"):
        nt.convert(model, torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match="example_inputs"):
        nt.convert(model, measure=True)


@pytest.mark.usefixtures("always")
def test_a_model_that_is_one_layer():
    model, x = torch.nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 9, 9)
    expected = model(x).detach()
    nt.convert(model, (x,))
    assert type(model) is nt.Conv2d
    check(model, expected, x)
    assert type(nt.revert(model)) is torch.nn.Conv2d


def test_the_picture_of_a_report(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    geometries = "1×3×9×9, 4×3×3×3; 1×3×7×7, 4×3×3×3"
    choices = {
        "head": nt.Choice(geometries, 4e-3, 1e-3, True, ""),
        "body.0": nt.Choice("1×4×7×7, 4×4×3×3", 2e-3, 3e-3, False, ""),
        "unused": nt.Choice("", np.nan, np.nan, False, "was not called"),
    }
    report = nt.Report(choices)
    axes = report.plot(figure.Figure().subplots())
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "head  1×3×9×9, 4×3×3×3; …",
        "body.0  1×4×7×7, 4×4×3×3",
    ]
    assert axes.get_title() == "Convolutions: 6.0 ms by PyTorch, 3.0 ms as converted"
    widths = [patch.get_width() for patch in axes.patches if not np.isnan(patch.get_width())]
    np.testing.assert_allclose(widths, [4, 2, 1, 3])
    report.plot(tmp_path / "layers.png")
    nt.Report({}).plot(str(tmp_path / "none.svg"))
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "none.svg").stat().st_size > 0


def test_the_model_of_times_counts_exchanges_of_order():
    """Winograd's passes read channels first, depthwise ones also channels last."""
    x = torch.zeros(1, 64, 56, 56)
    last = x.to(memory_format=torch.channels_last)
    for groups, is_exchanged in ((1, True), (64, False)):
        layer = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups).eval()
        with torch.inference_mode():
            of_first, of_last = (decisions.choose(layer, [layer], (each,), False)[layer].ours for each in (x, last))
        assert (of_last > of_first) == is_exchanged
