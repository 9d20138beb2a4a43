"""Checks of nbfftconv.keras, in a process that has one backend: run with KERAS_BACKEND and the names of checks.

Prints a JSON object with what each check raised; null for those that passed.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import keras
import numpy as np

import nbfftconv.keras as nk
from nbfftconv import hosts, machine
from nbfftconv.keras.layers import Computed
from nbfftconv.transforms import fftw

BACKEND = keras.backend.backend()
L = keras.layers
CONVOLUTIONS = L.Conv1D, L.Conv2D, L.Conv3D
TRANSPOSED = L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose
DEPTHWISE = L.DepthwiseConv1D, L.DepthwiseConv2D, L.SeparableConv1D, L.SeparableConv2D
CHECKS = {}
#: Random layers of each class: JAX compiles what it computes, for each shape.
FEW = 2 if BACKEND == "jax" else 8


def check(function):
    CHECKS[function.__name__] = function
    return function


def numpy_of(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def is_ours(layer):
    return isinstance(vars(layer).get("call"), Computed)


def close(ours, theirs, bound=None, what="", terms=0.0):
    """Errors are relative to the largest value, or to its `terms` where these may cancel."""
    ours, theirs = numpy_of(ours), numpy_of(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (what, ours.shape, theirs.shape, ours.dtype)
    bound = bound or {4: 1e-5, 8: 1e-13}[theirs.itemsize]
    error, largest = np.abs(ours - theirs).max(initial=0), np.abs(theirs).max(initial=0)
    assert error <= bound * max(largest, terms) + 1e-30, f"{what}: {error} of {largest}"


def gradients(model, x, g, compiled=False):
    """Return the output, and the gradients at x and at all weights of the sum of g times the output."""
    weights = model.trainable_variables
    if BACKEND == "torch":
        import torch

        x = torch.from_numpy(x).requires_grad_()
        values = [each.value for each in weights]
        y = model(x)
        return [y, *torch.autograd.grad(y, [x, *values], torch.from_numpy(g))]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def step(x):
            values = [each.value for each in weights]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = model(x)
            return [y, *tape.gradient(y, [x, *values], g)]

        if compiled:
            step = tf.function(step, input_signature=[tf.TensorSpec([None, *x.shape[1:]], x.dtype)])
        return step(tf.constant(x))
    import jax

    fixed = [each.value for each in model.non_trainable_variables]

    def loss(x, values):
        y, _ = model.stateless_call(values, fixed, x)
        return (y * g).sum(), y

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, y), (of_x, of_weights) = (jax.jit(step) if compiled else step)(x, [each.value for each in weights])
    return [y, of_x, *of_weights]


def randomized(layer, rng):
    """Let biases be other than zero, and results of the size of one, where activations bend."""
    layer.set_weights(
        [(each + 0.1 * rng.standard_normal(each.shape)).astype(each.dtype) for each in layer.get_weights()]
    )


def random_layer(cls, rng, dtype):
    """Return a layer of a class with random numbers, and an input."""
    axes = next(n for n in (1, 2, 3) if f"{n}D" in cls.__name__)
    is_first = bool(rng.integers(2))
    channels, groups = 4, 1
    kernel = tuple(int(n) for n in rng.integers(1, 5, axes))
    numbers = {
        "padding": str(rng.choice(["valid", "same"])),
        "data_format": "channels_first" if is_first else "channels_last",
        "activation": [None, "relu", "tanh"][rng.integers(3)],
        "use_bias": bool(rng.integers(3)),
        "dtype": dtype,
    }
    how = rng.integers(3)
    if how == 1:  # Keras has no layers with both; TensorFlow none that are depthwise with two strides
        uneven = cls not in DEPTHWISE
        numbers["strides"] = tuple(rng.integers(1, 4, axes).tolist()) if uneven else int(rng.integers(2, 4))
    elif how == 2:
        numbers["dilation_rate"] = int(rng.integers(2, 4))
    if cls in TRANSPOSED:
        filters = (int(rng.integers(1, 5)),)
        if how == 1 and rng.integers(2):
            numbers["output_padding"] = tuple(int(rng.integers(0, s)) for s in numbers["strides"])
    elif cls in CONVOLUTIONS:
        groups = int(rng.choice([1, 1, 2]))
        filters, numbers["groups"] = (groups * int(rng.integers(1, 4)),), groups
        if cls is L.Conv1D and rng.integers(2):
            numbers["padding"] = "causal"
    else:
        filters = (int(rng.integers(1, 5)),) if "Separable" in cls.__name__ else ()
        numbers["depth_multiplier"] = int(rng.integers(1, 3))
    size = [int(n) for n in rng.integers(10, 14 if axes == 3 else 20, axes)]
    shape = (2, channels, *size) if is_first else (2, *size, channels)
    layer = cls(*filters, kernel, **numbers)
    layer.build(shape)
    randomized(layer, rng)
    return layer, rng.standard_normal(shape).astype(dtype), numbers | {"kernel": kernel, "shape": shape}


def gap(layer):
    """Return how many values are between the taps of one output and those of the next, along the axis with the most."""
    along = zip(layer.strides, layer.dilation_rate, layer.kernel_size, strict=True)
    return max(stride - dilation * (taps - 1) - 1 for stride, dilation, taps in along)


def compare_random(classes, count, seed):
    """Compare `count` layers of each class; those that Keras' backend does not compute on a CPU are drawn again."""
    rng = np.random.default_rng(seed)
    compared = without = 0
    for cls in classes:
        of_class = 0
        for _ in range(8 * count):
            if of_class == count:
                break
            dtype = "float64" if of_class % 3 == 2 else "float32"
            layer, x, numbers = random_layer(cls, rng, dtype)
            what = f"{cls.__name__} {numbers}"
            try:
                expected = numpy_of(layer(x))
            except Exception:
                continue
            is_first = layer.data_format == "channels_first"
            if BACKEND == "tensorflow" and is_first and layer.use_bias and expected.shape[1] == expected.shape[-1]:
                continue  # Keras adds the bias along the last dimension then
            g = rng.standard_normal(expected.shape).astype(dtype)
            try:
                theirs = [numpy_of(each) for each in gradients(layer, x, g)]
            except Exception:
                theirs, without = None, without + 1
            nk.convert(layer, everything=True)
            if BACKEND == "tensorflow" and "3D" in cls.__name__ and layer.padding == "same" and gap(layer) >= 2:
                assert not is_ours(layer), what  # TensorFlow computes another convolution than it documents
                continue
            calls = count_calls(layer)
            for number in range(3):  # the kernels are kept from the second on
                close(layer(x), expected, what=what)
                assert len(calls) > number, what
            calls.clear()
            if theirs is not None:
                for compiled in (False, True) if of_class < 2 else (False,):
                    for number, pair in enumerate(zip(gradients(layer, x, g, compiled), theirs, strict=True)):
                        terms = 1.0 if pair[1].size == 1 else 0.0  # as large as `g`; one sum may cancel, not all
                        close(*pair, what=f"{what}, {number}, {compiled}", terms=terms)
                assert calls, what
            of_class += 1
        assert of_class == count, (cls, of_class)
        compared += of_class
    print(BACKEND, "compared", compared, "without gradients of Keras", without, file=sys.stderr)
    assert without <= compared / 3, (without, compared)


@check
def random_convolutions():
    compare_random(CONVOLUTIONS, FEW, 1)


@check
def random_transposed():
    compare_random(TRANSPOSED, FEW, 2)


@check
def random_depthwise():
    compare_random(DEPTHWISE, FEW, 3)


@check
def random_thorough():
    compare_random((*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE), 3 if BACKEND == "jax" else 60, 4)


class Subclassed(keras.Model):
    """A model whose layers nobody sees before it is called."""

    def __init__(self):
        super().__init__(name="subclassed")
        self.first = L.Conv2D(8, 5, padding="same", activation="relu", name="first")
        self.inner = keras.Sequential([L.DepthwiseConv2D(3, padding="same", name="inner"), L.ReLU()], name="block")
        self.head = L.Dense(5, name="head")

    def call(self, x):
        x = self.inner(self.first(x))
        return self.head(keras.ops.mean(x, axis=(1, 2)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((14, 14, 2)),
            L.Conv2D(8, 5, padding="same", activation="relu", name="first"),
            L.MaxPooling2D(),
            L.Conv2DTranspose(4, 4, strides=2, padding="same", name="up"),
            L.SeparableConv2D(6, 3, strides=2, padding="same", activation="elu", name="separable"),
            L.Flatten(),
            L.Dense(5, name="head"),
        ],
        name="sequential",
    )


def functional():
    """With a layer that two branches share."""
    x = keras.Input((14, 14, 2), name="x")
    shared = L.Conv2D(2, 3, padding="same", name="shared")
    a = shared(x)
    b = shared(L.Conv2D(2, 3, padding="same", groups=2, use_bias=False, name="grouped")(a))
    y = L.GlobalAveragePooling2D()(L.Concatenate()([a, b, x]))
    return keras.Model(x, L.Dense(5, name="head")(y), name="functional")


def images(count=12, seed=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 14, 14, 2)).astype(np.float32), rng.integers(0, 5, count)


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss)
    return model


def convolutions(model):
    return [each for each in model._flatten_layers() if isinstance(each, (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE))]


def predicts_and_trains_alike(make):
    """Converted after predict has been compiled; by predict, fit and evaluate."""
    x, labels = images()
    keras.utils.set_random_seed(1)
    theirs = compiled(make())
    expected = theirs.predict(x, verbose=0, batch_size=5)
    keras.utils.set_random_seed(1)
    ours = compiled(make())
    ours.predict(x[:1], verbose=0)
    ours.set_weights(theirs.get_weights())
    assert nk.convert(ours, everything=True) is ours
    layers = convolutions(ours)
    assert layers and all(map(is_ours, layers))
    calls = count_calls(layers[0])
    close(ours.predict(x, verbose=0, batch_size=5), expected, what=make.__name__)
    assert calls, "a converted layer was not called"
    fits = [each.fit(x, labels, batch_size=6, epochs=2, shuffle=False, verbose=0) for each in (theirs, ours)]
    losses = [each.history["loss"] for each in fits]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        close(a, b, 1e-4, make.__name__)
    close(ours.predict(x, verbose=0), theirs.predict(x, verbose=0), 1e-4, make.__name__)
    close([ours.evaluate(x, labels, verbose=0)], [theirs.evaluate(x, labels, verbose=0)], 1e-4)
    calls.clear()
    expected = ours.predict(x, verbose=0)
    assert nk.revert(ours) is ours
    assert not any(map(is_ours, layers)) and not any("call" in vars(each) for each in layers)
    assert all(each.supports_jit for each in layers)
    calls.clear()
    close(ours.predict(x, verbose=0), expected, what=make.__name__)
    assert not calls, "a layer that was reverted was still computed here"


@check
def sequential_models():
    predicts_and_trains_alike(sequential)


@check
def functional_models():
    predicts_and_trains_alike(functional)


@check
def subclassed_models():
    predicts_and_trains_alike(Subclassed)


def count_calls(layer):
    """Return a list that grows with each pass of a converted layer, also within compiled functions."""
    calls = []
    for part in vars(layer)["call"]._parts:
        convolution = part.convolution
        geometry = convolution.setting

        class Counting(type(geometry)):
            def geometry(self, *arguments):
                calls.append(arguments)
                return super().geometry(*arguments)

        convolution.setting = Counting(*geometry)
    return calls


@check
def new_weights_are_followed():
    x, _ = images()
    model = nk.convert(sequential(), everything=True)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        weights = [rng.standard_normal(each.shape).astype(np.float32) for each in model.get_weights()]
        reference = sequential()
        for each in (reference, model):
            each.set_weights(weights)
        for _ in range(3):
            close(model.predict(x, verbose=0), reference.predict(x, verbose=0))
            close(model(x), reference(x))
    kernel = model.get_layer("first").kernel
    changed = numpy_of(kernel).copy()
    changed[1, 2, 0, 3] += 1
    for each in (reference, model):
        each.get_layer("first").kernel.assign(changed)
    close(model(x), reference(x))
    close(model.predict(x, verbose=0), reference.predict(x, verbose=0))
    for each in (reference, model):
        each.get_layer("first").activation = keras.activations.linear
    close(model(x), reference(x))


PLAIN = """
import sys
import numpy as np
import keras
model = keras.saving.load_model(sys.argv[1])
assert "nbfftconv" not in sys.modules
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""


@check
def saved_models_are_those_of_keras():
    x, labels = images()
    with tempfile.TemporaryDirectory() as folder:
        for make in (sequential, functional):
            model = compiled(make())
            model.fit(x, labels, verbose=0)
            expected, config = model.predict(x, verbose=0), model.to_json()
            before, after, inputs, outputs = (
                f"{folder}/{name}" for name in ("before.keras", "after.keras", "x.npy", "y.npy")
            )
            model.save(before)
            nk.convert(model, everything=True)
            assert model.to_json() == config
            close(model.predict(x, verbose=0), expected)
            model.save(after)
            model.save_weights(f"{folder}/weights.weights.h5")
            assert all(map(is_ours, convolutions(model)))
            np.save(inputs, x)
            if make is sequential:
                subprocess.run([sys.executable, "-c", PLAIN, after, inputs, outputs], check=True)
                close(np.load(outputs), expected)
            for path in (before, after):
                loaded = keras.saving.load_model(path)
                assert not any(map(is_ours, convolutions(loaded)))
                close(loaded.predict(x, verbose=0), expected)
                nk.convert(loaded, everything=True)
                loaded.load_weights(f"{folder}/weights.weights.h5")
                close(loaded.predict(x, verbose=0), expected)
                assert np.isfinite(loaded.fit(x, labels, verbose=0).history["loss"][0])
            for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), keras.models.clone_model(model)):
                copied.set_weights(model.get_weights())
                assert not any(map(is_ours, convolutions(copied)))
                close(copied.predict(x, verbose=0), expected)
    layer = model.get_layer("shared")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is L.Conv2D and again.get_config() == layer.get_config()


class Own(L.Conv2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


@check
def layers_that_are_left_alone():
    def refused():
        raise AssertionError

    own, odd = Own(2, 3, name="own"), L.Conv2D(2, 3, name="odd")
    vars(odd)["call"] = lambda inputs: refused()
    x = keras.Input((9, 9, 2))
    y = own(x)
    y = L.Conv2D(2, 3, dtype="mixed_bfloat16", name="mixed")(y)
    y = L.Conv2D(2, 3, dtype="bfloat16", name="half")(y)
    model = keras.Model(x, [L.Conv2D(2, 3, name="plain")(y), odd(y)])
    nk.convert(model, everything=True)
    choices = nk.report(model).choices
    assert {name: choice.why for name, choice in choices.items()} == {
        "own": "it is a Own",
        "mixed": "bfloat16 is Keras'",
        "half": "bfloat16 is Keras'",
        "odd": "it has a call of its own",
        "plain": "everything was asked for",
    }
    assert [each.name for each in convolutions(model) if is_ours(each)] == ["plain"]
    nk.revert(model)
    assert "call" in vars(odd)
    volumes = keras.Sequential([keras.Input((9, 9, 9, 2)), L.Conv3D(2, (1, 2, 3), 3, "same", name="shifted")])
    nk.convert(volumes, everything=True)
    why = "TensorFlow shifts it" if BACKEND == "tensorflow" else "everything was asked for"
    assert nk.report(volumes).choices["shifted"].why == why
    lines = str(nk.report(model)).splitlines()
    assert lines[0].split()[:2] == ["layer", "geometry"] and len(lines) == 6
    for wrong in (3, np.ones(3), None):
        for function in (nk.convert, nk.revert):
            try:
                function(wrong)
            except TypeError as error:
                assert type(wrong).__name__ in str(error)
            else:
                raise AssertionError(wrong)
    for arguments in ({"example_inputs": x}, {"everything": 1}):
        try:
            nk.convert(model, **arguments)
        except TypeError as error:
            assert next(iter(arguments)) in str(error)
        else:
            raise AssertionError(arguments)


@check
def choices_are_by_the_cost_model():
    def model():
        return keras.Sequential(
            [
                L.Conv2D(64, 7, padding="same", name="large"),
                L.Conv2D(1, 1, name="small"),
            ]
        )

    built = model()
    built.build((None, 56, 56, 64))
    nk.convert(built)
    choices = nk.report(built).choices
    assert choices["large"].is_converted and choices["large"].geometry == "?×56×56×64, 7×7×64×64"
    assert not choices["small"].is_converted and choices["small"].host > 0
    assert [is_ours(each) for each in built.layers] == [True, False]
    x = np.random.default_rng(1).standard_normal((2, 56, 56, 64)).astype(np.float32)
    for way in ("examples", "first call", "predict"):
        fresh = model()
        if way == "examples":
            nk.convert(fresh, (x,))
        else:
            nk.convert(fresh)
            assert nk.report(fresh).choices["large"].why == "was not called yet"
            fresh.predict(x, verbose=0) if way == "predict" else fresh(x)
        found = nk.report(fresh).choices
        batch = found["large"].geometry.split("×")[0]
        assert batch == "2" or (way, BACKEND) == ("predict", "tensorflow"), (way, batch)
        assert found["large"].is_converted and not found["small"].is_converted
        assert [is_ours(each) for each in fresh.layers] == [True, False]
        reference = model()
        reference.build(x.shape)
        reference.set_weights(fresh.get_weights())
        close(fresh(x), reference(x))
    with tempfile.TemporaryDirectory() as folder:
        nk.report(built).plot(f"{folder}/layers.png")
        assert Path(folder, "layers.png").stat().st_size > 5000
    hosts.GAIN = np.inf
    assert nk.report(nk.convert(nk.revert(built))).choices["small"].is_converted


@check
def inputs_of_any_size():
    """Of unknown size in graphs; empty batches; what Keras refuses."""
    x = keras.Input((None, None, 3))
    y = L.Conv2D(4, 3, strides=2, padding="same", name="down")(x)
    model = keras.Model(x, L.Conv2DTranspose(2, 3, strides=2, padding="same", name="up")(y))
    reference = keras.models.clone_model(model)
    reference.set_weights(model.get_weights())
    nk.convert(model)
    assert nk.report(model).choices["down"].why == "its input may be of any size"
    rng = np.random.default_rng(3)
    for size in ((2, 9, 12, 3), (1, 16, 7, 3), (3, 1, 1, 3)):
        images = rng.standard_normal(size).astype(np.float32)
        close(model(images), reference(images), what=str(size))
        close(model.predict(images, verbose=0), reference.predict(images, verbose=0), what=str(size))
    assert numpy_of(model(np.zeros((0, 8, 8, 3), np.float32))).shape == (0, 8, 8, 2)
    layer = nk.convert(L.Conv1D(2, 5), everything=True)
    layer.build((1, 8, 2))
    try:
        layer(np.ones((1, 3, 2), np.float32))
    except Exception:
        pass
    else:
        raise AssertionError("an input that is too small was convolved")


@check
def nothing_is_printed():
    out = io.StringIO()
    stdout, sys.stdout = sys.stdout, out
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nk.revert(nk.convert(compiled(sequential()), everything=True))
    finally:
        sys.stdout = stdout
    assert not out.getvalue()


@check
def models_that_xla_compiled():
    """With TensorFlow they are not any more while they are converted."""
    x, labels = images()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = functional()
    if BACKEND != "torch":
        model.compile(optimizer="sgd", loss=loss, jit_compile=True)
    else:
        model.compile(optimizer="sgd", loss=loss)
    before = model.jit_compile
    expected = model.predict(x, verbose=0)
    nk.convert(model, everything=True)
    assert model.jit_compile is (before and BACKEND != "tensorflow")
    close(model.predict(x, verbose=0), expected)
    model.fit(x, labels, verbose=0)
    assert nk.revert(model).jit_compile is before


@check
def digits():
    """A network trained in Keras on 4,000 digits predicts 1,000 others alike; a step of training is the same."""
    from nbfftconv.demo.data import load_digits

    training, test = load_digits()

    def network():
        keras.utils.set_random_seed(2014)
        model = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                L.Conv2D(16, 5, padding="same", activation="relu"),
                L.MaxPooling2D(),
                L.Conv2D(32, 5, padding="same", activation="relu"),
                L.MaxPooling2D(),
                L.Flatten(),
                L.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras.optimizers.Adam(2e-3), loss=loss, metrics=["accuracy"])
        return model

    model = network()
    x, labels = training.images.transpose(0, 2, 3, 1), training.labels
    held_out = test.images.transpose(0, 2, 3, 1)
    model.fit(x, labels, batch_size=64, epochs=3, verbose=0)
    logits = model.predict(held_out, verbose=0)
    accuracy = float(np.mean(logits.argmax(1) == test.labels))
    assert accuracy > 0.95, accuracy
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/digits.keras")
        converted = nk.convert(keras.saving.load_model(f"{folder}/digits.keras"), everything=True)
    assert all(map(is_ours, convolutions(converted)))
    ours = converted.predict(held_out, verbose=0)
    equal = int(np.sum(ours.argmax(1) == logits.argmax(1)))
    assert equal == 1000, equal
    close(ours, logits, what="logits")
    x, g = x[:64], np.random.default_rng(1).standard_normal((64, 10)).astype(np.float32)
    theirs = gradients(model, x, g)
    for compiled in (False, True):
        found = gradients(converted, x, g, compiled)
        # At pixels maximum pooling has ties: rounding decides which pixel of a blank region has the gradient.
        for index in set(range(len(theirs))) - {1}:
            close(found[index], theirs[index], 1e-5, f"gradient {index}")
    steps = [each.train_on_batch(x, labels[:64])[0] for each in (model, converted)]
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-5)
    print(
        BACKEND,
        "accuracy",
        accuracy,
        "equal",
        equal,
        "largest difference",
        np.abs(ours - logits).max(),
        file=sys.stderr,
    )


def main(names):
    fftw.set_planning_effort("estimate")
    machine.set_machine(machine.DEFAULT)
    found = {}
    for name in names:
        try:
            CHECKS[name]()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
