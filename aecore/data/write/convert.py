"""Turn a file into a shard's member: always check it, change it only for `shards.resize` or `shards.mode`.

If size and mode are right already the original bytes are kept. Else the image goes through Pillow: PNG stays PNG, JPEG stays JPEG
(quality 95), every other format becomes PNG. Images are resized to a square without keeping their aspect; alpha is dropped by
`mode`; 16-bit grey is scaled by 255/65535 (Pillow's own conversion clips it). 32-bit integer and float images have no fixed range, so they
are kept or quarantined, never changed. Equal versions of Pillow give equal bytes.
"""

import io
from typing import Any

import numpy as np

from aecore.data.format.foreign import explained
from aecore.data.format.image import BadSample, ImageHeader, image_header, load_image
from aecore.data.format.record import DATA_EXTENSIONS, IMAGE_EXTENSIONS, ArrayHeader, array_header
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError

Header = ImageHeader | ArrayHeader
JPEG_QUALITY = 95


def prepare(data: bytes, ext: str, shards: ShardSpec) -> tuple[Header, bytes]:
    """Return header and bytes of the data member to store; BadSample if the bytes are damaged or not of an allowed kind."""
    try:
        return _prepared(data, ext, shards)
    except BadSample as bad:
        raise explained(data, ext, bad) from bad


def _prepared(data: bytes, ext: str, shards: ShardSpec) -> tuple[Header, bytes]:
    if ext not in IMAGE_EXTENSIONS:
        return _prepare_array(data, ext, shards)
    header = image_header(data, ext)
    if shards.check == "decode":
        load_image(data, header)
    if shards.resize is None and shards.mode == "keep":
        return header, data
    if (shards.resize is None or header.width == header.height == shards.resize) and shards.mode in ("keep", header.mode):
        return header, data
    return _converted(data, header, shards)


def _prepare_array(data: bytes, ext: str, shards: ShardSpec) -> tuple[Header, bytes]:
    if ext != "npy":
        raise BadSample("extension", f"files of extension {ext!r} are not stored (allowed: {', '.join(sorted(DATA_EXTENSIONS))})")
    if shards.resize is not None or shards.mode != "keep":
        raise ConfigError("shards.resize and shards.mode work on images; this source gives arrays (.npy): leave both at their defaults")
    header = array_header(data)
    if 0 in header.shape:
        raise BadSample("empty", f"an array of shape {header.shape} holds no values")
    if shards.check == "decode" and not np.isfinite(np.frombuffer(data, header.dtype, offset=header.start)).all():
        raise BadSample("not_finite", "the array holds NaN or infinity")
    return header, data


def _converted(data: bytes, header: ImageHeader, shards: ShardSpec) -> tuple[Header, bytes]:
    if header.mode.startswith(("I", "F")) and not header.mode.startswith("I;16"):
        raise BadSample(
            "unsupported",
            f"an image of mode {header.mode} (32-bit integers or floats) has no fixed range to convert from: write it as 8 or 16 bits, "
            "or keep the original bytes (no shards.resize, shards.mode=keep)",
        )
    image = _to_mode(load_image(data, header), shards.mode)
    if shards.resize is not None and image.size != (shards.resize, shards.resize):
        image = _resized(image, shards.resize)
    changed = _encoded(image, header)
    return image_header(changed, header.ext if header.ext in ("jpg", "jpeg") else "png"), changed


def _encoded(image: Any, header: ImageHeader) -> bytes:  # any: PIL.Image.Image
    out = io.BytesIO()
    try:
        if header.ext in ("jpg", "jpeg"):
            image.save(out, "JPEG", quality=JPEG_QUALITY)
        else:
            image.save(out, "PNG")
    except OSError as error:  # Pillow's error for a mode that the format does not have
        raise BadSample("unsupported", f"{error}: choose shards.mode, or keep the original bytes (no shards.resize)") from error
    return out.getvalue()


def _to_mode(image: Any, mode: str) -> Any:  # any: PIL.Image.Image
    from PIL import Image

    if mode == "keep":
        steps = {"P": "RGBA" if "transparency" in image.info else "RGB", "1": "L"}  # modes that cannot be interpolated
        return image.convert(steps[image.mode]) if image.mode in steps else image
    if image.mode.startswith("I"):  # 16 bits: others were refused
        levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        image = Image.fromarray(np.rint(levels * (255 / 65535)).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Any, side: int) -> Any:  # any: PIL.Image.Image
    from PIL import Image

    if not image.mode.startswith("I"):
        return image.resize((side, side), Image.Resampling.BICUBIC)
    resized = Image.fromarray(np.asarray(image).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return Image.fromarray(np.rint(np.clip(np.asarray(resized), 0, 65535)).astype(np.uint16))
