"""gc: remove what nobody needs any more, and nothing else.

Garbage are the temporary files, and what killed or overtaken attempts left and no manifest (or checkpoint) names. Three fences: a
name has to be of our patterns; what an attempt that may still run has written (anything younger than a limit) stays, all of it;
and what the same command would continue stays, unless `unfinished` gives it up. The highest claim is kept as a number that is
taken, so a rerun writes the same names and bytes as if nothing had been removed. Killed at any instant, it can be run again.
"""

from aecore.maintenance.gc._collect import Report, collect_garbage
from aecore.maintenance.gc._plan import DAY_S

__all__ = ["DAY_S", "Report", "collect_garbage"]
