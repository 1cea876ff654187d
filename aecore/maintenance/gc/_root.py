"""The runs and tables of a pipeline's root that newer ones have superseded."""

from aecore.artifact.commit import newest_number
from aecore.artifact.root import folder_of, generation_of, stage_folders
from aecore.checkpoint.files import MANIFEST
from aecore.maintenance.gc._collect import WEEK_S, require_one_stays, written_before
from aecore.store import Store, open_store
from aecore.table.manifest import STEM


def superseded_folders(
    url: str, *, keep_generations: int = 2, retention_s: float = WEEK_S, now: float | None = None
) -> tuple[list[str], list[str]]:
    """Return the folders of runs and tables of the root at `url` that may be removed, and those that may be later.

    A run that is published counts as a generation with its table. The last `keep_generations` of them stay, and all that is newer than the
    oldest of these. Earlier ones go when the table that followed theirs was committed more than `retention_s` ago. Of one generation
    the table comes first.
    """
    require_one_stays(keep_generations)
    root = open_store(url)
    folders = stage_folders(root.list())
    numbers = sorted({generation_of(name) for name in folders if name != "dataset"})
    complete = {number: table for number in numbers if (table := _complete(root, number)) is not None}
    kept = [*complete][-keep_generations:]
    over = [number for number in numbers if number < kept[0]] if len(kept) == keep_generations else []
    if not over:
        return [], []
    before = now - retention_s if now is not None else written_before(complete[kept[-1]], retention_s)[0]
    gone, later = list[int](), list[int]()
    for number in over:
        followed = complete[next(each for each in complete if each > number)]
        written = followed.modified(next(name for name in followed.list() if name.startswith(f"{STEM}.")))
        (later if written is None or written > before else gone).append(number)
    return _folders(gone, folders), _folders(later, folders)


def _folders(numbers: list[int], there: list[str]) -> list[str]:
    named = [folder_of(stage, number) for number in numbers for stage in ("table", "run")]
    return [name for name in named if name in there]


def _complete(root: Store, number: int) -> Store | None:
    """Return the table of a run that is published and has one."""
    run, table = (open_store(f"{root.url}/{folder_of(stage, number)}") for stage in ("run", "table"))
    return None if run.size(f"model/{MANIFEST}") is None or newest_number(table, STEM) is None else table
