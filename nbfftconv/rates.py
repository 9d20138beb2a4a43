"""Rates of the cost model that cannot be counted, only measured: reads them from `fitted_rates`.

That module has a table for vectors of 64 bytes and one for all that are narrower: for each implementation and
transform, by the unit, a number for each name: fractions of the machine's `flops` and `bandwidth`, or seconds. What the
names stand for is said where they are asked for. `perf/fit_costs.py` fits and writes them.
"""

import math
from typing import Any

from nbfftconv import fitted_rates
from nbfftconv.target import TARGET

#: Units: a fraction of a figure of the machine, or seconds.
UNITS = ("flops", "bandwidth", "seconds")


Rates = dict[str, dict[str, dict[str, float]]]


def checked(content: Any) -> Rates:
    """Return rates, by owner, unit and name, if they are such.

    Parameters
    ----------
    content : dict

    Returns
    -------
    dict
        The same: of positive numbers.

    Raises
    ------
    ValueError
        If a unit is unknown, a rate is no positive number, or a name is given twice.
    """
    if not isinstance(content, dict):
        raise ValueError(f"rates must be a dictionary, got {content!r}")
    for owner, by_unit in content.items():
        if not isinstance(by_unit, dict) or not set(by_unit) <= set(UNITS):
            raise ValueError(f"the rates of {owner} must be by their units, of {', '.join(UNITS)}, got {by_unit!r}")
        seen: set[str] = set()
        for unit, by_name in by_unit.items():
            if not isinstance(by_name, dict):
                raise ValueError(f"the rates of {owner} in {unit} must have names, got {by_name!r}")
            for name, rate in by_name.items():
                if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
                    raise ValueError(f"the rate {name} of {owner} must be positive and finite, got {rate!r}")
                if name in seen:
                    raise ValueError(f"the rate {name} of {owner} is given in two units")
                seen.add(name)
    return content


#: The bytes of vectors whose table is in force.
WIDTH = 64 if TARGET.vector_bytes == 64 else 32
#: All rates of it: by owner, unit and name.
RATES = checked(fitted_rates.RATES[WIDTH])
_flat = {
    owner: {name: rate for by_name in by_unit.values() for name, rate in by_name.items()}
    for owner, by_unit in RATES.items()
}


def of(name: str) -> dict[str, float]:
    """Return the rates of an implementation or a transform, by their names.

    It is the same dictionary every time: who changes it, as the fit does for a moment, changes the model.

    Parameters
    ----------
    name : str
        That of the implementation or transform.

    Returns
    -------
    dict
        Fractions, or seconds.

    Raises
    ------
    ValueError
        If there are none.

    Examples
    --------
    >>> from nbfftconv import rates
    >>> 0 < rates.of("fft")["read"] < 2
    True
    """
    try:
        return _flat[name]
    except KeyError:
        raise ValueError(f"there are rates of {', '.join(_flat)}, not of {name!r}") from None
