"""The folders of a pipeline's root: `dataset/`, and a run and a table for each time that the model was trained.

    dataset/  run/  table/                     the first run, and the table that it encodes
              run-g000007/  table-g000007/     one that was trained again, when the dataset had generation 7

A run and its table have the same suffix. Which generation a run was trained on is what its claim says: one that another command commits
between the choice of the name and the claim is the one that counts. Later suffixes are of later runs; nothing here removes an earlier one.
"""

import re
from collections.abc import Iterable

STAGES = ("dataset", "run", "table")
_FOLDER = re.compile(r"(dataset|run|table)|(run|table)-g(\d{6,})")


def stage_of(folder: str) -> str | None:
    """Return the kind of the artefact in a folder of a root: dataset, run or table; None for any other name."""
    match = _FOLDER.fullmatch(folder)
    return None if match is None else match[1] or match[2]


def generation_of(folder: str) -> int:
    """Return the number in the name of a folder, 0 for those of the first run."""
    match = _FOLDER.fullmatch(folder)
    return int(match[3]) if match is not None and match[3] else 0


def folder_of(stage: str, generation: int) -> str:
    """Return the folder of a run or table that was made for a generation of the dataset; 0: of the first one."""
    return f"{stage}-g{generation:06d}" if generation else stage


def stage_folders(names: Iterable[str], stage: str | None = None) -> list[str]:
    """Return those of the names that are folders of a root, or of one stage: dataset, runs, tables, each from the first to the newest."""
    found = [name for name in names if stage_of(name) is not None and stage in (None, stage_of(name))]
    return sorted(found, key=lambda name: (STAGES.index(str(stage_of(name))), generation_of(name)))
