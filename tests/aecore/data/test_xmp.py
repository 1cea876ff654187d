"""An orientation that only XMP says, or EXIF as a text of a PNG, is applied as Pillow does; where EXIF has one, that counts."""

import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from aecore.data.dataset import open_dataset
from aecore.data.format.decode import Decoder, Reading
from aecore.data.format.sample_format import SampleFormat
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.convert import prepare
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import examine, facts_of
from tests.aecore.data.forms import exif, noise, png_chunk, png_with, saved

PICTURE = Image.fromarray(noise(np.random.default_rng(9), 12, 20, 3))
PACKET = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description {}</rdf:RDF></x:xmpmeta>'
FORMS = {
    "attribute": 'tiff:Orientation="{}"/>',
    "element": "><tiff:Orientation>{}</tiff:Orientation></rdf:Description>",
    "quoted otherwise": "tiff:Orientation='{}'/>",
    "another": 'tiff:Orientations="{}"/>',
}


def packet(form: str, orientation: object) -> bytes:
    return PACKET.format(FORMS[form].format(orientation)).encode()


def without_tag() -> bytes:
    found = Image.Exif()
    found[0x010F] = "maker"
    return found.tobytes()


def with_xmp(kind: str, xmp: bytes, **options: Any) -> bytes:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=options.pop("zip", False))
        return saved(PICTURE, "PNG", pnginfo=info, **options)
    if kind == "TIFF":
        return saved(PICTURE, "TIFF", tiffinfo={700: xmp}, **options)
    return saved(PICTURE, kind, xmp=xmp, **({"lossless": True} if kind == "WEBP" else {}), **options)


def agree(data: bytes, ext: str) -> Image.Image:
    """Check size and pixels against Pillow's, by both decoders, and return these; compiled facts are those of their twin."""
    with Image.open(io.BytesIO(data)) as image:
        wanted = ImageOps.exif_transpose(image)
    header, kept = prepare(data, ext, ShardSpec(check="decode"))
    assert (header.width, header.height) == wanted.size
    for decoder in ("imagecodecs", "pillow"):
        pixels = Decoder(Reading(decoder), SampleFormat.parse(header.format_text)).batch([kept])[0]
        np.testing.assert_allclose(pixels.astype(float), np.asarray(wanted).reshape(pixels.shape), atol=3)
    assert examine(BytesColumn.from_bytes([data]))[0].tolist() == facts_of(memoryview(data))
    return wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_that_of_xmp_counts_where_exif_has_none(kind: str, form: str) -> None:
    """Pillow turned these, and the pixels that were stored were as they are in the file."""
    for orientation in (*range(10), "x"):
        wanted = agree(with_xmp(kind, packet(form, orientation)), kind.lower())
        assert (wanted.size == (12, 20)) == (form in ("attribute", "element") and orientation in (5, 6, 7, 8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_that_of_exif_goes_first(kind: str) -> None:
    for block, orientation in itertools.product((exif(1).tobytes(), exif(3).tobytes(), exif(8).tobytes(), without_tag()), (1, 6)):
        agree(with_xmp(kind, packet("attribute", orientation), exif=block), kind.lower())


def test_a_packed_text_of_a_png_and_exif_as_text_count_too() -> None:
    assert agree(with_xmp("PNG", packet("element", 6), zip=True), "png").size == (12, 20)
    raw = f"\nexif\n{len(exif(6).tobytes()):8}\n{exif(6).tobytes().hex()}\n"
    for packed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", raw, zip=packed)
        assert agree(saved(PICTURE, "PNG", pnginfo=info), "png").size == (12, 20)
    plain = saved(PICTURE, "PNG")
    for text in (
        b"zTXtRaw profile type exif\0\0damaged",
        b"tEXtRaw profile type exif\0\n\n\nzz",
        b"iTXtXML:com.adobe.xmp\0\1\0\0\0damaged",
    ):
        header, kept = prepare(png_with(plain, png_chunk(text[:4], text[4:])), "png", ShardSpec(check="decode"))
        assert (header.width, header.height) == (20, 12)
        Decoder(Reading(), SampleFormat.parse(header.format_text)).batch([kept])


def test_a_packed_text_that_inflates_without_end_is_cut() -> None:
    text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1 << 26), 9)
    data = png_with(saved(PICTURE, "PNG"), png_chunk(b"iTXt", text))
    header, _ = prepare(data, "png", ShardSpec(check="decode"))
    assert (header.width, header.height) == (20, 12)


def test_of_several_packets_the_last_one_counts() -> None:
    data = saved(PICTURE, "JPEG", xmp=packet("attribute", 6))
    second = b"http://ns.adobe.com/xap/1.0/\0" + packet("element", 1)
    agree(data[:2] + b"\xff\xe1" + struct.pack(">H", len(second) + 2) + second + data[2:], "jpeg")
    at = data.index(b"\xff\xdb")
    agree(data[:at] + b"\xff\xe1" + struct.pack(">H", len(second) + 2) + second + data[at:], "jpeg")


def test_plain_files_in_one_block_with_turned_ones_have_their_own_sizes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        kind, ext = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
        orientation = (1, 1, 8, 1)[number % 4] if number % 2 == 0 else (1, 6)[number % 4 == 3]
        (tmp_path / f"in/{number:02}.{ext}").write_bytes(with_xmp(kind, packet("attribute", orientation)))
    shard_dataset(FolderSpec(url=str(tmp_path / "in")), str(tmp_path / "out"), shards=ShardSpec(shuffle=False))
    dataset = open_dataset(str(tmp_path / "out"))
    for shard in dataset.manifest.shards:
        index = dataset.reader(shard).index
        for key, width in zip(index["key"].to_pylist(), index["width"].to_pylist(), strict=True):
            with Image.open(next((tmp_path / "in").glob(f"{key.rpartition('/')[2]}.*"))) as image:
                assert width == ImageOps.exif_transpose(image).width
