"""PURE: cut a row of units into runs that stay within limits."""

import numpy as np
from numpy.typing import NDArray


def split_by_limits(*limits: tuple[NDArray[np.int64], int]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of N units: as many as fit all limits, at least one.

    A limit is what stands before each unit and at the end, `[N+1]` and ascending, and the most that a run may have of it.
    """
    runs, unit, num = list[tuple[int, int]](), 0, len(limits[0][0]) - 1
    while unit < num:
        fitting = min(int(np.searchsorted(before, before[unit] + most, side="right")) - 1 for before, most in limits)
        runs.append((unit, max(fitting, unit + 1)))
        unit = runs[-1][1]
    return runs


def exclusive_cumsum(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums before each of N sizes and of all, `[N+1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
