"""From files to shards to batches. Names are loaded when first used, so `import aecore.data` costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aecore.data.dataset import open_dataset
    from aecore.data.read.webdataset import as_webdataset

__all__ = ["as_webdataset", "open_dataset"]

_HOMES = {"as_webdataset": "aecore.data.read.webdataset", "open_dataset": "aecore.data.dataset"}


def __getattr__(name: str) -> Any:  # any: the object of that name
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
