"""What bytes are that are neither an image nor an array that is read here, by how they begin, and what to do with them.

Nothing is parsed. The kinds of files are those of `file_kinds`; pointers and pages in place of a file are named here.
"""

import re

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.file_kinds import DRAWINGS, IMAGES, JPEG, NPY, PNG, TABLE, VIDEOS, remedy_for
from aecore.errors import counted

_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<!--.{0,500}?-->\s*)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_XML_ERROR = re.compile(rb"\s*(?:<\?xml[^>]{0,200}>\s*)?<Error\b", re.DOTALL)
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim"), "a HEIC image"
)
_LOOKED_AT, _STRAY_BYTES = 1024, 1 << 16  # from the beginning; in the second an image or array is searched behind stray bytes
_LATER = re.compile(b"|".join(map(re.escape, (JPEG, PNG, NPY))))
_READ = (PNG, JPEG[:2], NPY, b"GIF8", b"RIFF", b"BM", b"II", b"MM")  # such a file may hold others


def explained(data: bytes, ext: str, bad: BadSample) -> BadSample:
    """Return `bad`, the error about the bytes of a file of extension `ext`, with what they are, if they are known to be something else."""
    if bad.reason not in ("decode", "format") or _is_read_as(data, ext):
        return bad
    found = _named(data[:_LOOKED_AT]) or _behind_stray_bytes(data)
    if found is None:
        return bad
    reason, what, remedy = found
    return (
        BadSample(reason, f"{what}, not the file itself: {remedy}")
        if reason
        else BadSample(bad.reason, f"{bad.message}; it is {what}: {remedy}")
    )


def _behind_stray_bytes(data: bytes) -> tuple[str, str, str] | None:
    """Return what `_named` does for an image or array that begins later in a file of unknown bytes."""
    found = None if data.startswith(_READ) else _LATER.search(data, 1, _STRAY_BYTES)
    what = None if found is None else _format(data[found.start() : found.start() + _LOOKED_AT])
    if found is None or what is None:
        return None
    remedy = f"cut these off (`tail -c +{found.start() + 1} NAME > NEW`), or save it again"
    return "", f"{what[0]} with {counted(found.start(), 'byte', 'bytes')} before its beginning", remedy


def what_it_is(start: bytes) -> str:
    """Return "; it is ...: what to do" for the first bytes of a file that is not what its name says, "" if they are unknown."""
    found = _named(start[:_LOOKED_AT])
    return "" if found is None else f"; it is {found[1]}: {found[2]}"


def _is_read_as(data: bytes, ext: str) -> bool:
    """Return whether the bytes begin like what the extension is read as: then `bad` says what is wrong with them."""
    return data.startswith(NPY) if ext == "npy" else data.startswith((PNG, JPEG[:2]))


def _named(start: bytes) -> tuple[str, str, str] | None:
    """Return the reason in a quarantine, if it has one of its own, what the bytes are and what to do; None if they are not known."""
    if start.startswith(_LFS):
        return "lfs_pointer", "a Git LFS pointer", "fetch it with `git lfs pull`"
    if start.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "annex_pointer", "a git-annex pointer", "fetch it with `git annex get`"
    if _HTML.match(start):
        return "html", "an HTML page (a log-in or an error page of a server)", "download it again"
    if _XML_ERROR.match(start):
        return "xml", "an error message in XML (the answer of a server)", "download it again"
    found = _format(start)
    return None if found is None else ("", *found)


def _format(start: bytes) -> tuple[str, str] | None:
    for kind in TABLE:
        for offset, magic, what in kind.starts:
            if start[offset : offset + len(magic)] == magic:
                return what, remedy_for(kind, one=True)
    if start[4:8] == b"ftyp":
        brands = {start[8:12], *(start[at : at + 4] for at in range(16, 32, 4))}
        for brand, what in _BRANDS.items():
            if brand in brands:
                return what, remedy_for(IMAGES, one=True)
        return "a video (MP4, MOV)", remedy_for(VIDEOS, one=True)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"<svg", b"<?xml")):
        return ("an SVG drawing", remedy_for(DRAWINGS, one=True)) if b"<svg" in start else ("XML text", "download it again, or remove it")
    if len(start) > 2 and start[0:1] == b"P" and start[1:2] in b"123456" and start[2:3] in b" \t\r\n":
        return "a PNM image", remedy_for(IMAGES, one=True)
    if text and text[:1] in b"{[" and _is_text(text):
        return "JSON text", "download it again if a server answered with it, or remove it"
    if _is_text(start):
        return "plain text", "it may be a pointer or a message in place of the file: fetch the file itself"
    return None


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text) and all(char.isprintable() or char in "\t\r\n\f" for char in text)
