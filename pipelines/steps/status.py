"""`aepipe status`: which generation of the dataset the runs and tables of a pipeline's root belong to. Reads only."""

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import CLAIM, read_json
from aecore.artifact.root import folder_of, generation_of, stage_folders
from aecore.checkpoint.files import MANIFEST
from aecore.errors import ConfigError
from aecore.store import open_store, recorded_url
from pipelines.recipe.yaml import Tree
from pipelines.steps.show import located


def status(url: str) -> Tree:
    """Return the generation of the dataset, and by run which one it was trained on and which one its table holds (plain JSON).

    `up_to_date` is whether the newest run is published and its table holds the newest generation; None if no dataset is found.
    """
    root = open_store(url)
    found = located(root)
    if found.kind != "root":
        raise ConfigError(f"{root.url} holds {found.name}, and the status is that of a pipeline's root: give the folder that it is in")
    numbers = sorted({generation_of(name) for name in found.stages if name != "dataset"})
    runs = {folder_of("run", number): _run(root.url, number) for number in numbers}
    data = _data(root.url, list(runs))
    newest = None if data is None else newest_number(open_store(data), "dataset")
    last: Tree = next(reversed(runs.values()), {})
    fresh = None if newest is None else bool(last.get("finished") and last.get("table_of_generation") == newest)
    return {"url": root.url, "dataset": data, "generation": newest, "runs": runs, "up_to_date": fresh}


def _data(root: str, runs: list[str]) -> str | None:
    """Return the root's own dataset, else the one of its newest run; None if neither is known."""
    if stage_folders(open_store(root).list(), "dataset"):
        return f"{root}/dataset"
    for store in (open_store(f"{root}/{name}") for name in reversed(runs)):
        if store.size(CLAIM) is not None:
            return recorded_url(read_json(store, CLAIM)["info"]["data"], f"the data in {store.url}/{CLAIM}")
    return None


def _run(root: str, number: int) -> Tree:
    """Return the facts of a run and of its table; None where there is none yet."""
    from aecore.table.manifest import STEM, read_table_manifest

    store, table = (open_store(f"{root}/{folder_of(stage, number)}") for stage in ("run", "table"))
    info = read_json(store, CLAIM)["info"] if store.size(CLAIM) is not None else {}
    made = newest_number(table, STEM)
    manifest = None if made is None else read_table_manifest(table, made)
    return {
        "trained_on_generation": info.get("dataset_number"),
        **({"init_from": info["init_from"]} if "init_from" in info else {}),
        "finished": store.size(f"model/{MANIFEST}") is not None,
        "table": folder_of("table", number),
        "table_generation": made,
        "table_of_generation": None if manifest is None else manifest.lineage["dataset"]["number"],
        "rows": None if manifest is None else manifest.num_rows,
    }
