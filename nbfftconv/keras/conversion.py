"""convert, report, revert: models whose convolutions are computed here wherever that is faster.

Layers stay the objects that they are; only what an instance computes is exchanged, and what Keras has compiled of a
model is made anew.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import keras
import numpy as np

from nbfftconv import hosts
from nbfftconv.hosts import Choice
from nbfftconv.keras.layers import Computed, Substitute, geometries, host, is_convolution, text, why_not

_Model = TypeVar("_Model", bound=keras.layers.Layer)
#: What is known of a layer, beside its `call`, and of a model that was compiled by XLA.
_NOTE, _XLA = "_nbfftconv_choice", "_nbfftconv_jit_compile"
#: Images of a batch where their number is not known: as many as Keras' predict takes.
_BATCH = 32


class Report(hosts.Report):
    """What was chosen for all layers of a model; as text, a table.

    Parameters
    ----------
    choices : dict from str to Choice
        By the layers' names; also an attribute.

    Examples
    --------
    >>> import nbfftconv.keras as nk
    >>> str(nk.Report({})).split()
    ['layer', 'geometry', 'keras,', 'ms', 'ours,', 'ms', 'computed', 'by', 'why']
    >>> from matplotlib.figure import Figure
    >>> report = nk.Report({"head": nk.Choice("1×9×9×1, 3×3×1×1", 2e-3, 1e-3, True, "")})
    >>> report.plot(Figure().subplots()).get_title()
    'Convolutions: 2.0 ms by Keras, 1.0 ms as converted'
    """

    _host, _title = "keras", "Keras"


def convert(model: _Model, example_inputs: tuple[Any, ...] | None = None, *, everything: bool = False) -> _Model:
    """Let this package compute the convolutions of a model wherever that is faster; in place.

    For Keras the model stays what it is: weights, names, configuration and what `save`, `clone_model` and pickles take
    of it are those of Keras' layers, and know nothing of this package. Training goes on with the gradients of this
    package. Functions that Keras compiled are made anew at their next use; those that a caller compiled, with
    `tf.function` or `jax.jit`, are not, nor those of a larger model that has this one as a layer.

    Layers that are subclasses of Keras' stay as they are, and so do those that compute in other types than float32 and
    float64, are quantized or not on a CPU; `report` says why. Bias and ReLU are computed with the convolution.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Sequential, functional or of a subclass; compiled or not.
    example_inputs : tuple, optional
        Arguments of the model, which is run once on them, to see what each layer gets. Without them a layer whose input
        is known, as in a functional model, is decided on for batches of 32 images, another one at its first call.
    everything : bool, default False
        Convert all layers that this package can compute, faster or not.

    Returns
    -------
    keras.Model or keras.layers.Layer
        The model itself.

    Raises
    ------
    TypeError
        If `model` is no layer of Keras, `example_inputs` are no tuple, or `everything` is no bool.
    ValueError
        If Keras runs on another backend than torch, tensorflow or jax.

    Notes
    -----
    With TensorFlow, XLA is not used for a model that is converted, and `export` is to be called after `revert`: a
    graph has no way to this package but through Python. Derivatives are of first order with TensorFlow and JAX, of any
    order with PyTorch.

    Examples
    --------
    >>> import keras
    >>> import nbfftconv.keras as nk
    >>> layers = [keras.Input((56, 56, 64)), keras.layers.Conv2D(64, 7, padding="same", activation="relu", name="conv")]
    >>> model = nk.convert(keras.Sequential(layers))
    >>> nk.report(model).choices["conv"].is_converted
    True
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a keras.Model or a keras.layers.Layer, got {type(model).__name__}")
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs must be a tuple of arguments, got {type(example_inputs).__name__}")
    if not isinstance(everything, bool):
        raise TypeError(f"everything must be True or False, got {everything!r}")
    host()
    layers = []
    for layer in _convolutions(model):
        why = why_not(layer)
        if why:
            _decide(layer, Choice("", math.nan, math.nan, False, why))
        elif not isinstance(_substitute_of(layer), Computed):
            layers.append(layer)
    if everything:
        for layer in layers:
            _decide(layer, Choice("", math.nan, math.nan, True, "everything was asked for"))
    elif example_inputs is not None:
        for layer, shapes in _seen(model, layers, example_inputs):
            _decide(layer, _chosen(layer, shapes))
    else:
        for layer in layers:
            shape = _known_shape(layer)
            if shape is None:
                _substitute(layer, _Deciding(layer))
            else:
                _decide(layer, _chosen(layer, [shape]))
    _renew(model)
    return model


def revert(model: _Model) -> _Model:
    """Let Keras compute all convolutions of a model again; in place.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        That `convert` has had, or not.

    Returns
    -------
    keras.Model or keras.layers.Layer
        The model itself, with the weights as they are now.

    Raises
    ------
    TypeError
        If `model` is no layer of Keras.

    Examples
    --------
    >>> import keras
    >>> import nbfftconv.keras as nk
    >>> model = keras.Sequential([keras.Input((9, 9, 1)), keras.layers.Conv2D(1, 3, name="conv")])
    >>> model = nk.revert(nk.convert(model, everything=True))
    >>> nk.report(model).choices["conv"].why
    'was not converted'
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a keras.Model or a keras.layers.Layer, got {type(model).__name__}")
    for layer in _convolutions(model):
        vars(layer).pop(_NOTE, None)
        _restore(layer)
    _renew(model)
    return model


def report(model: keras.layers.Layer) -> Report:
    """Return what was chosen for each convolution of a model, and why.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        That `convert` has had.

    Returns
    -------
    Report
        As text, a table.

    Examples
    --------
    >>> import keras
    >>> import nbfftconv.keras as nk
    >>> print(nk.report(keras.Sequential([keras.layers.Conv2D(1, 3, name="conv")])))
    layer  geometry  keras, ms  ours, ms  computed by  why
    conv                                  keras        was not converted
    """
    choices: dict[str, Choice] = {}
    for layer in _convolutions(model):
        name, count = layer.name, 1
        while name in choices:  # of another model in this one
            count += 1
            name = f"{layer.name} ({count})"
        why = "was not called yet" if _substitute_of(layer) is not None else "was not converted"
        choices[name] = vars(layer).get(_NOTE, Choice("", math.nan, math.nan, False, why))
    return Report(choices)


def _convolutions(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if is_convolution(layer)]


def _substitute_of(layer: Any) -> Substitute | None:
    found = vars(layer).get("call")
    return found if isinstance(found, Substitute) else None


def _substitute(layer: Any, substitute: Substitute) -> None:
    """Let something compute a layer; not by setattr: what Keras tracks, it saves."""
    vars(layer)["call"] = substitute
    if keras.backend.backend() == "tensorflow":
        vars(layer)["supports_jit"] = False  # XLA takes no Python


def _restore(layer: Any) -> None:
    """Let its class compute a layer."""
    if _substitute_of(layer) is not None:
        del vars(layer)["call"]
        vars(layer)["supports_jit"] = True


def _decide(layer: Any, choice: Choice) -> None:
    """Note a choice, and let the layer be computed as it says."""
    vars(layer)[_NOTE] = choice
    if choice.is_converted:
        _substitute(layer, Computed(layer))
    else:
        _restore(layer)


def _known_shape(layer: Any) -> tuple[Any, ...] | None:
    """Return the shape of a layer's input in a functional model; None if it is in none, or called more than once."""
    try:
        return tuple(layer.input.shape) if layer.built else None
    except (AttributeError, ValueError):
        return None


class _Noting(Substitute):
    """Notes what a layer gets, of every shape once."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.shapes: list[tuple[Any, ...]] = []

    def __call__(self, inputs: Any) -> Any:
        """Do what the layer's class does."""
        shape = tuple(inputs.shape)
        if shape not in self.shapes:
            self.shapes.append(shape)
        return super().__call__(inputs)


def _seen(
    model: Any, layers: list[Any], example_inputs: tuple[Any, ...]
) -> Iterator[tuple[Any, list[tuple[Any, ...]]]]:
    """Run a model once; return what each layer got."""
    notes = {layer: _Noting(layer) for layer in layers}
    try:
        for layer, note in notes.items():
            _substitute(layer, note)
        model(*example_inputs)
    finally:
        for layer in layers:
            _restore(layer)
    return ((layer, note.shapes) for layer, note in notes.items())


class _Deciding(Substitute):
    """Decides on a layer at its first call."""

    def __call__(self, inputs: Any) -> Any:
        """Decide, and do what was decided."""
        layer = self._layer
        _decide(layer, _chosen(layer, [tuple(inputs.shape)]))
        return layer.call(inputs)


def _chosen(layer: Any, shapes: list[tuple[Any, ...]]) -> Choice:
    """Return what is chosen for a layer that gets inputs of these shapes."""
    if not shapes:
        return Choice("", math.nan, math.nan, False, "was not called")
    geometry = "; ".join(text(layer, shape) for shape in shapes)
    if any(None in shape[1:] for shape in shapes):
        return Choice(geometry, math.nan, math.nan, True, "its input may be of any size")
    try:
        times = [_seconds(layer, tuple(n or _BATCH for n in shape)) for shape in shapes]
    except (TypeError, ValueError) as error:
        return Choice(geometry, math.nan, math.nan, False, str(error))
    theirs, ours = (sum(each) for each in zip(*times, strict=True))
    why = f"{theirs / ours:.2f} times as fast, by the cost model"
    return Choice(geometry, theirs, ours, ours <= hosts.GAIN * theirs, why)


def _seconds(layer: Any, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the seconds of a forward pass, of Keras and of this package."""
    backend, dtype, is_last = host(), np.dtype(layer.compute_dtype), layer.data_format == "channels_last"
    theirs = ours = 0.0
    for geometry, direction in geometries(layer, shape):
        theirs += hosts.host_seconds(geometry, dtype.itemsize, backend.threads())
        ours += backend.CALL + hosts.our_seconds(geometry, [direction], dtype, False, is_last)
    return theirs, ours


def _renew(model: Any) -> None:
    """Let Keras compile anew what it has compiled; by XLA, with TensorFlow, only if nothing is computed here."""
    for part in model._flatten_layers():
        if not isinstance(part, keras.Model):
            continue
        part.train_function = part.test_function = part.predict_function = None
        if all(layer.supports_jit for layer in _convolutions(part)):
            if vars(part).pop(_XLA, False):
                part.jit_compile = True
        elif part._jit_compile:
            vars(part)[_XLA] = True
            part.jit_compile = False
