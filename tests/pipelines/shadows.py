"""A folder whose modules must never be imported: they have the names of what everything imports, and leave a mark when they run.

`pipelines` itself is not among them: `python -m pipelines.cli` without `-P` imports it before any of our code runs.
"""

from pathlib import Path

NAMES = ["aecore", "json", "logging", "numpy", "prefect", "pydantic", "random", "ray", "sitecustomize", "token", "torch", "uvicorn"]


def folder_of_shadows(place: Path) -> Path:
    """Make the folder and return it."""
    place.mkdir(parents=True)
    for name in NAMES:
        mark = f"open({str(place / 'ran')!r}, 'a').write('{name} ')"
        (place / f"{name}.py").write_text(f"{mark}\nraise ImportError('a shadow ran')\n")
    return place


def that_ran(place: Path) -> set[str]:
    """Return the names of the modules that were imported."""
    return set((place / "ran").read_text().split()) if (place / "ran").exists() else set()
