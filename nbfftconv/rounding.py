"""Rounding of integers to multiples: of Python's and NumPy's, and in compiled code."""

from numba.extending import register_jitable


@register_jitable
def cdiv(a, b):
    """Return the least integer that is at least a / b, for a positive b; of arrays, elementwise."""
    return -(-a // b)


@register_jitable
def round_up(a, b):
    """Return the least multiple of a positive b that is at least a; of arrays, elementwise."""
    return -(-a // b) * b
