"""`aepipe gc`: removes the garbage of a dataset, run or table, or of all below a root, and there runs and tables that are superseded."""

import re
from typing import Any

from aecore.artifact.kinds import detect_artifact
from aecore.errors import ConfigError, DataError
from aecore.store import open_store
from pipelines.recipe.yaml import Tree

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def seconds_of(text: str, option: str = "--older-than") -> float:
    """Return the seconds of `90m`, `12h`, `7d`, `2w`; ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise ConfigError(f"{option} {text} is no duration: write a number and one of s, m, h, d, w, for example {option} 7d")
    return float(match[1]) * _UNITS[match[2]]


def gc(
    url: str,
    *,
    older_than: str,
    unfinished: bool,
    dry_run: bool,
    keep_generations: int = 2,
    retention: str = "7d",
    compact: float | None = None,
    copy: bool = False,
) -> Tree:
    """Remove garbage at `url`; return what was (with `dry_run`: would be) removed, what is kept for now, and unknown files.

    Of a root, the last `keep_generations` runs with their tables stay, and earlier ones whose successor is younger than `retention`.
    With `compact`, before that the shards of a dataset of which more than this share is removed are written again without it.
    """
    from aecore.maintenance.gc import collect_garbage, superseded_folders

    if copy and compact is None:
        raise ConfigError("--copy says that adopted tars are compacted too: give --compact SHARE with it, for example --compact 0.5")

    limits: dict[str, Any] = {  # any: arguments of `collect_garbage`
        "older_than_s": seconds_of(older_than),
        "keep_generations": keep_generations,
        "retention_s": seconds_of(retention, "--retention"),
        "unfinished": unfinished,
        "dry_run": dry_run,
    }
    store = open_store(url)
    found = detect_artifact(store)
    compaction: Tree = {}
    if compact is not None:
        from aecore.data.write.compact import compact_dataset

        if found is None or "dataset" not in (found.kind, *found.stages):
            what = "nothing of this package" if found is None else found.name
            raise ConfigError(
                f"--compact writes shards of a dataset again, and {store.url} is {what}: give a dataset, or a root that has one"
            )
        dataset = store.url if found.kind == "dataset" else f"{store.url}/dataset"
        compaction = {"compaction": compact_dataset(dataset, compact, copy=copy, dry_run=dry_run).to_dict()}
    if found is None or not found.stages:
        return {**collect_garbage(store.url, **limits).to_dict(), **compaction}
    superseded, later = superseded_folders(store.url, keep_generations=keep_generations, retention_s=limits["retention_s"])
    present = [name for name in found.stages if name not in superseded]
    stages, damaged = {}, []
    for name in (*(name for name in superseded if detect_artifact(open_store(f"{store.url}/{name}"))), *present):
        try:  # one that is damaged does not keep the others from being collected
            report = collect_garbage(f"{store.url}/{name}", superseded=name in superseded, **limits)
            stages[name] = {**report.to_dict(), **(compaction if name == "dataset" else {})}
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise DataError("\n".join(damaged))
    total = {key: sum(stage[key] for stage in stages.values()) for key in ("files", "bytes")}
    not_ours = [name for name in store.list() if name not in stages]
    facts = {"not_ours": not_ours, **({"superseded_later": later} if later else {}), "dry_run": dry_run}
    return {"kind": "root", "url": store.url, **total, **facts, "stages": stages}
