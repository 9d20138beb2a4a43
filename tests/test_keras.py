"""Models of Keras that are converted, against Keras itself: the checks of keras_worker.py, with each backend there is.

A process has one backend, which runs its checks one after the other: to import Keras takes longer than most of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from processes import run_scenario

if importlib.util.find_spec("keras") is None:  # to import it here would read the user's settings, and write them
    pytest.skip("Keras is not installed", allow_module_level=True)

WORKER = Path(__file__).with_name("keras_worker.py")
BACKENDS = [name for name in ("torch", "tensorflow", "jax") if importlib.util.find_spec(name)]
CHECKS = (
    "random_convolutions",
    "random_transposed",
    "random_depthwise",
    "sequential_models",
    "functional_models",
    "subclassed_models",
    "new_weights_are_followed",
    "saved_models_are_those_of_keras",
    "layers_that_are_left_alone",
    "choices_are_by_the_cost_model",
    "inputs_of_any_size",
    "models_that_xla_compiled",
    "nothing_is_printed",
    "digits",
    "random_thorough",
)
#: What takes long: TensorFlow traces what it computes, and JAX compiles it, for each shape.
SLOW = {
    "torch": {"digits", "random_thorough"},
    "tensorflow": {
        "random_convolutions",
        "sequential_models",
        "new_weights_are_followed",
        "functional_models",
        "subclassed_models",
        "saved_models_are_those_of_keras",
        "digits",
        "random_thorough",
    },
    "jax": {
        "random_convolutions",
        "random_transposed",
        "random_depthwise",
        "functional_models",
        "subclassed_models",
        "saved_models_are_those_of_keras",
        "inputs_of_any_size",
        "digits",
        "random_thorough",
    },
}


@pytest.mark.parametrize("is_slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "slow"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checks(backend, is_slow):
    names = [name for name in CHECKS if (name in SLOW[backend]) is is_slow]
    found = run_scenario(*names, worker=WORKER, timeout=1200, KERAS_BACKEND=backend)
    assert list(found) == names
    faults = [f"{name}:\n{fault}" for name, fault in found.items() if fault is not None]
    assert not faults, "\n".join(faults)
