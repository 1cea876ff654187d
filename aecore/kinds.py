"""What lies at an address, in words: for the error of a command that was given another kind of artefact than it works on."""

from aecore.errors import AecoreError
from aecore.generations import newest_number, read_json
from aecore.store import Store, open_store

STAGE_FOLDERS = ("dataset", "run", "table")
_NAMES = {
    "dataset": "a data set",
    "table": "a latent table",
    "run": "a training run",
    "checkpoint": "the checkpoint of a model",
    "root": "the root of a pipeline",
}
_USE = {
    "dataset": "train on it with `aepipe train RECIPE data={url} out=RUN`, encode it with `aepipe encode RUN {url} TABLE`",
    "table": "look at it with `aepipe show {url}`, which names its data set and its run",
    "run": "it is RUN of `aepipe encode RUN DATASET TABLE` and `aepipe evaluate RUN DATASET`",
    "checkpoint": "it is RUN of `aepipe encode RUN DATASET TABLE`",
}


_GENERATED = {
    "samples.json": ("samples", "samples of a model's prior, written by `aepipe sample`"),
    "decoded.json": ("decoded", "decoded latents, written by `aepipe decode`"),
    "figures.json": ("figures", "figures of a model, written by `aepipe evaluate --figures`"),
}


def generated_here(store: Store) -> tuple[str, str, str] | None:
    """Return kind, what it is in words, and the manifest's name of files that were made from a model; None if there are none."""
    return next(((*said, name) for name, said in _GENERATED.items() if store.size(name) is not None), None)


def kind_here(store: Store) -> str | None:
    """Return dataset, table, run (finished or not), checkpoint or root; None if none of them is there."""
    for kind in ("dataset", "table"):
        if newest_number(store, kind) is not None:
            return kind
    claim = newest_number(store, "run")
    if claim is not None:
        try:
            return str(read_json(store, f"run.{claim:06d}.json").get("kind")) or None
        except AecoreError:
            return None
    if store.size("checkpoint.json") is not None and store.size("model.safetensors") is not None:
        return "checkpoint"
    return "root" if any(open_store(f"{store.url}/{name}").list() for name in STAGE_FOLDERS) else None


def other_kind(store: Store, wanted: str) -> str | None:
    """Return the message for an address that holds another kind than `wanted` (dataset, table or run); None if it does not."""
    kind = kind_here(store)
    if kind is None or kind not in _NAMES or kind == wanted:
        return None
    said = f"{store.url} is {_NAMES[kind]}, expected {_NAMES[wanted]}"
    if kind == "root":
        there = [f"{store.url}/{name}" for name in STAGE_FOLDERS if open_store(f"{store.url}/{name}").list()]
        inside = f"{store.url}/{wanted}"
        return f"{said}: give {inside}" if inside in there else f"{said}: it holds {', '.join(there)}"
    return f"{said}: {_USE[kind].format(url=store.url)}"
