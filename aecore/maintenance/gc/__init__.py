"""Garbage collection: remove files that no manifest needs, and nothing else.

Garbage is temporary files, and files of killed or superseded attempts that no manifest (or checkpoint) names. Four safeguards: a file
must match the name patterns of aecore; all files of an attempt that may still run (any of them is younger than a limit) stay; files
that the same command would continue stay, unless `unfinished` gives them up; and what a damaged document may name stays until that is
restored or removed by hand. The highest claim is kept, so that its number stays taken
and a rerun writes the same names and bytes as without the collection. Killed at any instant, a collection can be run again.
"""

from aecore.maintenance.gc._collect import Report, collect_garbage
from aecore.maintenance.gc._plan import DAY_S
from aecore.maintenance.gc._root import superseded_folders

__all__ = ["DAY_S", "Report", "collect_garbage", "superseded_folders"]
