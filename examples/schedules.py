"""How learning rate, eps and beta change: functions of progress, the share of the training that is done, in [0, 1).

They have no state, so a resumed run needs to know nothing but where it stopped.
"""

import math
from collections.abc import Sequence


def piecewise(progress: float, drops: Sequence[float]) -> float:
    """A tenth at each of the drops."""
    return 0.1 ** sum(progress >= drop for drop in drops)


def cosine(progress: float) -> float:
    """From 1 down to 0 along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def ramp(progress: float, fraction: float) -> float:
    """From 0 up to 1 along a line over the first `fraction` of the training; 1 throughout where that is 0."""
    return min(1.0, progress / fraction) if fraction > 0 else 1.0
