"""`nbfftconv bench`: what it prints, draws and writes, and how it refuses."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("rich")

from onnx import numpy_helper  # noqa: E402

from nbfftconv import profile  # noqa: E402
from nbfftconv.cli import main  # noqa: E402
from nbfftconv.onnx import choice  # noqa: E402
from nbfftconv.onnx.bench import largest_difference  # noqa: E402


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(choice, "_ROUNDS", 2)
    monkeypatch.setattr(choice, "_TRIALS", 2)


@pytest.fixture
def model(tmp_path):
    """A network of two convolutions, the first of which is faster here by far."""
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 8, H, W] x, int64 unused) => (float[N, 8, H, W] y, int64 z) {
            c = Conv <pads = [15, 15, 15, 15]> (x, large)
            r = Relu (c)
            d = Conv (r, small)
            y = Sigmoid (d)
            z = Identity (unused)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("large", (8, 8, 31, 31)), ("small", (8, 8, 1, 1))):
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    return str(path)


def test_what_it_prints_and_draws(model, tmp_path, capsys):
    pytest.importorskip("matplotlib").use("agg")
    picture = tmp_path / "times.png"
    shape = "x=1,8,64,64"
    assert main(["bench", model, "--shape", shape, "--threads", "1", "2", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"{model}, 1 thread\n" in out and f"{model}, 2 threads\n" in out
    for text in ("1×8×64×64, 8×8×31×31", "1×8×64×64, 8×8×1×1", "a run, ms", "memory", "largest difference"):
        assert out.count(text) == 2
    assert "nbfftconv    " in out and picture.stat().st_size > 10_000


def test_plans_are_written(model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "profile.json"
    profile.set_profile_file(file)
    try:
        assert main(["bench", model, "--shape", "1,8,40,40", "--threads", "1", "--write"]) == 0
        assert profile.get_profile().winners and file.is_file()
    finally:
        profile.set_profile_file(None)
    assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give its sizes, --shape x="),
        (["--shape", "z=1,2"], "no input 'z'"),
        (["--shape", "1,a"], "integers"),
        (["--shape", "1,8,64,64", "--threads", "0"], "at least 1"),
    ],
)
def test_arguments_that_are_no_good(model, arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", model, *arguments])
    assert exit_info.value.code == 2 and said in capsys.readouterr().err


def test_models_that_are_none(tmp_path, capsys):
    for path in tmp_path / "absent.onnx", tmp_path:
        assert main(["bench", str(path)]) == 1
        assert "nbfftconv: error: " in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("rich", "onnx"), ("matplotlib", "demo")])
def test_what_is_missing(module, extra, model, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", model, "--plot", "plot.png"])
    assert exit_info.value.code == 2 and f'"nbfftconv[{extra}]"' in capsys.readouterr().err


def test_largest_difference():
    a, b = np.array([1.0, np.nan, 4.0, np.inf]), np.array([1.0, np.nan, 5.0, np.inf])
    assert largest_difference([a], [b]) == 0.2
    assert largest_difference([a], [a]) == 0 and largest_difference([np.array([3])], [np.array([4])]) == 0
    assert largest_difference([np.array([1.0, 2.0])], [np.array([1.0, 4.0])]) == 0.5
    assert np.isnan(largest_difference([np.array([np.nan])], [np.array([1.0])]))
