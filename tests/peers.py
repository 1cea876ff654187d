"""Libraries that we are compared with and that the lock cannot hold; `infra/bootstrap.py peers` puts them into a folder of their own."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / ".venv" / "peers"


def load(module: str) -> ModuleType:
    """Import a module of a peer; the folder comes last in the path, so it hides nothing. ImportError if it is not there."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(module)


def load_or_skip(module: str) -> ModuleType:
    """As `load`; a test is skipped where the peer is not there."""
    try:
        return load(module)
    except ImportError as error:
        pytest.skip(f"{module} is not installed ({error}): python3 infra/bootstrap.py peers", allow_module_level=True)
