"""Docstrings of what users are told about: complete, in agreement with the signatures, and their examples run."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import importlib
import importlib.util
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
from numpydoc.docscrape import NumpyDocString
from numpydoc.validate import validate

import nbfftconv
from nbfftconv import machine
from nbfftconv.layer import Layer

#: What users call, besides the public names of the package.
KNOBS = (
    "nbfftconv.config.Setting",
    "nbfftconv.config.set_cache_directory",
    "nbfftconv.config.set_profile_file",
    "nbfftconv.config.settings",
    "nbfftconv.config.show",
    "nbfftconv.machine.Machine",
    "nbfftconv.machine.get_machine",
    "nbfftconv.config.get_memory_limit",
    "nbfftconv.config.set_memory_limit",
    "nbfftconv.machine.set_machine",
    "nbfftconv.paths.cache_directory",
    "nbfftconv.profile.profile_file",
    "nbfftconv.scratch.get_scratch_limit",
    "nbfftconv.scratch.set_scratch_limit",
    "nbfftconv.threads.get_counts",
    "nbfftconv.transforms.fftw.get_planning_effort",
    "nbfftconv.transforms.fftw.load_wisdom",
    "nbfftconv.transforms.fftw.save_wisdom",
    "nbfftconv.transforms.fftw.set_planning_effort",
)
#: What they are given: of `plan_conv2d`, and what is in it.
RECORDS = (
    "nbfftconv.geometry.ConvGeometry",
    "nbfftconv.implementations.direct.DirectPlan",
    "nbfftconv.passes.plan.TiledPlan",
    "nbfftconv.plan.ConvPlan",
    "nbfftconv.tiling.AxisTiles",
    "nbfftconv.tiling.TileGrid",
)
#: Of PyTorch's module, where that is: all but the layers, whose parameters are those of PyTorch's.
TORCH = ()
if importlib.util.find_spec("torch"):
    names = importlib.import_module("nbfftconv.torch").__all__
    TORCH = tuple(f"nbfftconv.torch.{name}" for name in names if not name.startswith("Conv"))
#: Of ONNX Runtime's, where that is.
ONNX = ()
if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
    ONNX = tuple(f"nbfftconv.onnx.{name}" for name in importlib.import_module("nbfftconv.onnx").__all__)
#: Of Keras', on one of its backends.
KERAS = ()
if importlib.util.find_spec("keras") and TORCH:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    KERAS = tuple(f"nbfftconv.keras.{name}" for name in importlib.import_module("nbfftconv.keras").__all__)
PUBLIC = (*(f"nbfftconv.{name}" for name in nbfftconv.__all__), *KNOBS, *RECORDS, *TORCH, *ONNX, *KERAS)

LAYERS = tuple(f"nbfftconv.{name}." for name in ("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"))
#: Checks of numpydoc that are not made.
LEFT_OUT = {
    "GL01",  # a summary begins beside the quotes, here as in all of the package
    "ES01",  # one line may be enough
    "SA01",  # names that matter are in the text, as links
}
#: A class of fields says what they are under Attributes, which is compared below.
OF_FIELDS = {"PR01"}
#: The example of a class shows its properties too and, of a record, its methods.
OF_MEMBERS = {"EX01"}


def resolve(name: str) -> object:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[count:], found)
    raise ModuleNotFoundError(name)


def members(name: str) -> list[str]:
    """Return the public methods and properties that a class defines, and `__call__`."""
    cls = resolve(name)
    if not inspect.isclass(cls):
        return []
    kinds = (staticmethod, classmethod, property, functools.cached_property)
    of_package = [each for each in cls.__mro__ if issubclass(each, Layer) or each is cls]
    return [
        f"{name}.{member}"
        for each in of_package
        for member, value in vars(each).items()
        if (not member.startswith("_") or member == "__call__")
        and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


MEMBERS = [member for name in PUBLIC for member in members(name)]
METHODS = [name for name in MEMBERS if callable(resolve(name))]


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_numpydoc(name):
    left_out = set(LEFT_OUT)
    if dataclasses.is_dataclass(resolve(name)):
        left_out |= OF_FIELDS
    if name in MEMBERS and not (name in METHODS and name.startswith(LAYERS)):
        left_out |= OF_MEMBERS
    faults = [f"{code}: {text}" for code, text in validate(name)["errors"] if code not in left_out]
    assert not faults, "\n".join(faults)


def parameters(name: str) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(resolve(name)).parameters)
    found.pop("self", None)
    return found


def documented(name: str, section: str) -> dict[str, str]:
    """Return the types of what a section of a docstring describes, by name, in its order."""
    entries = NumpyDocString(inspect.getdoc(resolve(name)))[section]
    return {each: entry.type for entry in entries for each in entry.name.split(", ")}


@pytest.mark.parametrize("name", [*(name for name in PUBLIC if not dataclasses.is_dataclass(resolve(name))), *METHODS])
def test_parameters_are_those_of_the_signature(name):
    """Names, their order, and defaults: `optional` where that is None, else the value."""
    found, types = parameters(name), documented(name, "Parameters")
    assert list(types) == list(found)
    for parameter, type_text in types.items():
        default = found[parameter].default
        said = re.search(r"(?:, )(?:default (.+)|(optional))$", type_text)
        if default is inspect.Parameter.empty:
            assert said is None, f"{parameter} has no default"
        elif said is None:
            pytest.fail(f"{parameter} has a default, {default!r}, which its type {type_text!r} does not say")
        elif said[2]:
            assert default is None, parameter
        else:
            assert eval(said[1], {"numpy": np}) == default, parameter


@pytest.mark.parametrize("name", [name for name in PUBLIC if dataclasses.is_dataclass(resolve(name))])
def test_attributes_are_the_fields(name):
    assert list(documented(name, "Attributes")) == [field.name for field in dataclasses.fields(resolve(name))]


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_of_the_layer(name):
    """All that can be set, by one name or the other, and what `backward` sets."""
    cls = resolve(name.removesuffix("."))
    layer = cls(np.ones((1, 1, *[3] * cls._axes), np.float32))
    public = {name for name in vars(layer) if not name.startswith("_")}
    descriptors = {name for each in cls.__mro__ for name, value in vars(each).items() if hasattr(value, "__set__")}
    assert set(documented(name.removesuffix("."), "Attributes")) == public | {
        name for name in descriptors if not name.startswith("_")
    }


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_annotations_are_complete(name):
    if dataclasses.is_dataclass(resolve(name)):
        return
    signature = inspect.signature(resolve(name))
    assert all(each.annotation is not inspect.Parameter.empty for each in parameters(name).values())
    assert inspect.isclass(resolve(name)) or signature.return_annotation is not inspect.Signature.empty


def test_every_example_runs(restore_threads):
    """In all modules of the package that have examples."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    found = set()
    figures = machine.get_machine()
    try:
        for path in sorted(Path(nbfftconv.__file__).parent.rglob("*.py")):
            is_there = {"torch": TORCH, "onnx": ONNX, "keras": KERAS}.get(path.parent.name, True)
            if ">>> " not in path.read_text(encoding="utf-8") or not is_there:
                continue
            parts = path.relative_to(Path(nbfftconv.__file__).parents[1]).with_suffix("").parts
            for test in finder.find(importlib.import_module(".".join(parts).removesuffix(".__init__"))):
                if test.examples:
                    found.add(test.name)
                    assert runner.run(test).failed == 0, test.name
    finally:
        machine.set_machine(figures)
    expected = {f"{resolve(name).__module__}.{resolve(name).__qualname__}" for name in PUBLIC}
    assert expected <= found


def test_the_reference_has_every_public_name():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert {name for name in PUBLIC if name not in page} == set()
