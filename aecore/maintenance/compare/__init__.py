"""Compare two artefacts of one kind: how their settings differ, and how their contents do. Read-only.

Values of both sides are given as `[a, b]`. Memory does not grow with the artefacts: rows are joined by key, one part or one range of
keys at a time.
"""

from typing import Any

from aecore.artifact.kinds import STAGE_FOLDERS, detect_artifact
from aecore.errors import ConfigError, DataError
from aecore.maintenance.compare._datasets import compare_datasets
from aecore.maintenance.compare._runs import compare_runs
from aecore.maintenance.compare._tables import compare_tables
from aecore.store import Store, open_store

__all__ = ["compare", "compare_datasets", "compare_runs", "compare_tables"]

_COMPARE = {"run": compare_runs, "table": compare_tables}


def compare(a: str, b: str, *, values: bool = False) -> dict[str, Any]:
    """Compare two runs, tables, datasets, or the ones that two roots have in common; plain JSON data.

    With `values` the samples of datasets are decoded, and compared whatever files and keys they have.

    Raises
    ------
    ConfigError
        If the two are of different kinds, or `values` is asked for where there are no two datasets.
    DataError
        If one of them is no such artefact, or is unfinished or damaged.
    """
    stores = open_store(a), open_store(b)
    kinds = [_comparable(store) for store in stores]
    if kinds[0] != kinds[1]:
        found = " and ".join(f"{store.url} is a {kind}" for store, kind in zip(stores, kinds, strict=True))
        raise ConfigError(f"{found}: give two of one kind, for example two runs")
    kind, where = kinds[0], {"kind": kinds[0], "a": stores[0].url, "b": stores[1].url}
    if kind == "dataset":
        return {**where, **compare_datasets(stores[0].url, stores[1].url, values=values)}
    if kind != "root":
        if values:
            raise ConfigError(f"{stores[0].url} is a {kind}: the values of samples are those of datasets; leave --values out")
        return {**where, **_COMPARE[kind](stores[0].url, stores[1].url)}
    return {**where, **_stages(*stores, values=values)}


def _comparable(store: Store) -> str:
    """Return the kind of the artefact; DataError unless it is one that can be compared."""
    found = detect_artifact(store)
    if found is None:
        raise DataError(f"{store.url} holds no dataset, run or table to compare: check the address")
    if found.kind not in (*_COMPARE, "dataset", "root"):
        raise DataError(f"{store.url} is {found.name}: two datasets, runs, tables or roots are compared")
    return found.kind


def _stages(a: Store, b: Store, *, values: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in STAGE_FOLDERS:
        exists = [bool(open_store(f"{store.url}/{name}").list()) for store in (a, b)]
        if all(exists):
            found[name] = compare(f"{a.url}/{name}", f"{b.url}/{name}", values=values and name == "dataset")
        elif any(exists):
            found[name] = f"only in {'a' if exists[0] else 'b'}"
    if not any(isinstance(stage, dict) for stage in found.values()):
        raise DataError(f"{a.url} and {b.url} have no stage in common: give two runs, tables or datasets")
    return found
