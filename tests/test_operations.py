"""The operations that the cost model reckons with against those that the generated transforms have, counted.

The model's are fitted: nominal operations, 2.5·N·log2 N of N real values, and a rate for them. Counted are instructions
of arithmetic on vectors, a multiplication with an addition as one; so a rate that follows from them is that of a
machine that does nothing but arithmetic. What loads, stores, shuffles and registers that do not suffice cost on top of
that is the fitted rate's fraction of it, which should be much the same for all lengths.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy_emitter import NumpyEmitter

from nbfftconv import fitted_rates, rates
from nbfftconv.rounding import cdiv
from nbfftconv.transforms import codelets, four_step, row_codelets, row_four_step
from nbfftconv.transforms.butterflies import Complex, complex_transform, real_inverse, real_transform

ARITHMETIC = "add", "subtract", "multiply", "fma"  # a change of sign is part of what follows
OF_64_BYTES = fitted_rates.RATES[64]  # of narrower vectors, which wait for memory less, rates are higher


def count(compute):
    """Return the instructions of arithmetic of ``compute(v, values)``, where ``values(n)`` are complex."""
    v = NumpyEmitter(np.float64, 16)
    for x in compute(v, lambda n: [Complex(v, v.vector([1.0, 2.0]), v.vector([3.0, 4.0])) for _ in range(n)]):
        v.keep(x.re)
        v.keep(x.im)
    return sum(v.counts[instruction] for instruction in ARITHMETIC)


def of_rows(n):
    return count(lambda v, values: real_transform([Complex(v, x.re) for x in values(n)]))


def of_rows_inverse(n):
    return count(lambda v, values: [Complex(v, x.re) for x in real_inverse(values(n // 2 + 1), n)])


def of_columns(n):
    return count(lambda v, values: complex_transform(values(n), -1))


def in_two_steps(n):
    """Instructions of a four-step transform of `n` complex values."""
    n1, n2 = four_step.STEPS[n]

    def compute(v, values):
        factors = v.put(np.ones(2 * n1))
        for _ in range(n2):
            yield from four_step._times_factors(v, complex_transform(values(n1), -1), factors, 1)
        for _ in range(n1):
            yield from complex_transform(values(n2), -1)

    return count(compute)


def test_counts_that_are_known():
    """By hand; what nobody needs is not counted. Four real values have one addition of a zero, as 0·i has."""
    assert of_columns(2) == 4
    assert of_columns(4) == 16
    assert of_columns(8) == 2 * 16 + 4 * 4 + 2 * 4
    assert of_rows(2) == 2
    assert of_rows(4) == 6 + 1


def nominal(n):
    return 2.5 * n * math.log2(n)


@pytest.mark.parametrize("length", codelets.SIDES)
def test_rates_of_codelets_follow_from_counts(length):
    """Rates are 0.65 of what arithmetic alone would do for short transforms, 0.45 for others: within a quarter."""
    instructions = (of_rows(length) + of_rows_inverse(length)) / 2, of_columns(length) / 2
    counted = nominal(length) / sum(instructions)  # of two transforms, at 2 operations an instruction
    efficiency = OF_64_BYTES["codelet"]["flops"][f"length_{length}"] / counted
    assert efficiency == pytest.approx(0.65 if length <= 16 else 0.45, rel=0.25)


@pytest.mark.parametrize("length", four_step.SIDES)
def test_the_rate_of_four_step_transforms_follows_from_counts(length):
    """One rate for all lengths is 0.44 of what arithmetic alone would do, within a quarter."""
    counted = nominal(length) / in_two_steps(length)  # of two columns at once
    assert OF_64_BYTES["four_step"]["flops"]["transform"] / counted == pytest.approx(0.44, rel=0.25)


@pytest.mark.parametrize("length", row_codelets.LENGTHS)
def test_the_rate_of_codelets_of_rows_follows_from_counts(length):
    """One rate for all lengths is a fifth of what arithmetic would do: samples are transposed, and stored thrice."""
    n1, n2 = row_codelets.STEPS[length]
    factors = 4 * (n1 // 2) * n2
    instructions = n2 * of_rows(n1) + factors + of_rows(n2) + n1 // 2 * of_columns(n2)
    counted = nominal(length) / (2 * instructions)
    assert OF_64_BYTES["row_codelet"]["flops"]["transform"] / counted == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("length", row_four_step.LENGTHS)
def test_the_rate_of_long_rows_follows_from_counts(length):
    """One rate for all lengths is 0.37 of what arithmetic alone would do, within a quarter."""
    n1, n2 = row_four_step.MATRICES[length]
    rows = cdiv(n1 // 2 + 1, 16) * 16  # of frequencies k1
    instructions = n2 / 2 * in_two_steps(n1) + 4 * rows * n2 + rows * in_two_steps(n2)
    operations = row_four_step.TRANSFORM.operations(1, length, rows * n2).base
    of_64_bytes = OF_64_BYTES["row_four_step"]["flops"]["transform"] / rates.of("row_four_step")["transform"]
    assert of_64_bytes * 2 * instructions / operations == pytest.approx(0.37, rel=0.25)


def test_nominal_operations_are_those_of_the_cost_model():
    sides = np.array(codelets.SIDES)
    operations = codelets.TRANSFORM.operations(sides, sides, None)
    for side, base, row in zip(sides, operations.base, operations.row, strict=True):
        assert base + side * row == pytest.approx(2 * side * nominal(side) / rates.of("codelet")[f"length_{side}"])
    sides = np.array(four_step.SIDES)
    operations, of = four_step.TRANSFORM.operations(sides, sides, 1.0), rates.of("four_step")
    for side, base, column in zip(sides, operations.base, operations.column, strict=True):
        rate = of["tall" if side > four_step._TALL else "transform"]
        assert column == pytest.approx(nominal(side) / rate)
        assert side * base == pytest.approx(2 * nominal(side) / of["transform"])
