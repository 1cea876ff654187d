"""Checkpoints on disk: `files` (which there are), `weights` and `config` (what they hold); how a model comes back from them.

Names that need torch are loaded when first used: `aepipe shard` and `aepipe show` start without it.
"""

from typing import TYPE_CHECKING, Any

from aecore.checkpoint.files import CheckpointRef

if TYPE_CHECKING:
    from aecore.checkpoint.weights import LoadedModel, load_model

__all__ = ["CheckpointRef", "LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:  # any: the object of that name
    if name not in ("LoadedModel", "load_model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aecore.checkpoint import weights

    return getattr(weights, name)
