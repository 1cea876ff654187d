"""PURE: split a sequence of units into consecutive runs that stay within limits."""

import numpy as np
from numpy.typing import NDArray


def split_by_limits(*limits: tuple[NDArray[np.int64], int]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of N units: as many as fit all limits, at least one.

    Parameters
    ----------
    limits : pairs of `[N+1]` int64 and int
        An exclusive cumulative sum of the units' sizes (ascending, the total last), and the largest sum that a run may have.
    """
    runs, unit, num = list[tuple[int, int]](), 0, len(limits[0][0]) - 1
    while unit < num:
        fitting = min(int(np.searchsorted(sums, sums[unit] + most, side="right")) - 1 for sums, most in limits)
        runs.append((unit, max(fitting, unit + 1)))
        unit = runs[-1][1]
    return runs


def exclusive_cumsum(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of the sizes before each of N, and the total last: `[N+1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
