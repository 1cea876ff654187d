"""Images in many forms, each with its pixels as they are meant: from what was written, from a formula, or from Pillow. None from aecore."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[Any]  # any: uint8 to float64
Random = np.random.Generator


@dataclass(frozen=True)
class Form:
    """One image file: its extension, its bytes, and the pixels `[H, W, C]` that it means; `near`: how far decoders may differ."""

    ext: str
    data: bytes
    pixels: Pixels
    near: int = 0


def noise(random: Random, height: int, width: int, channels: int, dtype: str = "u1") -> Pixels:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return random.normal(size=(height, width, channels)).astype(kind)
    limits = np.iinfo(kind)
    return random.integers(limits.min, limits.max, (height, width, channels), dtype=kind, endpoint=True)


def smooth(random: Random, height: int, width: int, channels: int) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.stack([127.5 + 100 * np.sin(random.random() * 3 + (x + y * random.random()) / 9) for _ in range(channels)], -1).astype(
        np.uint8
    )


def squeezed(pixels: Pixels) -> Pixels:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(data: bytes, chunk: bytes) -> bytes:
    """Return a PNG with one more chunk after its header (and palette)."""
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk + data[at:]


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def seen(data: bytes, mode: str) -> Pixels:
    """Return the pixels by Pillow, as seen."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return stored pixels as CIPA DC-008 says they are seen: 1 as is, 2 mirrored, 3 turned by 180 degrees, ..., 8 by 270 clockwise."""
    turned = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]
    pixels = np.rot90(pixels, turned)
    return pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels


def tiff(values: Pixels, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, metadata=None, **options)
    return out.getvalue()


def imagej(values: Pixels) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, imagej=True)
    return out.getvalue()


def imagej_stack(pages: Pixels) -> bytes:
    """Return pages as ImageJ writes large stacks: one directory, big-endian, the other pages follow the first."""
    options = {"photometric": "minisblack", "byteorder": ">", "rowsperstrip": pages.shape[1]}
    first = tiff(pages[0], description=f"ImageJ=1.53t\nimages={len(pages)}\nslices={len(pages)}\nloop=false\n", software="", **options)
    return first + pages[1:].astype(pages.dtype.newbyteorder(">")).tobytes()


def _png(channels: int, dtype: str) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        pixels = noise(random, height, width, channels, dtype)
        return Form("png", imagecodecs.png_encode(squeezed(pixels)), pixels)

    return make


def _turned_png(random: Random, height: int, width: int) -> Form:
    pixels, orientation = noise(random, height, width, 3), int(random.integers(1, 9))
    return Form("png", saved(Image.fromarray(pixels), "PNG", exif=exif(orientation)), upright(pixels, orientation))


def _one_bit(format: str, ext: str, **options: Any) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        bits = random.random((height, width)) > 0.4
        return Form(ext, saved(Image.fromarray(bits), format, **options), np.where(bits, 255, 0).astype(np.uint8)[..., None])

    return make


def _few_bits_png(random: Random, height: int, width: int) -> Form:
    bits = int(random.choice([1, 2, 4]))
    values = random.integers(0, 1 << bits, (height, width), dtype=np.uint8)
    rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in values]
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    file = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return Form("png", file, (values * (255 // ((1 << bits) - 1))).astype(np.uint8)[..., None])


def _palette(format: str, ext: str, transparent: bool = False, **options: Any) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        colours, numbers = noise(random, 1, 64, 3)[0], random.integers(0, 64, (height, width), dtype=np.uint8)
        image = Image.fromarray(numbers)
        image.putpalette(colours.tobytes())
        if not transparent:
            return Form(ext, saved(image, format, **options), colours[numbers])
        alpha = noise(random, 1, 64, 1)[0] if format == "PNG" else np.where(np.arange(64) == 5, 0, 255).astype(np.uint8)[:, None]
        clear = alpha.tobytes() if format == "PNG" else 5
        pixels = np.concatenate([colours, alpha], 1)[numbers]
        if format == "GIF":  # the writer drops what no pixel uses
            numbers.flat[0], pixels = 5, pixels.copy()
            pixels.reshape(-1, 4)[0] = (*colours[5], 0)
            image = Image.fromarray(numbers)
            image.putpalette(colours.tobytes())
        return Form(ext, saved(image, format, transparency=clear, **options), pixels)

    return make


def _colour_key(channels: int, dtype: str) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        pixels = noise(random, height, width, channels, dtype)
        key = pixels[height // 2, width // 2]
        white = np.iinfo(dtype).max
        alpha = np.where((pixels == key).all(2, keepdims=True), 0, white).astype(dtype)
        data = png_with(imagecodecs.png_encode(squeezed(pixels)), png_chunk(b"tRNS", key.astype(">u2").tobytes()))
        return Form("png", data, np.concatenate([pixels, alpha], 2))

    return make


def _interlaced(random: Random, height: int, width: int) -> Form:
    pixels = noise(random, height, width, 1)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx, 0] if row.size]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    data = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return Form("png", b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b""), pixels)


def _several(format: str, ext: str, **options: Any) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        pictures = [Image.fromarray(noise(random, height, width, 3)) for _ in range(3)]
        return Form(ext, saved(pictures[0], format, save_all=True, append_images=pictures[1:], **options), np.asarray(pictures[0]))

    return make


def _pillow(format: str, ext: str, channels: int, **options: Any) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        pixels = noise(random, height, width, channels)
        return Form(ext, saved(Image.fromarray(squeezed(pixels)), format, **options), pixels)

    return make


def _turned_webp(random: Random, height: int, width: int) -> Form:
    pixels, orientation = noise(random, height, width, 3), int(random.integers(1, 9))
    return Form("webp", saved(Image.fromarray(pixels), "WEBP", lossless=True, exif=exif(orientation)), upright(pixels, orientation))


def _jpeg(mode: str, turned: bool = False, **options: Any) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        image = Image.fromarray(smooth(random, height, width, 3)).convert(mode)
        extra = {"exif": exif(int(random.integers(1, 9)))} if turned else {}
        data = saved(image, "JPEG", quality=90, **options, **extra)
        return Form("jpg", data, seen(data, "L" if mode == "L" else "RGB"), near=3)

    return make


def _changed_jpeg(change: Callable[[bytes], bytes]) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        data = saved(Image.fromarray(smooth(random, height, width, 3)), "JPEG", quality=90)
        return Form("jpg", change(data), seen(data, "RGB"), near=3)

    return make


def _deep_jpeg(random: Random, height: int, width: int) -> Form:
    values = smooth(random, height, width, 1).astype(np.uint16)[..., 0] * 16
    data = imagecodecs.jpeg8_encode(values, level=98, bitspersample=12)
    return Form("jpg", data, values[..., None], near=160)


def _lossless_jpeg(random: Random, height: int, width: int) -> Form:
    pixels = noise(random, height, width, 1, "u2")
    return Form("jpg", imagecodecs.ljpeg_encode(pixels[..., 0]), pixels)


def _tiff(channels: int, dtype: str, **options: Any) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        pixels = noise(random, height, width, channels, dtype)
        values = np.moveaxis(pixels, 2, 0) if options.get("planarconfig") == "separate" else squeezed(pixels)
        return Form("tif", tiff(np.ascontiguousarray(values), **options), pixels)

    return make


def _inverted(dtype: str) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        stored = noise(random, height, width, 1, dtype)
        return Form("tif", tiff(stored[..., 0], photometric="miniswhite"), np.iinfo(dtype).max - stored)

    return make


def _turned_tiff(random: Random, height: int, width: int) -> Form:
    pixels, orientation = noise(random, height, width, 1, "u2"), int(random.integers(1, 9))
    data = tiff(pixels[..., 0], photometric="minisblack", extratags=[(274, 3, 1, orientation, True)])
    return Form("tif", data, upright(pixels, orientation))


def _premultiplied(random: Random, height: int, width: int) -> Form:
    straight = noise(random, height, width, 4)
    stored = straight.copy()
    stored[..., :3] = np.rint(straight[..., :3] * (straight[..., 3:] / 255))
    with np.errstate(invalid="ignore", divide="ignore"):
        colours = np.rint(stored[..., :3] * 255.0 / stored[..., 3:]).clip(0, 255)
    pixels = np.concatenate([np.where(stored[..., 3:] == 0, stored[..., :3], colours).astype(np.uint8), stored[..., 3:]], 2)
    return Form("tif", tiff(stored, photometric="rgb", extrasamples=["assocalpha"]), pixels)


def _twelve_bits(random: Random, height: int, width: int) -> Form:
    pixels = noise(random, height, width, 1, "u2") >> 4
    return Form("tif", tiff(pixels[..., 0], photometric="minisblack"), pixels)


def _imagej(random: Random, height: int, width: int) -> Form:
    pixels = noise(random, height, width, 1, "u2")
    return Form("tif", imagej(pixels[..., 0]), pixels)


def _imagej_stack(random: Random, height: int, width: int) -> Form:
    pages = np.stack([noise(random, height, width, 1, "u2")[..., 0] for _ in range(3)])
    return Form("tif", imagej_stack(pages) if random.random() < 0.5 else imagej(pages), pages[0][..., None])


def _pages(random: Random, height: int, width: int) -> Form:
    pages = np.stack([noise(random, height, width, 3) for _ in range(4)])
    return Form("tif", tiff(pages, photometric="rgb"), pages[0])


def _cmyk_tiff(dtype: str) -> Callable[[Random, int, int], Form]:
    def make(random: Random, height: int, width: int) -> Form:
        inks, white = noise(random, height, width, 4, dtype), float(np.iinfo(dtype).max)
        light = np.floor((white - inks[..., :3]) * (white - inks[..., 3:]) / white + 0.5)
        return Form("tif", tiff(inks, photometric="separated"), light.astype(dtype))

    return make


def _lab(random: Random, height: int, width: int) -> Form:
    grey = random.integers(0, 256, (height, width), dtype=np.uint8)
    lab = np.stack([grey, *(random.integers(-20, 20, (2, height, width)).astype(np.int8).view(np.uint8))], -1)
    return Form("tif", tiff(lab, photometric="cielab"), srgb_of_lab(lab), near=1)


def _lab_16(random: Random, height: int, width: int) -> Form:
    lab = np.stack([random.integers(0, 256, (height, width)), *(random.integers(-20, 20, (2, height, width)) % 256)], -1).astype(np.uint8)
    data = tiff(lab.astype(np.uint16) * np.array([257, 256, 256], np.uint16), photometric="cielab")
    return Form("tif", data, srgb_of_lab(lab, "u2"), near=40)


def _bmp_alpha(random: Random, height: int, width: int) -> Form:
    """A header of version 4 with masks of four channels, as GIMP writes it."""
    pixels = noise(random, height, width, 4)
    rows = pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(rows), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    start = 14 + len(header)
    return Form("bmp", b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + rows, pixels)


def _mpo(random: Random, height: int, width: int) -> Form:
    pictures = [Image.fromarray(smooth(random, height, width, 3)) for _ in range(2)]
    data = saved(pictures[0], "MPO", quality=90, save_all=True, append_images=pictures[1:])
    return Form("jpg", data, seen(data, "RGB"), near=3)


def _gif_without_trailer(random: Random, height: int, width: int) -> Form:
    whole = FORMS["gif"](random, height, width)
    return Form("gif", whole.data[:-1], whole.pixels)


def srgb_of_lab(lab: Pixels, dtype: str = "u1") -> Pixels:
    """Return sRGB of CIE L*a*b* of 8 bits by the formulas: CIE 15, Bradford's adaptation from D50 to D65, IEC 61966-2-1."""
    light, (red, blue) = lab[..., 0] * (100 / 255), np.moveaxis(lab[..., 1:].view(np.int8).astype(float), -1, 0)
    y = (light + 16) / 116
    axes = np.stack([y + red / 500, y, y - blue / 200], -1)
    xyz = np.where(axes > 6 / 29, axes**3, 3 * (6 / 29) ** 2 * (axes - 4 / 29)) * (0.9642, 1.0, 0.8249)
    matrix = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]  # from D50
    linear = (xyz @ np.array(matrix).T).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * np.iinfo(dtype).max).astype(dtype)


def _ycbcr(random: Random, height: int, width: int) -> Form:
    image = Image.fromarray(smooth(random, height, width, 3)).convert("YCbCr")
    return Form("tif", saved(image, "TIFF"), np.asarray(image.convert("RGB")), near=2)


def _jpeg_tiff(random: Random, height: int, width: int) -> Form:
    data = saved(Image.fromarray(smooth(random, height, width, 3)), "TIFF", compression="jpeg", quality=95)
    return Form("tif", data, seen(data, "RGB"), near=3)


FORMS: dict[str, Callable[[Random, int, int], Form]] = {
    **{f"png {name} {bits}": _png(channels, f"u{bits // 8}") for (name, channels), bits in itertools.product(
        {"grey": 1, "grey alpha": 2, "rgb": 3, "rgba": 4}.items(), (8, 16))},
    "png turned": _turned_png,
    "png 1 bit": _one_bit("PNG", "png"),
    "png few bits": _few_bits_png,
    "png palette": _palette("PNG", "png"),
    "png palette alpha": _palette("PNG", "png", transparent=True),
    "png grey key": _colour_key(1, "u1"),
    "png rgb key": _colour_key(3, "u1"),
    "png grey key 16": _colour_key(1, "u2"),
    "png rgb key 16": _colour_key(3, "u2"),
    "png interlaced": _interlaced,
    "png animated": _several("PNG", "png"),
    "gif": _palette("GIF", "gif"),
    "gif without trailer": _gif_without_trailer,
    "gif transparent": _palette("GIF", "gif", transparent=True),
    "webp": _pillow("WEBP", "webp", 3, lossless=True),
    "webp alpha": _pillow("WEBP", "webp", 4, lossless=True, exact=True),
    "webp animated": _several("WEBP", "webp", lossless=True),
    "webp turned": _turned_webp,
    "bmp grey": _pillow("BMP", "bmp", 1),
    "bmp rgb": _pillow("BMP", "bmp", 3),
    "bmp alpha": _bmp_alpha,
    "bmp palette": _palette("BMP", "bmp"),
    "bmp 1 bit": _one_bit("BMP", "bmp"),
    "jpeg": _jpeg("RGB"),
    "jpeg grey": _jpeg("L"),
    "jpeg progressive": _jpeg("RGB", progressive=True),
    "jpeg cmyk": _jpeg("CMYK"),
    "jpeg turned": _jpeg("RGB", turned=True),
    "jpeg grey turned": _jpeg("L", turned=True),
    "jpeg cmyk turned": _jpeg("CMYK", turned=True),
    "jpeg restarts": _jpeg("RGB", restart_marker_blocks=2),
    "jpeg no end": _changed_jpeg(lambda data: data[:-2]),
    "jpeg text for an end": _changed_jpeg(lambda data: data[:-2] + b"\r\n--boundary--\r\n"),
    "jpeg mpo": _mpo,
    "jpeg bytes after": _changed_jpeg(lambda data: data + b"junk" * 9),
    "jpeg stray bytes": _changed_jpeg(lambda data: data[:20] + b"\0\0\0" + data[20:]),
    "jpeg 12 bit": _deep_jpeg,
    "jpeg lossless 16": _lossless_jpeg,
    **{f"tiff grey {name}": _tiff(1, name, photometric="minisblack") for name in ("u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8")},
    "tiff grey i8": _tiff(1, "i8", photometric="minisblack"),
    **{f"tiff big-endian {name}": _tiff(1, name, photometric="minisblack", byteorder=">") for name in ("u2", "u4", "i2", "f4")},
    **{f"tiff rgb {name}": _tiff(3, name, photometric="rgb") for name in ("u1", "u2", "f4")},
    "tiff rgb big-endian": _tiff(3, "u2", photometric="rgb", byteorder=">"),
    "tiff rgb planar": _tiff(3, "u1", photometric="rgb", planarconfig="separate"),
    "tiff rgb planar 16": _tiff(3, "u2", photometric="rgb", planarconfig="separate"),
    "tiff bands planar": _tiff(5, "u2", photometric="minisblack", planarconfig="separate"),
    "tiff 4 bands": _tiff(4, "u1", photometric="minisblack", planarconfig="contig"),
    "tiff 13 bands": _tiff(13, "u2", photometric="minisblack", planarconfig="contig"),
    "tiff rgb and infrared": _tiff(4, "u2", photometric="rgb", extrasamples=["unspecified"]),
    "tiff rgba": _tiff(4, "u1", photometric="rgb", extrasamples=["unassalpha"]),
    "tiff rgba 16": _tiff(4, "u2", photometric="rgb", extrasamples=["unassalpha"]),
    "tiff grey alpha 16": _tiff(2, "u2", photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
    "tiff premultiplied": _premultiplied,
    "tiff tiled lzw": _tiff(3, "u1", photometric="rgb", tile=(16, 16), compression="lzw", predictor=True),
    "tiff deflate 16": _tiff(1, "u2", photometric="minisblack", compression="zlib", predictor=True),
    "tiff zstd float": _tiff(1, "f4", photometric="minisblack", compression="zstd", predictor=True),
    "tiff bigtiff": _tiff(3, "u1", photometric="rgb", bigtiff=True),
    "tiff inverted 8": _inverted("u1"),
    "tiff inverted 16": _inverted("u2"),
    "tiff inverted 32": _inverted("u4"),
    "tiff turned": _turned_tiff,
    "tiff 12 in 16": _twelve_bits,
    "tiff fax": _one_bit("TIFF", "tif", compression="group4"),
    "tiff palette": _palette("TIFF", "tif"),
    "tiff cmyk": _cmyk_tiff("u1"),
    "tiff cmyk 16": _cmyk_tiff("u2"),
    "tiff lab": _lab,
    "tiff lab 16": _lab_16,
    "tiff ycbcr": _ycbcr,
    "tiff jpeg": _jpeg_tiff,
    "tiff imagej": _imagej,
    "tiff imagej stack": _imagej_stack,
    "tiff pages": _pages,
}  # fmt: skip
