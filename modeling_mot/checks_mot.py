"""What numbers of callers are: bools are no numbers here, and NaN is none anywhere."""

import math
from numbers import Integral, Real
from typing import Any


def is_whole(value: Any, least: int = 1) -> bool:
    """True for a whole number of at least `least`; of NumPy's types too."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def is_real(value: Any) -> bool:
    """True for a finite number that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
