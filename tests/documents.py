"""The small JSON files of artefacts in tests: read without a check, and written again with the hash that belongs to them."""

import json
from pathlib import Path
from typing import Any

from aecore.artifact.documents import sealed


def content(path: Path) -> dict[str, Any]:
    """Return what a file says, without format and hash."""
    return {key: value for key, value in json.loads(path.read_bytes()).items() if key not in ("format", "sha256")}


def rewrite(path: Path, **changes: Any) -> None:
    """Change values of a file as somebody would who also writes its hash anew."""
    path.write_bytes(sealed({**content(path), **changes}))
