"""Datasets as versions before removal left them: they only grow until a run says otherwise."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from aecore.data.dataset import open_dataset
from aecore.data.format.index import LISTING_SCHEMA, read_table, table_bytes
from aecore.data.manifest import DatasetManifest
from aecore.store import FileRef
from tests.documents import content, rewrite


def grows_only(out: Path | str) -> DatasetManifest:
    """Make a dataset of one generation what an earlier version would have written, and return its manifest."""
    path = Path(out) / "dataset.000001.json"
    stated: dict[str, Any] = content(path)
    assert stated.pop("removal") == "drop" and stated.pop("content_sha256")
    (listing,) = stated["listings"]
    file = Path(out) / listing["name"]
    data = table_bytes(read_table(file.read_bytes(), str(file)).select(LISTING_SCHEMA.names), {"claim": 1})
    file.write_bytes(data)
    stated["listings"] = [dataclasses.asdict(FileRef(listing["name"], len(data), hashlib.sha256(data).hexdigest()))]
    path.write_text("{}")
    rewrite(path, **stated)
    return open_dataset(str(out)).manifest
