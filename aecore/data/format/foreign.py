"""What bytes are that are neither an image nor an array that is read here: named by how they begin, with what to do. Nothing is parsed."""

import re

from aecore.data.format.bad_sample import BadSample

_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<!--.{0,500}?-->\s*)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_XML_ERROR = re.compile(rb"\s*(?:<\?xml[^>]{0,200}>\s*)?<Error\b", re.DOTALL)
_CONVERT = "convert it to PNG, TIFF or JPEG"
_STARTS = (  # offset, bytes, what it is, what to do
    (0, b"PK\x03\x04", "a zip archive (or a document that is one)", "unpack it and give the folder"),
    (0, b"\x1f\x8b", "gzip'ed", "decompress it (gunzip)"),
    (0, b"BZh", "bzip2'ed", "decompress it (bunzip2)"),
    (0, b"\xfd7zXZ\0", "xz'ed", "decompress it (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it (unzstd)"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the folder"),
    (0, b"Rar!", "a rar archive", "unpack it and give the folder"),
    (257, b"ustar", "a tar", "unpack it, or shard tars by source.kind=webdataset"),
    (0, b"%PDF", "a PDF document", "render its pages to PNG"),
    (0, b"%!PS", "a PostScript document", "render its pages to PNG"),
    (0, b"8BPS", "a Photoshop file", _CONVERT),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", _CONVERT),
    (0, b"v/1\x01", "an OpenEXR image", _CONVERT),
    (0, b"#?RADIANCE", "a Radiance HDR image", _CONVERT),
    (0, b"\0\0\x01\0", "an icon (ICO)", _CONVERT),
    (0, b"DDS ", "a DDS texture", _CONVERT),
    (0, b"qoif", "a QOI image", _CONVERT),
    (0, b"FUJIFILM", "a camera raw file", "develop it to 16-bit TIFF or PNG"),
    (128, b"DICM", "a DICOM file", "save its voxels as .npy, or its slices as 16-bit PNG"),
    (344, b"n+1\0", "a NIfTI volume", "save its voxels as .npy"),
    (344, b"ni1\0", "a NIfTI volume", "save its voxels as .npy"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save each sample as .npy"),
    (0, b"CDF\x01", "a NetCDF file", "save each sample as .npy"),
    (0, b"MATLAB 5.0 MAT-file", "a MATLAB file", "save each sample as .npy"),
    (0, b"SIMPLE  =", "a FITS file", "save its data as .npy"),
    (0, b"PAR1", "a Parquet file", "write its images as files, or its arrays as .npy"),
    (0, b"ARROW1", "an Arrow file", "write its images as files, or its arrays as .npy"),
    (0, b"\x93NUMPY", "a .npy array", "name it .npy and set source.extensions=[npy]"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", "name it .png"),
    (0, b"\xff\xd8\xff", "a JPEG image", "name it .jpg"),
    (8, b"WAVE", "a WAV recording", "save it as a sequence, .npy"),
    (8, b"AVI ", "an AVI video", "extract its frames as PNG"),
    (0, b"OggS", "audio or video (Ogg)", "save sequences as .npy, frames as PNG"),
    (0, b"ID3", "an MP3", "save it as a sequence, .npy"),
    (0, b"fLaC", "a FLAC recording", "save it as a sequence, .npy"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", "extract its frames as PNG"),
    (0, b"SQLite format 3\0", "an SQLite database", "write its images as files"),
    (0, b"\x80\x04\x95", "a pickle, which is never read, since reading runs what it holds", "save the array with numpy.save"),
)
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim"), "a HEIC image"
)
_LOOKED_AT = 1024


def explained(data: bytes, ext: str, bad: BadSample) -> BadSample:
    """Return `bad`, the error about the bytes of a file of extension `ext`, with what they are, if they are known to be something else."""
    if bad.reason not in ("decode", "format") or _is_read_as(data, ext):
        return bad
    found = _named(data[:_LOOKED_AT])
    if found is None:
        return bad
    reason, what, remedy = found
    return (
        BadSample(reason, f"{what}, not the file itself: {remedy}")
        if reason
        else BadSample(bad.reason, f"{bad.message}; it is {what}: {remedy}")
    )


def what_it_is(start: bytes) -> str:
    """Return "; it is ...: what to do" for the first bytes of a file that is not what its name says, "" if they are unknown."""
    found = _named(start[:_LOOKED_AT])
    return "" if found is None else f"; it is {found[1]}: {found[2]}"


def _is_read_as(data: bytes, ext: str) -> bool:
    """Return whether the bytes begin like what the extension is read as: then `bad` says what is wrong with them."""
    return data.startswith(b"\x93NUMPY") if ext == "npy" else data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8"))


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
    for offset, magic, what, remedy in _STARTS:
        if start[offset : offset + len(magic)] == magic:
            return what, remedy
    if start[4:8] == b"ftyp":
        brands = {start[8:12], *(start[at : at + 4] for at in range(16, 32, 4))}
        for brand, what in _BRANDS.items():
            if brand in brands:
                return what, _CONVERT
        return "a video (MP4, MOV)", "extract its frames as PNG"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"<svg", b"<?xml")):
        return ("an SVG drawing", "render it to PNG") if b"<svg" in start else ("XML text", "download it again, or remove it")
    if len(start) > 2 and start[0:1] == b"P" and start[1:2] in b"123456" and start[2:3] in b" \t\r\n":
        return "a PNM image", _CONVERT
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
