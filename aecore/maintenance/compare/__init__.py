"""Compare two artefacts of one kind: how their settings differ, and how their contents do. Read-only.

Values of both sides are given as `[a, b]`. Memory does not grow with the artefacts: rows are joined by key, one part or one range of
keys at a time.
"""

from typing import Any

from aecore.artifact.kinds import Artifact, detect_artifact
from aecore.artifact.root import STAGES
from aecore.errors import ConfigError, DataError
from aecore.maintenance.compare._datasets import compare_datasets
from aecore.maintenance.compare._runs import compare_runs
from aecore.maintenance.compare._tables import compare_tables
from aecore.store import Store, open_store

__all__ = ["compare", "compare_datasets", "compare_runs", "compare_tables"]

_COMPARE = {"run": compare_runs, "table": compare_tables}


def compare(a: str, b: str, *, values: bool = False) -> dict[str, Any]:
    """Compare two runs, tables, datasets, or the newest ones of two roots; plain JSON data.

    With `values` the samples of datasets are decoded, and compared whatever files and keys they have.

    Raises
    ------
    ConfigError
        If the two are of different kinds, or `values` is asked for where there are no two datasets.
    DataError
        If one of them is no such artefact, or is unfinished or damaged.
    """
    stores = open_store(a), open_store(b)
    both = [_comparable(store) for store in stores]
    kinds = [found.kind for found in both]
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
    return {**where, **_stages(*stores, *both, values=values)}


def _comparable(store: Store) -> Artifact:
    """Return what is there; DataError unless it can be compared."""
    found = detect_artifact(store)
    if found is None:
        raise DataError(f"{store.url} holds no dataset, run or table to compare: check the address")
    if found.kind not in (*_COMPARE, "dataset", "root"):
        raise DataError(f"{store.url} is {found.name}: two datasets, runs, tables or roots are compared")
    return found


def _stages(a: Store, b: Store, in_a: Artifact, in_b: Artifact, *, values: bool) -> dict[str, Any]:
    """Compare the dataset, the newest run and the newest table that both roots have; each says which they are."""
    found: dict[str, Any] = {}
    for name in STAGES:
        left, right = in_a.newest(name), in_b.newest(name)
        if left is not None and right is not None:
            found[name] = compare(f"{a.url}/{left}", f"{b.url}/{right}", values=values and name == "dataset")
        elif left is not None or right is not None:
            found[name] = f"only in {'b' if left is None else 'a'}"
    if not any(isinstance(stage, dict) for stage in found.values()):
        raise DataError(f"{a.url} and {b.url} have no stage in common: give two runs, tables or datasets")
    return found
