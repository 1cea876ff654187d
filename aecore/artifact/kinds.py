"""What is located at a URL: the one detector for all callers, and the names of kinds in messages.

The newest manifest decides, then the newest claim, then `checkpoint.json`, then the folders of a pipeline's root, then the manifests of
what was drawn from a model. It reads one listing of the URL, and the claim where there is no manifest.
"""

from dataclasses import dataclass

from aecore.artifact.commit import newest_of
from aecore.artifact.documents import read_json
from aecore.artifact.root import STAGES, stage_folders, stage_of
from aecore.errors import DataError, Hint
from aecore.store import Store, open_store


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a message calls a kind of artefact, and the manifest of what was drawn from a model."""

    name: str
    manifest: str | None = None


_KINDS = {
    "dataset": _Kind("a dataset"),
    "table": _Kind("a latent table"),
    "run": _Kind("a training run"),
    "checkpoint": _Kind("the checkpoint of a model"),
    "root": _Kind("the root of a pipeline"),
    "samples": _Kind("samples of a model's prior", "samples.json"),
    "decoded": _Kind("decoded latents", "decoded.json"),
    "figures": _Kind("figures of a model", "figures.json"),
}
KINDS = tuple(_KINDS)


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is located at a URL: one of `KINDS`, and the file that shows it (None for a root, which has the folders `stages`)."""

    kind: str
    file: str | None
    stages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in messages: "a dataset", "the checkpoint of a model"."""
        return _KINDS[self.kind].name

    def newest(self, stage: str) -> str | None:
        """Return the folder of the newest dataset, run or table of a root; None if it has none."""
        return next((name for name in reversed(self.stages) if stage_of(name) == stage), None)

    @property
    def is_generated(self) -> bool:
        """Whether it was drawn from a model: samples, decoded latents, figures. No hashes of these are kept."""
        return _KINDS[self.kind].manifest is not None

    @property
    def is_unfinished(self) -> bool:
        """Whether it is a dataset or a table that was claimed and never committed."""
        return self.kind in ("dataset", "table") and self.file is not None and self.file.startswith("run.")


def detect_artifact(store: Store) -> Artifact | None:
    """Return what is located at the URL of `store`, finished or not; None if it is no artefact of aecore.

    Raises
    ------
    DataError
        If the claim is damaged, of a newer format, or of an unknown kind.
    """
    names = store.list()
    for kind in ("dataset", "table"):
        if (number := newest_of(names, kind)) is not None:
            return Artifact(kind, f"{kind}.{number:06d}.json")
    if (number := newest_of(names, "run")) is not None:
        return _claimed(store, f"run.{number:06d}.json")
    if "checkpoint.json" in names:
        return Artifact("checkpoint", "checkpoint.json")
    stages = tuple(name for name in stage_folders(names) if open_store(f"{store.url}/{name}").list())
    if stages:
        return Artifact("root", None, stages)
    return next((Artifact(name, kind.manifest) for name, kind in _KINDS.items() if kind.manifest in names), None)


def _claimed(store: Store, name: str) -> Artifact:
    claim = read_json(store, name)
    kind = claim.get("kind") or ("run" if "model" in claim.get("identity", ()) else None)
    if kind not in STAGES:
        raise DataError(f"{store.url}/{name} has kind {kind!r}, expected dataset, run or table: it is damaged or was not written by aecore")
    return Artifact(str(kind), name)


def other_kind(store: Store, wanted: str) -> DataError | None:
    """Return the error for an address that holds another kind than `wanted` (dataset, table or run); None if it does not."""
    found = detect_artifact(store)
    if found is None or found.kind == wanted:
        return None
    inside = [f"{store.url}/{name}" for name in found.stages]
    newest = found.newest(wanted)
    if newest is not None:
        remedy = f"give {store.url}/{newest}"
    else:
        remedy = f"it holds {', '.join(inside)}" if inside else "give another address"
    message = f"{store.url} is {found.name}, expected {_KINDS[wanted].name}: {remedy}"
    return DataError(message, hint=None if inside else Hint(f"is-{found.kind}", {"url": store.url}))
