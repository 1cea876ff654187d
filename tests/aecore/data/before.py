"""Datasets as versions before removal left them: they only grow until a run says otherwise."""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

from aecore.artifact.documents import sealed
from aecore.data.dataset import open_dataset
from aecore.data.format.index import LISTING_SCHEMA, read_table, table_bytes
from aecore.data.manifest import DatasetManifest
from aecore.store import FileRef
from tests.documents import content


def grows_only(out: Path | str) -> DatasetManifest:
    """Make a dataset of which nothing was removed what an earlier version would have written, and return its newest manifest."""
    refs: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(out).glob("listings/*.parquet")):
        data = table_bytes(read_table(file.read_bytes(), str(file)).select(LISTING_SCHEMA.names), {"claim": int(file.stem)})
        file.write_bytes(data)
        name = f"listings/{file.name}"
        refs[name] = dataclasses.asdict(FileRef(name, len(data), hashlib.sha256(data).hexdigest()))
    for path in Path(out).glob("dataset.*.json"):
        stated: dict[str, Any] = content(path)
        assert stated.pop("removal") == "drop" and stated.pop("content_sha256")
        path.write_bytes(sealed({**stated, "listings": [refs[ref["name"]] for ref in stated["listings"]]}))
    shutil.rmtree(Path(out) / "report", ignore_errors=True)
    return open_dataset(str(out)).manifest
