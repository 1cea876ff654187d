"""Look for a secret where none may be: files of any kind (archives and Parquet pages are opened too) and texts."""

import base64
import gzip
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def find_canary(canaries: Iterable[str], *places: Path | str, texts: dict[str, str] | None = None) -> list[str]:
    """Return where one of the secrets stands: paths below `places`, or names of `texts`; AssertionError if nothing was searched.

    Looked for as it is, percent-encoded, in base64 and in UTF-16, since addresses, headers and pickles hold text in these ways.
    """
    needles = {needle: canary for canary in canaries for needle in _forms(canary)}
    found, searched = [], 0
    for place in map(Path, places):
        assert place.exists(), f"{place} is not there: nothing was searched"
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                searched += 1
                found += [f"{path}: {canary[:4]}..." for canary in _within(needles, _contents(path))]
    for name, text in (texts or {}).items():
        assert text, f"{name} is empty: nothing was searched"
        searched += 1
        found += [f"{name}: {canary[:4]}..." for canary in _within(needles, [text.encode()])]
    assert searched, "nothing was searched"
    return found


def _forms(canary: str) -> set[bytes]:
    forms = {canary.encode(), urllib.parse.quote(canary, safe="").encode(), canary.encode("utf-16-le")}
    for shift in range(3):  # base64 of a text depends on where it starts
        coded = base64.b64encode(b"\0" * shift + canary.encode())
        forms.add(coded[-(-shift * 8 // 6) + (shift > 0) : -4])
    return forms


def _within(needles: dict[bytes, str], contents: Iterable[bytes]) -> list[str]:
    return sorted({canary for content in contents for needle, canary in needles.items() if needle in content})


def _contents(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, and what is inside of it."""
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if data[:4] == b"PAR1" and data[-4:] == b"PAR1":
        yield _parquet(path)


def _parquet(path: Path) -> bytes:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    texts = [str(table.schema.metadata), *(str(column.to_pylist()) for column in table.columns if "string" in str(column.type))]
    return "\n".join(texts).encode()
