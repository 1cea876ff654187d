"""Opens images with Pillow: the formats that are read, without Pillow's own limit of pixels."""

import warnings
from io import BytesIO
from typing import Any

PILLOW_FORMATS = {"WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "GIF": "gif"}
READ_FORMATS = ("PNG", "JPEG", *PILLOW_FORMATS)  # as Pillow names them: others it gives to programs


def open_unbounded(data: bytes) -> Any:  # any: PIL.Image.Image, imported only here
    """Open `data` with Pillow without its warnings and its own limit of pixels: the caller checks the size before it loads them."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF that is damaged, and of sizes
        try:
            return Image.open(BytesIO(data), formats=READ_FORMATS)
        except Image.DecompressionBombError:
            for name in READ_FORMATS:
                factory, accepts = Image.OPEN[name]
                if accepts is None or accepts(data[:16]) is True:
                    return factory(BytesIO(data), "")
            raise
