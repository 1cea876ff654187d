"""Pictures: pixels of samples here, the figures of a trained model in `aecore.report.figures`."""

from aecore.data.format.pictures import grid, is_image, pixels, png, require_matplotlib

__all__ = ["grid", "is_image", "pixels", "png", "require_matplotlib"]
